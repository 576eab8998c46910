"""nn.Module twins of the functions in :mod:`fused_kd.functional`: they keep hyper-parameters, and what is trained.

Each takes the function's keyword arguments when it is made and its tensors when it is called. The attributes may be
changed between calls, by a schedule for instance.
"""

from fused_kd.modules.smoothing import TfKDLoss, ZipfLSLoss
from fused_kd.modules.teacher import DISTLoss, DKDLoss, KDLoss, NKDLoss, WSLDLoss
from fused_kd.modules.uskd import USKDLoss

__all__ = ["DISTLoss", "DKDLoss", "KDLoss", "NKDLoss", "TfKDLoss", "USKDLoss", "WSLDLoss", "ZipfLSLoss"]
