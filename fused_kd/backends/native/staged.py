"""The stages of a row loss in the C++ core: see :mod:`fused_kd.backends.staged`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_kd.backends.native.boundary import address, batch, matrix
from fused_kd.core.catalogue import NUMBERS, ROW_LOSSES, has_column_term
from fused_kd.core.options import Options
from fused_kd.core.row_errors import row_error
from fused_kd.core.rows import STAGES, Piece, StageResults
from fused_kd.reference import accumulation_dtype

#: The fields of Statistics in csrc/cpu/row_blocks.h, each with what must hold for it to be used; else pieces need not
#: exchange it. See :func:`_holding`.
STATISTICS = {
    "s_max": "", "t_max": "teacher", "s_soft": "", "t_soft": "teacher", "s_sharp": "sharp", "t_sharp": "both",
    "cross": "dot", "blocked": "dot", "number": "linear", "s_raw": "raw", "linear": "linear",
    "v_sum": "labels", "v_cross": "labels", "v_blocked": "labels", "v_cross_t": "labels teacher_ce",
    "w_soft": "scores dot", "w_sharp": "scores both", "w_teacher": "scores dot",
    "s_target": "", "t_target": "teacher", "v_target": "",
}  # fmt: skip
#: The same for PieceSums in csrc/cpu/pieces.h.
SUMS = {
    "of_1": "", "of_2": "", "of_3": "", "slope_1": "", "slope_2": "second", "slope_3": "columns",
    "centred_1": "scores", "centred_2": "scores second", "centred_3": "scores columns", "z": "scores",
    "column": "columns", "correlations": "columns",
}  # fmt: skip
#: The count of numbers per row at the end of a stage (csrc/cpu/kernels.h).
FIELDS = {"moments": 6, "statistics": len(STATISTICS), "sums": len(SUMS), "gradient": 0}


def _holding(options: Options, labels: bool) -> set[str]:
    """Return the words of :data:`STATISTICS` and :data:`SUMS` that hold. ``row_needs`` of csrc/losses/row_losses.h
    decides in the same way what a kernel computes."""
    needs, hyper = ROW_LOSSES[options.loss].needs, options.hyper
    ce = hyper.ce_weight != 0
    holds = {
        "sharp": ce or "sharp" in needs or "at_one" in needs,
        "both": "sharp" in needs,  # the teacher's sharp softmax besides the student's
        "dot": "teacher" in needs and "pointwise" not in needs,
        "linear": "linear" in needs or (ce and hyper.label_smoothing != 0),
        "raw": ce and "sharp" in needs and options.standardize,
        "labels": labels,
        "scores": options.standardize,
        "second": "one_slope" not in needs,
        "columns": has_column_term(options.loss, hyper),
        **{need: need in needs for need in ("teacher", "teacher_ce")},
    }
    return {word for word, true in holds.items() if true}


@lru_cache(maxsize=64)
def exchanged_places(stage: str, options: Options, labels: bool) -> list[int]:
    """Return the places of a stage's numbers that pieces exchange."""
    conditions = {"statistics": STATISTICS, "sums": SUMS}.get(stage)
    if conditions is None:
        return list(range(FIELDS[stage]))
    holding = _holding(options, labels)
    return [place for place, words in enumerate(conditions.values()) if holding.issuperset(words.split())]


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
    exchanged = {each: exchanged_places(each, options, labels is not None) for each in STAGES}
    earlier = StageResults(*(_spread(each, name, exchanged) for name, each in earlier._asdict().items()))
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
        places = [[*STATISTICS].index(name) for name in ("v_sum", "v_target")]
        raise row_error(earlier.statistics[:, places].sum((0, 1))[:, None], bad_row, num_classes, -1)
    if last:
        return parts.T.to(dtype), gradient
    return out[exchanged[stage]]


def _spread(exchanged: Tensor | None, stage: str, places: dict[str, list[int]]) -> Tensor | None:
    """Return what the pieces exchanged of a stage with all of its fields; the others are 0."""
    if exchanged is None or len(places[stage]) == FIELDS[stage]:
        return exchanged
    out = exchanged.new_zeros(len(exchanged), FIELDS[stage], exchanged.shape[2])
    out[:, places[stage]] = exchanged
    return out
