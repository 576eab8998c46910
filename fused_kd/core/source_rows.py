"""A source of logits (:mod:`fused_kd.sources`) as the rows that an op takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SourceRows(NamedTuple):
    """Logits (N, C); or the hidden states (N, D) of a head, with its ``weight``; or the kept log-probabilities (N, k)
    of a top-k teacher, with their ``indices`` and the ``rest``."""

    values: Tensor
    weight: Tensor | None = None  # (C, D)
    bias: Tensor | None = None  # (C,)
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0 for none
    indices: Tensor | None = None  # (N, k) int64
    rest: str = ""


class Span(NamedTuple):
    """Which of a row's classes this process has, and the name of their process group ("" for none)."""

    first_class: int
    num_classes: int
    group: str = ""
