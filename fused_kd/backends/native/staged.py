"""The stages of a row loss in the C++ core: see :mod:`fused_kd.backends.staged`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_kd.backends.native.boundary import address, batch, matrix
from fused_kd.core.catalogue import NUMBERS
from fused_kd.core.options import Options
from fused_kd.core.row_errors import row_error
from fused_kd.core.rows import STAGES, Piece, StageResults
from fused_kd.reference import accumulation_dtype

#: The fields of Statistics in csrc/cpu/row_blocks.h.
STATISTICS = (
    "s_max", "t_max", "s_soft", "t_soft", "s_sharp", "t_sharp", "cross", "blocked", "number", "s_raw", "linear",
    "v_sum", "v_cross", "v_blocked", "v_cross_t", "w_soft", "w_sharp", "w_teacher", "s_target", "t_target", "v_target",
)  # fmt: skip
#: The count of numbers per row at the end of a stage (csrc/cpu/kernels.h).
FIELDS = {"moments": 6, "statistics": len(STATISTICS), "sums": 12, "gradient": 0}
#: Statistics that are 0 without class probabilities, and without z-scores. Then pieces need not exchange them.
_LABEL_STATISTICS = ("v_sum", "v_cross", "v_blocked", "v_cross_t")
_SCORE_STATISTICS = ("w_soft", "w_sharp", "w_teacher")


def exchanged_places(labels: bool, standardize: bool) -> list[int]:
    """Return the places of the statistics that pieces exchange."""
    idle = (*(() if labels else _LABEL_STATISTICS), *(() if standardize else _SCORE_STATISTICS))
    return [place for place, name in enumerate(STATISTICS) if name not in idle]


def row_stage(
    core: Any, where: tuple[str, int], stage: str, piece: Piece, earlier: StageResults, options: Options,
    factors: Tensor | None,
) -> Any:  # fmt: skip
    """Run a stage on a piece. Return its numbers, (fields, N) float64; from the last stage the rows' parts (3, N) and
    the gradient."""
    student, teacher, labels, target, first_class, num_classes = piece
    rows = student.shape[0]
    other = student if teacher is None else teacher
    dtype = accumulation_dtype(student, other)
    exchanged = exchanged_places(labels is not None, options.standardize)
    if earlier.statistics is not None:
        statistics = earlier.statistics.new_zeros(len(earlier.statistics), len(STATISTICS), rows)
        statistics[:, exchanged] = earlier.statistics
        earlier = earlier._replace(statistics=statistics)
    last = stage == "gradient"
    out = student.new_zeros(FIELDS[stage], rows, dtype=torch.float64)
    parts = student.new_empty(rows, 3, dtype=torch.float64)
    gradient = student.new_empty(student.shape if last else (0,))
    pieces = max(0 if each is None else len(each) for each in earlier)
    target = target.contiguous()
    bad_row = core.row_stage(
        batch(where, student, target if labels is None else labels, options.ignore_index, dtype),
        (options.hyper, address(factors)),
        matrix(other),
        NUMBERS[options.loss],
        options.standardize,
        (gradient.data_ptr() if last else 0, options.scales[0]),
        parts.data_ptr(),
        (
            STAGES[stage], target.data_ptr(), first_class, num_classes, pieces,
            *map(address, earlier), out.data_ptr(),
        ),
    )  # fmt: skip
    if bad_row >= 0 and labels is None:
        raise row_error(target, bad_row, num_classes, options.ignore_index)
    if bad_row >= 0:
        assert earlier.statistics is not None
        places = [STATISTICS.index(name) for name in ("v_sum", "v_target")]
        raise row_error(earlier.statistics[:, places].sum((0, 1))[:, None], bad_row, num_classes, -1)
    if last:
        return parts.T.to(dtype), gradient
    return out[exchanged] if stage == "statistics" else out
