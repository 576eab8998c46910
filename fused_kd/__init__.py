"""Fused kernels for knowledge-distillation losses."""

from fused_kd import reference
from fused_kd.backends import explain
from fused_kd.functional import nkd_loss
from fused_kd.modules import NKDLoss
from fused_kd.reference import LossParts

__version__ = "0.1.0"
__all__ = ["LossParts", "NKDLoss", "explain", "nkd_loss", "reference"]
