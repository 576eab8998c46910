"""Eager definitions of the losses: the specification that every kernel is compared with, and the fallback.

Readable rather than fast, in plain differentiable PyTorch. Nothing here indexes with a boolean mask (a hidden
``nonzero``: a GPU synchronisation and a graph break) and nothing imports the rest of the package. Arguments are taken
as :mod:`fused_kd.functional` has checked them, but any two-dimensional logits work.
"""

from fused_kd.reference.decompose import Decomposition, decompose
from fused_kd.reference.dist import DISTParts, dist_loss
from fused_kd.reference.nkd import LossParts, nkd_loss
from fused_kd.reference.rows import accumulation_dtype, standardize_logits
from fused_kd.reference.smoothing import tf_kd_loss, zipf_ls_loss
from fused_kd.reference.teacher import DistillationParts, dkd_loss, js_loss, kd_loss, wsld_loss
from fused_kd.reference.uskd import (
    RANKS,
    USKDParts,
    USKDTerms,
    uskd_batch_sums,
    uskd_loss,
    uskd_soft_labels,
    uskd_terms,
)

__all__ = [
    "RANKS",
    "DISTParts",
    "Decomposition",
    "DistillationParts",
    "LossParts",
    "USKDParts",
    "USKDTerms",
    "accumulation_dtype",
    "decompose",
    "dist_loss",
    "dkd_loss",
    "js_loss",
    "kd_loss",
    "nkd_loss",
    "standardize_logits",
    "tf_kd_loss",
    "uskd_batch_sums",
    "uskd_loss",
    "uskd_soft_labels",
    "uskd_terms",
    "wsld_loss",
    "zipf_ls_loss",
]
