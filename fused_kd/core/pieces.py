"""Rows with sharded classes: what a backend gets of them, and what it returns.

:mod:`fused_kd.backends.staged` and, for a top-k teacher, :mod:`fused_kd.backends.topk` describe the runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

#: The stages of a row loss in order; csrc/cpu/kernels.h has the same numbers.
STAGES = {"moments": 0, "statistics": 1, "sums": 2, "gradient": 3}
#: Numbers of a row for a top-k teacher besides the logits of its kept classes; csrc/cpu/kernels.h has the same.
TOPK_FIELDS = 5


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
