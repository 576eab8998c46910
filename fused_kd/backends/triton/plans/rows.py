"""The plan of the row losses: counting rows, DIST's columns, the row kernel, and the reduction of its parts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd.backends.triton import layout
from fused_kd.backends.triton.launch import Launch, acc_types, planned
from fused_kd.backends.triton.plans import common
from fused_kd.backends.triton.plans.dist import plan_columns
from fused_kd.core.catalogue import NUMBERS, ROW_LOSSES, has_column_term
from fused_kd.core.options import HyperParameters, Options, outputs
from fused_kd.reference import accumulation_dtype


def row_loss(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    factors: Tensor | None,
    column_factor: Tensor | None,
    options: Options,
) -> tuple[Tensor, ...]:
    other = student if teacher is None else teacher  # not read if the loss has no teacher
    dtype = accumulation_dtype(student, other)
    made = outputs(student, options.wanted[0], 3, options.reduction, dtype, padding=options.padding)
    common.filled("row_loss", plan_row_loss, (student, other, target, factors, column_factor), made, options)
    common.zero_padding(made[2], options)
    return made


def kernel_weights(loss_name: str, hyper: HyperParameters, classes: int) -> tuple[float, ...]:
    """Return the weights for :mod:`.kernels.losses`: two of the loss's own, and the common ones. If it has one, the
    second is 1 minus that, of which the kernel's float32 would lose digits."""
    given = [getattr(hyper, name) for name in ROW_LOSSES[loss_name].own]
    if len(given) == 1:
        given.append(1.0 - given[0])
    first, second = given + [0.0] * (2 - len(given))
    temperature, ce_weight, smoothing = hyper.temperature, hyper.ce_weight, hyper.label_smoothing
    if loss_name == "tf_kd":
        rest = classes - 1
        gap = (first - (1.0 - first) / rest) / temperature
        log_others = -(max(gap, 0.0) + math.log(math.exp(gap - max(gap, 0.0)) + rest * math.exp(-max(gap, 0.0))))
        others, own = math.exp(log_others), math.exp(log_others + gap)
        return others, own, rest * others * log_others + own * (log_others + gap), ce_weight, smoothing
    return first, second, temperature, ce_weight, smoothing


class Variant(NamedTuple):
    """The kernels' argument VARIANT; :mod:`.kernels.on_chip` describes the fields."""

    UNIT: bool
    LOSS: int
    SINGLE: bool
    PROB: bool
    STD: bool
    LINEAR: bool
    RAW: bool
    COLUMNS: bool


def variant(options: Options, unit: bool, probabilities: bool) -> Variant:
    """Return the variant of a loss, as row_needs and one_temperature of csrc."""
    hyper, standardize = options.hyper, options.standardize
    needs, ce = ROW_LOSSES[options.loss].needs, hyper.ce_weight != 0.0
    sharp_distilled = "sharp" in needs
    single = (
        "at_one" in needs
        or not (sharp_distilled or ce)
        or (hyper.temperature == 1.0 and (not standardize or (sharp_distilled and not ce)))
    )
    linear = "linear" in needs or (ce and hyper.label_smoothing != 0.0)
    raw = standardize and sharp_distilled and ce
    columns = has_column_term(options.loss, hyper)
    return Variant(unit, NUMBERS[options.loss], single, probabilities, standardize, linear, raw, columns)


def plan_row_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    factors: Tensor | None,
    column_factor: Tensor | None,
    made: tuple[Tensor, ...],
    options: Options,
) -> list[Launch]:
    """Plan the launches that fill ``made``, in order."""
    loss, parts, gradient, norm = made
    hyper, ignore_index, reduction, (need_gradient,), (gradient_scale,), loss_name, standardize, *_ = options
    (rows, classes), width = student.shape, student.shape[1] + options.padding
    probabilities = target.is_floating_point()
    per_row = reduction == "none"
    half, known = common.divided(target, reduction, student.dtype)
    target_row, target_col = common.target_strides(target)
    launches: list[Launch] = []
    counts = common.plan_count(launches, target, ignore_index, reduction, need_gradient)
    row_parts = parts if per_row else torch.empty((3, rows), dtype=loss.dtype, device=student.device)
    narrow = min(t.element_size() for t in (student, teacher, target) if t.is_floating_point())
    row_strides = [width, student.stride(0), teacher.stride(0), *([target_row] if probabilities else [])]
    unit = common.neighbours(target, (student, teacher))
    seen = variant(options, unit, probabilities)
    vector = 16 // narrow if unit else 1
    # If rows start at the same place modulo a vector, all can be walked in vectors from the same column on.
    together = unit and all((stride - width) % vector == 0 for stride in row_strides)
    config = layout.row_config(
        classes,
        narrow,
        wide=loss.dtype == torch.float64,
        probabilities=probabilities,
        unit_temperature=seen.SINGLE,
        neighbours=unit,
        vectors=together,
        mixed=student.dtype != teacher.dtype,
        loss=loss_name,
        scores=standardize,
        smoothed=hyper.ce_weight != 0.0 and hyper.label_smoothing != 0.0,
    )
    # The column term's numbers are the same for every row. If the logits' rows are aligned too, they need no edges.
    edges = isinstance(config, layout.Looped) and together
    columns: tuple[Tensor, Tensor, Tensor] | None = None
    if seen.COLUMNS:
        edges = edges and (classes % vector != 0 or width % vector != 0)
        given = student, teacher, target, factors, column_factor
        columns = plan_columns(launches, *given, loss.dtype, options, 4 if edges else 1)
    meta = {
        "ACC": acc_types()[loss.dtype],
        "VARIANT": seen,
        "GRAD": need_gradient,
        "COUNT": counts.how if need_gradient else 0,
        "HALF": half,
        "PER_ROW": per_row,
        **layout.options_of(config),
    }
    if isinstance(config, layout.OnChip):
        kernel, programs = "rows_on_chip", -(-rows // config.rows)
        meta["VEC"] = math.gcd(vector, classes, *row_strides)
    else:
        kernel, programs = "rows_looped", rows
        meta |= {"VEC": vector if together else 1, "EDGES": edges}
    arguments = (
        student, teacher, target, gradient, loss, row_parts, norm, counts.source, factors,
        *(columns or (loss, loss, loss)), rows, classes, options.padding or None,
        *student.stride(), *teacher.stride(), target_row, target_col,
        counts.items, columns[2].shape[0] if columns else 0, ignore_index,
        *kernel_weights(loss_name, hyper, classes), gradient_scale * known, 1.0 / gradient_scale,
    )  # fmt: skip
    launches.append(planned(kernel, programs, arguments, meta))

    if not per_row:
        finish = (loss, (norm, norm), (1.0 / gradient_scale,) * 2, (half, half))
        common.plan_reduction(launches, row_parts, parts, counts, ignore_index, reduction, finish)
    return launches
