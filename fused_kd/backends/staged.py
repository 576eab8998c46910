"""A row loss of rows that are cut into pieces, some classes each: stages, between which the pieces exchange a few
numbers of each row.

A fused kernel has a row's classes at hand. Where they lie in several places, on processes that share the classes, say,
no call can see a whole softmax; but what a call finds of its piece can be merged with that of the others as the kernel
itself merges the blocks of a row. So a stage ends with numbers of each row, ``(fields, N)``, those of all pieces are
stacked, ``(pieces, fields, N)``, and the next stage begins with them:

- moments: count, mean and sum of squares of both logits, where z-scores are distilled;
- statistics: maxima, sums of exponentials and the target's logits, of every loss;
- sums: of functions of each class's probabilities, where a loss is pointwise;
- gradient: the parts of the loss, the same on every piece, and the gradient of the piece's columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd.core.catalogue import ROW_LOSSES, as_run
from fused_kd.core.options import Options

#: In their order; csrc/cpu/kernels.h has the same numbers.
STAGES = {"moments": 0, "statistics": 1, "sums": 2, "gradient": 3}


class Piece(NamedTuple):
    """Some columns of rows, and what the rows are."""

    student: Tensor  # (N, n) logits
    teacher: Tensor | None  # (N, n), of a loss that has one
    labels: Tensor | None  # (N, n) class probabilities, or None for class indices
    target: Tensor  # (N,) int64: the class, of probabilities the likeliest, among all of the row's
    first_class: int  # where these columns begin in the row
    num_classes: int  # that the row has


class Found(NamedTuple):
    """What the pieces have found, ``(pieces, fields, N)`` each; None before its stage, or where that is not needed."""

    moments: Tensor | None = None
    statistics: Tensor | None = None
    sums: Tensor | None = None


def stages_of(options: Options) -> list[str]:
    """The stages that a loss takes, in their order."""
    needed = {"moments": options.standardize, "sums": "pointwise" in ROW_LOSSES[options.loss].needs}
    return [stage for stage in STAGES if needed.get(stage, True)]


def likeliest(labels: Tensor, first_class: int) -> Tensor:
    """Of a piece's class probabilities the largest of each row, and its class among all of the row's: (2, N) float64.
    Of no classes it is what no other is below."""
    rows, width = labels.shape
    if width == 0:
        return labels.new_full((2, rows), float("-inf"), dtype=torch.float64)
    values, columns = labels.max(1)
    return torch.stack([values.double(), (columns + first_class).double()])


def likeliest_of_all(found: Tensor) -> Tensor:
    """The target of rows from that of their pieces, (pieces, 2, N): the lowest of equally likely classes."""
    values, classes = found.unbind(1)
    largest = values.amax(0)
    first = (values == largest) | (values.isnan() & largest.isnan())
    return torch.where(first, classes, float("inf")).amin(0).clamp(min=0).long()


def run(
    kernels: Any,
    pieces: list[Piece],
    options: Options,
    factors: Tensor | None = None,
    exchange: Callable[[list[Tensor]], Tensor] = torch.stack,
) -> tuple[Tensor, list[Tensor]]:
    """All stages of a backend's pieces in one process: the parts of each row, (3, N), and the pieces' gradients."""
    options = options._replace(loss=as_run(options.loss, options.hyper.beta))
    found = Found()
    *before, last = stages_of(options)
    for stage in before:
        results = exchange([kernels.row_stage(stage, piece, found, options, factors) for piece in pieces])
        found = found._replace(**{stage: results})
    ends = [kernels.row_stage(last, piece, found, options, factors) for piece in pieces]
    return ends[0][0], [gradient for _, gradient in ends]
