"""A row loss in stages, for rows that are cut into pieces of some classes each. Between stages the pieces exchange a
few numbers per row.

A fused kernel sees all classes of a row. If the classes are sharded, or cut into pieces in another way, no
call sees a whole softmax. But the results of the pieces can be merged as a kernel merges the blocks of a row. So each
stage ends with some numbers per row, ``(fields, N)``. The next stage starts with the numbers of all pieces, stacked to
``(pieces, fields, N)``:

- moments: count, mean and sum of squares of both logits, for z-scores;
- statistics: maxima, sums of exponentials and the target's logits, for every loss;
- sums: sums over functions of each class's probabilities, for pointwise losses;
- gradient: the parts of the loss, the same on every piece, and the gradient of the piece's columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_kd.core.catalogue import ROW_LOSSES, as_run
from fused_kd.core.options import Options
from fused_kd.core.rows import STAGES, Piece, StageResults


def stages_of(options: Options) -> list[str]:
    """Return the stages of a loss, in order."""
    needed = {"moments": options.standardize, "sums": "pointwise" in ROW_LOSSES[options.loss].needs}
    return [stage for stage in STAGES if needed.get(stage, True)]


def likeliest(labels: Tensor, first_class: int) -> Tensor:
    """Return each row's largest class probability in a piece, and its class among all of the row's: (2, N) float64. A
    piece without classes has -inf."""
    rows, width = labels.shape
    if width == 0:
        return labels.new_full((2, rows), float("-inf"), dtype=torch.float64)
    values, columns = labels.max(1)
    return torch.stack([values.double(), (columns + first_class).double()])


def likeliest_of_all(found: Tensor) -> Tensor:
    """Return the target of each row from :func:`likeliest` of the pieces, (pieces, 2, N): the lowest class on ties."""
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
    """Run all stages on this process's pieces. Return the parts of each row, (3, N), and the pieces' gradients."""
    options = options._replace(loss=as_run(options.loss, options.hyper.beta))
    earlier = StageResults()
    *before, last = stages_of(options)
    for stage in before:
        results = exchange([kernels.row_stage(stage, piece, earlier, options, factors) for piece in pieces])
        earlier = earlier._replace(**{stage: results})
    ends = [kernels.row_stage(last, piece, earlier, options, factors) for piece in pieces]
    return ends[0][0], [gradient for _, gradient in ends]
