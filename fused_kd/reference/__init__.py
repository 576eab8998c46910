"""Eager definitions of the losses: the specification of every kernel, and the fallback.

They are plain differentiable PyTorch, readable rather than fast. Nothing here indexes with a boolean mask (a hidden
``nonzero``: a GPU synchronisation and a graph break), and nothing imports the rest of the package.
:mod:`fused_kd.losses` has checked the arguments, but any two-dimensional logits work.

In the formulas ``q(T) = softmax(t / T)`` is the teacher's softmax and ``p(T) = softmax(s / T)`` the student's. A hat
leaves out the target class ``y``. ``logit_standardization`` uses the z-scores of both logits
(:func:`standardize_logits`) in all terms but the CE.
"""

from fused_kd.reference.decompose import Decomposition, decompose
from fused_kd.reference.dist import DISTParts, dist_loss
from fused_kd.reference.dkd import dkd_loss
from fused_kd.reference.js import js_loss
from fused_kd.reference.kd import kd_loss
from fused_kd.reference.nkd import nkd_loss
from fused_kd.reference.rows import DistillationParts, LossParts, accumulation_dtype, standardize_logits, widest_dtype
from fused_kd.reference.tf_kd import tf_kd_loss
from fused_kd.reference.topk import topk_loss
from fused_kd.reference.uskd import (
    RANKS,
    USKDParts,
    USKDTerms,
    uskd_batch_sums,
    uskd_loss,
    uskd_soft_labels,
    uskd_terms,
)
from fused_kd.reference.wsld import wsld_loss
from fused_kd.reference.zipf_ls import zipf_ls_loss

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
    "topk_loss",
    "uskd_batch_sums",
    "uskd_loss",
    "uskd_soft_labels",
    "uskd_terms",
    "widest_dtype",
    "wsld_loss",
    "zipf_ls_loss",
]
