"""Fused kernels for knowledge-distillation losses."""

from fused_kd import losses, reference
from fused_kd._version import __version__
from fused_kd.core.catalogue import catalogue
from fused_kd.losses import *  # noqa: F403 - its __all__ is a part of this one
from fused_kd.losses._explain import explain
from fused_kd.reference import Decomposition, DistillationParts, DISTParts, LossParts, USKDParts
from fused_kd.sources import ClassShard, Head, TopK

__all__ = [
    "ClassShard",
    "DISTParts",
    "Decomposition",
    "DistillationParts",
    "Head",
    "LossParts",
    "TopK",
    "USKDParts",
    "__version__",
    "catalogue",
    "explain",
    "reference",
]
__all__ += losses.__all__
