"""USKD by Triton: plans of its launches. :mod:`fused_kd.backends.triton` runs them, and imports this when asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_kd.backends.triton import layout, replay
from fused_kd.backends.triton.launch import Launch, planned
from fused_kd.backends.triton.plans import common
from fused_kd.core.options import Options, pair_outputs
from fused_kd.reference import accumulation_dtype

#: Where PyTorch sorts, so many keys at once: a key takes some fifty bytes of memory while it is sorted.
SORTED_AT_ONCE = 1 << 24
#: Up to so many rows every program that ranks adds up what couples them, which saves a launch: by then it is a fiftieth
#: of its instructions.
BATCH_ROWS = 1024
#: Places of the order that a program of write_zipf does.
ZIPF_BLOCK = 1024


def uskd_batch_sums(student: Tensor, target: Tensor, square: bool, ignore_index: int) -> Tensor:
    sums = torch.empty(3, dtype=torch.float64, device=student.device)
    if student.shape[0] == 0:
        return sums.zero_()
    replay.run(
        "uskd_batch_sums",
        (student, target),
        (sums,),
        (square, ignore_index),
        lambda: plan_batch_sums(student, target, sums, square, ignore_index),
    )
    return sums


def uskd(
    student: Tensor, weak: Tensor, target: Tensor, batch_sums: Tensor | None, factors: Tensor | None, options: Options
) -> tuple[Tensor, ...]:
    """``batch_sums`` are those of other rows too; None says that these are all."""
    made = pair_outputs(student, weak, options.wanted, 4, options.reduction, accumulation_dtype(student, weak))
    return common.filled("uskd", plan_uskd, (student, weak, target, batch_sums, factors), made, options)


def plan_batch_sums(student: Tensor, target: Tensor, sums: Tensor, square: bool, ignore_index: int) -> list[Launch]:
    """The launches that fill ``sums`` (3,)."""
    launches: list[Launch] = []
    row_sums = _plan_row_sums(launches, student, target, accumulation_dtype(student), square, ignore_index)
    common.plan_reduction(launches, row_sums, sums, None, ignore_index, "sum", None)
    return launches


def _plan_row_sums(
    launches: list[Launch], student: Tensor, target: Tensor, dtype: torch.dtype, square: bool, ignore_index: int
) -> Tensor:
    """What each row adds to the batch's sums, (3, rows), after a launch that is appended."""
    rows, classes = student.shape
    unit = common.neighbours(target, (student,))
    config = layout.streamed_config(classes, wide=dtype == torch.float64, neighbours=unit)
    row_sums = torch.empty((3, rows), dtype=dtype, device=student.device)
    arguments = (
        student, target, row_sums, rows, classes, *student.stride(), *common.target_strides(target), ignore_index,
    )  # fmt: skip
    options = {**common.row_options(target, (student,), dtype, config, unit), "SQUARE": square}
    launches.append(planned("target_probabilities", -(-rows // config.rows), arguments, options))
    return row_sums


def plan_uskd(
    student: Tensor,
    weak: Tensor,
    target: Tensor,
    batch_sums: Tensor | None,
    factors: Tensor | None,
    made: tuple[Tensor, ...],
    options: Options,
) -> list[Launch]:
    """The launches that fill what is ``made``, in order; a sort by PyTorch counts as one."""
    loss, parts, *gradients, student_norm, weak_norm = made
    norms = student_norm, weak_norm
    hyper, ignore_index, reduction, (need_student, need_weak), (student_scale, weak_scale), *_ = options
    rows, classes = student.shape
    ce_weight, smoothing = hyper.ce_weight, hyper.label_smoothing
    per_row = reduction == "none"
    label_strides = common.target_strides(target)
    (half_s, known_s), (half_w, known_w) = (common.divided(target, reduction, each.dtype) for each in (student, weak))
    halves, scales = (half_s, half_w), (student_scale * known_s, weak_scale * known_w)
    linear = ce_weight != 0.0 and smoothing != 0.0
    unit = common.neighbours(target, (student, weak))
    config = layout.uskd_config(
        classes,
        wide=loss.dtype == torch.float64,
        probabilities=target.is_floating_point(),
        neighbours=unit,
        smoothed=linear,
    )
    launches: list[Launch] = []
    by_row = batch_sums is None and rows <= BATCH_ROWS and isinstance(config, layout.OnChip)
    if batch_sums is None:
        row_sums = _plan_row_sums(launches, student, target, loss.dtype, options.square, ignore_index)
        batch_sums = row_sums if by_row else torch.empty(3, dtype=torch.float64, device=student.device)
        if not by_row:
            common.plan_reduction(launches, row_sums, batch_sums, None, ignore_index, "sum", None)
    counts = common.plan_count(launches, target, ignore_index, reduction, need_student or need_weak)
    row_parts = parts if per_row else torch.empty((4, rows), dtype=loss.dtype, device=student.device)
    norm_values = 1.0 / student_scale, 1.0 / weak_scale
    shared = common.row_options(target, (student, weak), loss.dtype, config, unit, linear)
    ranking = {"RANK": options.rank, "SQUARE": options.square}
    strides = (*student.stride(), *weak.stride(), *label_strides)
    # A divisor that is known has its power of two in the scale already.
    half_student, half_weak = (half and counts.how > 0 for half in halves)
    arguments: tuple[Any, ...]
    if isinstance(config, layout.OnChip):
        meta = {
            **shared,
            **ranking,
            "GRAD_S": need_student,
            "GRAD_W": need_weak,
            "HALF_S": half_student,
            "HALF_W": half_weak,
            "PER_ROW": per_row,
            "COUNT": counts.how if need_student or need_weak else 0,
            "BY_ROW": by_row,
        }
        arguments = (
            student, weak, target, batch_sums, *gradients, loss, row_parts, *norms, counts.source, factors,
            rows, classes, *strides, counts.items, ignore_index,
            hyper.alpha, hyper.beta, hyper.mu, ce_weight, smoothing, *scales, *norm_values,
        )  # fmt: skip
        launches.append(planned("ranked_on_chip", -(-rows // config.rows), arguments, meta))
    else:
        device, dtype = student.device, loss.dtype
        at_once = min(rows, max(1, SORTED_AT_ONCE // classes))
        keys, sorted_keys = (torch.empty((at_once, classes), dtype=dtype, device=device) for _ in range(2))
        order = torch.empty((at_once, classes), dtype=torch.int64, device=device)
        states = torch.empty((6, rows), dtype=dtype, device=device)
        columns = torch.empty((2, rows), dtype=torch.int32, device=device)
        write = {
            **shared,
            **ranking,
            "GRAD_W": need_weak,
            "HALF_W": half_weak,
            "COUNT": counts.how if need_weak else 0,
        }
        combine = {
            **shared,
            "GRAD_S": need_student,
            "HALF_S": half_student,
            "PER_ROW": per_row,
            "COUNT": counts.how if need_student else 0,
        }
        for first in range(0, rows, at_once):
            last = min(rows, first + at_once)
            programs, here = -(-(last - first) // config.rows), slice(0, last - first)
            arguments = (
                student, weak, target, batch_sums, gradients[1], row_parts, counts.source, factors, keys, states,
                columns, rows, first, last, classes, *strides, counts.items, ignore_index, hyper.alpha, hyper.mu,
                ce_weight, smoothing, scales[1],
            )  # fmt: skip
            launches.append(planned("write_keys", programs, arguments, write))
            launches.append(Launch("sort_rows", 1, (keys[here], sorted_keys[here], order[here]), {}))
            # The sorted keys have served: their place takes the Zipf weights.
            zipf_options = {"ACC": shared["ACC"], "BLOCK": ZIPF_BLOCK, "num_warps": 4}
            tiles = (last - first) * -(-classes // ZIPF_BLOCK)
            launches.append(planned("write_zipf", tiles, (order, sorted_keys, classes), zipf_options))
            arguments = (
                student, target, gradients[0], loss, row_parts, *norms, counts.source, factors, sorted_keys, states,
                columns, rows, first, last, classes, *student.stride(), *label_strides, counts.items, ignore_index,
                hyper.beta, ce_weight, smoothing, scales[0], *norm_values,
            )  # fmt: skip
            launches.append(planned("combine_ranked", programs, arguments, combine))
    if not per_row:
        finish = (loss, norms, norm_values, halves)
        common.plan_reduction(launches, row_parts, parts, counts, ignore_index, reduction, finish)
    return launches
