"""Rows as the layers pass them on: those of a source (:mod:`fused_kd.sources`), and of rows with sharded classes what a
backend gets and returns. :mod:`fused_kd.backends.staged` and, for a top-k teacher, :mod:`fused_kd.backends.topk`
describe the runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

#: The stages of a row loss in order; csrc/cpu/kernels.h has the same numbers.
STAGES = {"moments": 0, "statistics": 1, "sums": 2, "gradient": 3}
#: Numbers of a row for a top-k teacher besides the logits of its kept classes; csrc/cpu/kernels.h has the same.
TOPK_FIELDS = 5


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


class Piece(NamedTuple):
    """Some columns of rows, and their place in the rows."""

    student: Tensor  # (N, n) logits
    teacher: Tensor | None  # (N, n), if the loss has a teacher
    labels: Tensor | None  # (N, n) class probabilities, or None for class indices
    target: Tensor  # (N,) int64: the class index, or the most probable class, among all classes of the row
    first_class: int  # the class of the first column
    num_classes: int  # of the whole row


class StageResults(NamedTuple):
    """Results of the earlier stages, ``(pieces, fields, N)`` each; None if a stage has not run or is not needed."""

    moments: Tensor | None = None
    statistics: Tensor | None = None
    sums: Tensor | None = None


class TopKPiece(NamedTuple):
    """The classes of this process if they are sharded, and the function that exchanges what each has found,
    ``(TOPK_FIELDS + k, N)``. It stacks the results; a backend gets one that also merges them."""

    first_class: int
    num_classes: int
    exchange: Callable[[list[Tensor]], Tensor]
