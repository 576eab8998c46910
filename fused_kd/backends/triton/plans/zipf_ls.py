"""Zipf's label smoothing by Triton: the plan of its launches. :mod:`fused_kd.backends.triton` runs them, and imports
this when asked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_kd.backends.triton import layout
from fused_kd.backends.triton.launch import Launch, acc_types, planned
from fused_kd.backends.triton.plans import common
from fused_kd.core.options import Options, outputs
from fused_kd.reference import accumulation_dtype


def zipf_ls(
    student: Tensor, dense: Tensor, target: Tensor, factors: Tensor | None, options: Options
) -> tuple[Tensor, ...]:
    made = outputs(student, options.wanted[0], 2, options.reduction, accumulation_dtype(student))
    return common.filled("zipf_ls", plan_zipf_ls, (student, dense, target, factors), made, options)


def plan_zipf_ls(
    student: Tensor,
    dense: Tensor,
    target: Tensor,
    factors: Tensor | None,
    made: tuple[Tensor, ...],
    options: Options,
) -> list[Launch]:
    """The launches that fill what is ``made``, in order."""
    loss, parts, gradient, norm = made
    hyper, ignore_index, reduction, (need_gradient,), (gradient_scale,), *_ = options
    rows, positions, classes = dense.shape
    per_row = reduction == "none"
    half, known = common.divided(target, reduction, student.dtype)
    launches: list[Launch] = []
    counts = common.plan_count(launches, target, ignore_index, reduction, need_gradient)

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=student.device)

    votes, ranks, voted = integers(rows, positions), integers(rows, positions), integers(rows)
    launches.append(_plan_votes(dense, target, votes, ignore_index))
    tile = min(layout.VOTES, max(16, 1 << (positions - 1).bit_length()))
    meta: dict[str, Any] = {"VOTES": tile, "num_warps": max(1, tile * tile // 1024), "maxnreg": 255}
    arguments: tuple[Any, ...] = (votes, integers(rows, positions), ranks, voted, positions)
    launches.append(planned("rank_votes", rows, arguments, meta))

    row_parts = parts if per_row else torch.empty((2, rows), dtype=loss.dtype, device=student.device)
    unit = common.neighbours(target, (student,))
    config = layout.zipf_config(classes, wide=loss.dtype == torch.float64, neighbours=unit)
    linear = hyper.ce_weight != 0.0 and hyper.label_smoothing != 0.0
    meta = common.row_options(target, (student,), loss.dtype, config, unit, linear) | {
        "VOTES": tile,
        "GRAD": need_gradient,
        "COUNT": counts.how if need_gradient else 0,
        "HALF": half,
        "PER_ROW": per_row,
    }
    arguments = (
        student, target, votes, ranks, voted, gradient, loss, row_parts, norm, counts.source, factors,
        rows, positions, classes, *student.stride(), *common.target_strides(target), counts.items, ignore_index,
        hyper.beta, hyper.power, hyper.ce_weight, hyper.label_smoothing, gradient_scale * known, 1.0 / gradient_scale,
    )  # fmt: skip
    launches.append(planned("zipf_rows", -(-rows // config.rows), arguments, meta))
    if not per_row:
        finish = (loss, (norm, norm), (1.0 / gradient_scale,) * 2, (half, half))
        common.plan_reduction(launches, row_parts, parts, counts, ignore_index, reduction, finish)
    return launches


def _plan_votes(dense: Tensor, target: Tensor, votes: Tensor, ignore_index: int) -> Launch:
    """The launch that finds what each position votes for, in the order in which the logits lie."""
    rows, positions, classes = dense.shape
    by_class = dense.stride(2) == 1 or classes == 1
    by_position = not by_class and dense.stride(1) == 1
    config = layout.vote_config(positions, classes, by_position=by_position)
    across, length = (dense.stride(1), classes) if by_class else (dense.stride(2), positions)
    vector = 16 // dense.element_size() if by_class or by_position else 1
    options = {
        "ACC": acc_types()[accumulation_dtype(dense)],
        "VEC": math.gcd(vector, length, dense.stride(0), across),
        "POSITION_UNIT": by_position,
        "CLASS_UNIT": by_class,
        "PROB": target.is_floating_point(),
        **layout.options_of(config),
        "maxnreg": 255,  # left alone the compiler may spill to reach a rounder occupancy
    }
    arguments = (dense, target, votes, positions, classes, *dense.stride(), target.stride(0), ignore_index)
    return planned("find_votes", rows * -(-positions // config.positions), arguments, options)
