"""Eager definitions of the losses: the specification that every kernel is compared with, and the fallback.

Readable rather than fast, in plain differentiable PyTorch. Nothing here indexes with a boolean mask (a hidden
``nonzero``: a GPU synchronisation and a graph break) and nothing imports the rest of the package. Arguments are taken
as :mod:`fused_kd.functional` has checked them, but any two-dimensional logits work.
"""

from fused_kd.reference.nkd import LossParts, nkd_loss
from fused_kd.reference.rows import accumulation_dtype
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
    "LossParts",
    "USKDParts",
    "USKDTerms",
    "accumulation_dtype",
    "nkd_loss",
    "uskd_batch_sums",
    "uskd_loss",
    "uskd_soft_labels",
    "uskd_terms",
]
