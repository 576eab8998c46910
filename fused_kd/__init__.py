"""Fused kernels for knowledge-distillation losses."""

from fused_kd import reference
from fused_kd._version import __version__
from fused_kd.backends import explain
from fused_kd.core.catalogue import catalogue
from fused_kd.losses import (
    DISTLoss,
    DKDLoss,
    JSLoss,
    KDLoss,
    NKDLoss,
    TfKDLoss,
    USKDLoss,
    WSLDLoss,
    ZipfLSLoss,
    decompose,
    dist_loss,
    dkd_loss,
    js_loss,
    kd_loss,
    nkd_loss,
    tf_kd_loss,
    uskd_loss,
    uskd_soft_labels,
    wsld_loss,
    zipf_ls_loss,
)
from fused_kd.reference import Decomposition, DistillationParts, DISTParts, LossParts, USKDParts

__all__ = [
    "DISTLoss",
    "DISTParts",
    "DKDLoss",
    "Decomposition",
    "DistillationParts",
    "JSLoss",
    "KDLoss",
    "LossParts",
    "NKDLoss",
    "TfKDLoss",
    "USKDLoss",
    "USKDParts",
    "WSLDLoss",
    "ZipfLSLoss",
    "__version__",
    "catalogue",
    "decompose",
    "dist_loss",
    "dkd_loss",
    "explain",
    "js_loss",
    "kd_loss",
    "nkd_loss",
    "reference",
    "tf_kd_loss",
    "uskd_loss",
    "uskd_soft_labels",
    "wsld_loss",
    "zipf_ls_loss",
]
