"""Fused kernels for knowledge-distillation losses."""

from fused_kd import reference
from fused_kd._version import __version__
from fused_kd.backends import explain
from fused_kd.functional import nkd_loss
from fused_kd.modules import NKDLoss
from fused_kd.reference import LossParts

__all__ = ["LossParts", "NKDLoss", "__version__", "explain", "nkd_loss", "reference"]
