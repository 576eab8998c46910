"""A source of logits as the rows that an op takes: see :mod:`fused_kd.sources`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SourceRows(NamedTuple):
    """Logits (N, C) themselves; or the hidden states (N, D) of a head, with its ``weight``; or the log-probabilities
    (N, k) that were kept of a teacher, with their ``indices`` and what the ``rest`` is."""

    values: Tensor
    weight: Tensor | None = None  # (C, D)
    bias: Tensor | None = None  # (C,)
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0 for none
    indices: Tensor | None = None  # (N, k) int64
    rest: str = ""


class Span(NamedTuple):
    """Which of a row's classes are at hand, and the name of the process group that shares them, "" for none."""

    first_class: int
    num_classes: int
    group: str = ""
