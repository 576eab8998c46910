"""Fused kernels for knowledge-distillation losses."""

from fused_kd import reference
from fused_kd._version import __version__
from fused_kd.backends import explain
from fused_kd.functional import nkd_loss, uskd_loss, uskd_soft_labels
from fused_kd.modules import NKDLoss, USKDLoss
from fused_kd.reference import LossParts, USKDParts

__all__ = [
    "LossParts",
    "NKDLoss",
    "USKDLoss",
    "USKDParts",
    "__version__",
    "explain",
    "nkd_loss",
    "reference",
    "uskd_loss",
    "uskd_soft_labels",
]
