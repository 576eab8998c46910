"""nn.Module twins of the functions in :mod:`fused_kd.functional`: they keep hyper-parameters, and what is trained.

Each takes the function's keyword arguments when it is made and its tensors when it is called. The attributes may be
changed between calls. Or give a callable in place of a number, for a schedule, ``KDLoss(temperature=schedule.now)``: it
is called without arguments whenever the loss is. Under ``torch.compile`` let it keep floats: an int that it reads is a
constant of the graph, which is compiled anew for each.
"""

from fused_kd.modules.smoothing import TfKDLoss, ZipfLSLoss
from fused_kd.modules.teacher import DISTLoss, DKDLoss, JSLoss, KDLoss, NKDLoss, WSLDLoss
from fused_kd.modules.uskd import USKDLoss

__all__ = ["DISTLoss", "DKDLoss", "JSLoss", "KDLoss", "NKDLoss", "TfKDLoss", "USKDLoss", "WSLDLoss", "ZipfLSLoss"]
