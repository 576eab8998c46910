"""The row losses' kernel for rows that fit on chip, and functions that it shares with the kernel of :mod:`.looped`,
which walks its rows twice. :mod:`.rows` has the conventions.

Both kernels have these constexpr arguments:

ACC      dtype of all arithmetic: float32, or float64 if any logits are
VEC      a power of two that divides the class count and every row stride, up to 16 bytes of the narrowest logits. It
         shows the compiler that rows start aligned, and that each vector is fully inside or outside a row
GRAD     the gradient is wanted
COUNT    source of the number of rows that divides the stored gradient: 0 none, 1 the targets, 2 partial counts
HALF     float16 logits: a mean's gradient is also stored times the power of two next to that number
PER_ROW  reduction "none": the loss and norm are final here, and the parts are the op's output
VARIANT  what the steps of a row pass on, a :class:`fused_kd.backends.triton.plans.rows.Variant`:

UNIT     every column stride is 1
LOSS     number of the loss, see :mod:`.losses`
SINGLE   one exponential of each logit serves both softmaxes, the sharp and the soft one
PROB     the target holds probabilities (N, C) instead of indices (N,)
STD      logit standardization: every row has its own scales
LINEAR   the sum of the logits is needed, for label smoothing or Tf-KD
RAW      with STD, the CE needs exponentials that no other term has
COLUMNS  DIST's column term is wanted: ``states`` has its rows' softmaxes, ``columns`` four numbers of each class, and
         ``correlations`` the sums for its part of the loss (:mod:`.columns`)

``factors`` is None if all rows weigh the same, else (2, rows): see fused_kd/ops.py. ``padding`` is None, or how many
columns the gradient has after the classes; the kernels do not write them.

Hyper-parameters are float64, because Triton would round them to float32. No kernel is specialised on them, so another
temperature or gamma compiles nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.constants import LOG2E, NEG_INF
from fused_kd.backends.triton.kernels.losses import coefficients
from fused_kd.backends.triton.kernels.pointwise import (
    add_slopes,
    add_sums,
    column_part,
    load_columns,
    no_sums,
    row_softmaxes,
    scaled_slopes,
)
from fused_kd.backends.triton.kernels.rows import (
    POINTWISE,
    TEACHER,
    accumulate,
    as_scalars,
    at,
    combine,
    count_rows,
    empty_statistics,
    kernel,
    load_factor,
    load_index,
    make_scales,
    narrowed,
    power_of_two_below,
    scaled_by,
    store_fields,
    tile_moments,
)
from fused_kd.backends.triton.kernels.values import Constants, Moments, Softmaxes, Weights

COUNT_BLOCK = tl.constexpr(512)


@triton.jit
def all_weights(first, second, temperature, ce_weight, smoothing, ACC: tl.constexpr):
    return Weights(*as_scalars((first, second, temperature, ce_weight, smoothing), ACC))


@triton.jit
def store_parts(
    parts, loss, norm, norm_value, rows, row, inside, counted, by, target, non_target, ce, PER_ROW: tl.constexpr
):
    """Store the parts of rows times their weight ``by``. Rows that do not count get 0."""
    target = tl.where(counted, target * by, 0.0)
    non_target = tl.where(counted, non_target * by, 0.0)
    ce = tl.where(counted, ce * by, 0.0)
    store_fields(parts, (target, non_target, ce), rows, row, inside)
    if PER_ROW:
        tl.store(loss + row, target + non_target + ce, mask=inside)
        tl.store(norm + row, tl.full(row.shape, norm_value, loss.dtype.element_ty), mask=row == 0)


@triton.jit
def gradient_width(classes, padding, VEC: tl.constexpr):
    """Return the columns of the gradient's rows, padding included."""
    if padding is None:
        return classes
    else:
        return (classes + padding) // VEC * VEC


@triton.jit
def mean_divisor(counts, target_row, count_items, ignore_index, COUNT: tl.constexpr):
    """Return how many rows a mean divides by; 1 where the host has seen to it."""
    if COUNT == 0:
        return tl.full((), 1, tl.int32)
    return tl.maximum(count_rows(counts, target_row, count_items, ignore_index, COUNT == 2, COUNT_BLOCK), 1)


@triton.jit
def gradient_scale(scale, divisor, ACC: tl.constexpr, HALF: tl.constexpr):
    """Return the scale of the stored gradient: the op's power of two over the divisor of a mean.

    HALF also multiplies by the power of two next to that divisor, since a float16 would underflow. ``norm`` undoes
    that.
    """
    scale = tl.full((), scale, ACC)
    if HALF:
        scale *= power_of_two_below(divisor).to(ACC)
    return scale / divisor.to(ACC)


@kernel
def rows_on_chip(
    student,
    teacher,
    target,
    gradient,
    loss,
    parts,
    norm,
    counts,
    factors,
    states,
    columns,
    correlations,
    rows: tl.int64,
    classes: tl.int32,
    padding,
    student_row: tl.int64,
    student_col: tl.int64,
    teacher_row: tl.int64,
    teacher_col: tl.int64,
    target_row: tl.int64,
    target_col: tl.int64,
    count_items: tl.int32,
    correlation_items: tl.int32,
    ignore_index: tl.int64,
    first: tl.float64,
    second: tl.float64,
    temperature: tl.float64,
    ce_weight: tl.float64,
    smoothing: tl.float64,
    scale: tl.float64,
    norm_value: tl.float64,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    VARIANT: tl.constexpr,
    GRAD: tl.constexpr,
    COUNT: tl.constexpr,
    HALF: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """ROWS whole rows per program, BLOCK >= classes: one read of each input and one write of the gradient."""
    weights = all_weights(first, second, temperature, ce_weight, smoothing, ACC)
    k = tl.full((), LOG2E, ACC)
    # n // VEC * VEC is n, and shows the compiler that VEC divides it.
    classes = classes // VEC * VEC
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    cols = tl.arange(0, BLOCK)[None, :]
    width = gradient_width(classes, padding, VEC)
    student_base = student + row * (student_row // VEC * VEC)
    teacher_base = teacher + row * (teacher_row // VEC * VEC)
    if VARIANT.PROB:
        probability_base = target + row * (target_row // VEC * VEC)
        mask = inside[:, None] & (cols < classes)
        v = tl.load(at(probability_base[:, None], cols, target_col, VARIANT.UNIT), mask=mask, other=NEG_INF).to(ACC)
        # The lowest index among the largest. A row of NaN has none, and the index stays in range.
        y = tl.min(tl.where(v == tl.max(v, 1)[:, None], cols, classes - 1), 1)
        v = tl.where(cols < classes, v, 0.0)
        counted = inside
    else:
        y, counted, valid = load_index(target, row, inside, target_row, ignore_index, classes)
        mask = counted[:, None] & (cols < classes)
        v = tl.zeros([ROWS, BLOCK], ACC)
    if factors is not None:
        factor = load_factor(factors, 0, rows, row, inside, ACC)
        counted &= factor != 0.0
        mask &= counted[:, None]
    s = tl.load(at(student_base[:, None], cols, student_col, VARIANT.UNIT), mask=mask, other=NEG_INF).to(ACC)
    s_y = tl.load(at(student_base, y, student_col, VARIANT.UNIT), mask=counted, other=0.0).to(ACC)
    t = s
    t_y = s_y
    if TEACHER & VARIANT.LOSS:
        t = tl.load(at(teacher_base[:, None], cols, teacher_col, VARIANT.UNIT), mask=mask, other=NEG_INF).to(ACC)
        t_y = tl.load(at(teacher_base, y, teacher_col, VARIANT.UNIT), mask=counted, other=0.0).to(ACC)
    s_moments = Moments(s_y, s_y, s_y, s_y)
    t_moments = s_moments
    if VARIANT.STD:
        s_moments = tile_moments(s)
        t_moments = tile_moments(t)
    scales = make_scales(weights.temperature, s_moments, t_moments, k, VARIANT)
    is_target = cols == y[:, None]
    whole_s, whole_t = s, t
    s = tl.where(is_target, NEG_INF, s)
    t = tl.where(is_target, NEG_INF, t)
    if VARIANT.PROB:
        v_y = tl.load(at(probability_base, y, target_col, VARIANT.UNIT), mask=counted, other=0.0).to(ACC)
        v = tl.where(is_target, 0.0, v)
    else:
        v_y = s_y
    present = mask & (cols != y[:, None])
    nothing = empty_statistics(ROWS, ACC)
    stats = accumulate(nothing, s, t, v, present, scales, VARIANT, False)
    if VARIANT.PROB:
        valid = 1.0 + 0.0 * (stats.v_sum + v_y)
    sums = stats
    of_column = tl.zeros([1], ACC)
    if POINTWISE & VARIANT.LOSS:
        of_rows = row_softmaxes(stats, s_y, t_y, states, rows, row, counted, scales, VARIANT)
        of_columns = load_columns(columns, cols, cols < classes, classes, True, VARIANT.COLUMNS)
        # STD needs the target's distance from the mean, and for COLUMNS the target is an ordinary class.
        s_tile = whole_s if VARIANT.STD or VARIANT.COLUMNS else s
        t_tile = whole_t if VARIANT.COLUMNS else t
        softmaxes = Softmaxes(stats, scales, of_rows, Constants(weights.first, 1.0 / classes.to(ACC)))
        sums = add_sums(no_sums(ROWS, ACC), s_tile, t_tile, of_columns, is_target, mask, softmaxes, VARIANT)
    if VARIANT.COLUMNS:
        of_column = column_part(correlations, correlation_items, weights, classes, COUNT_BLOCK, ACC)
    own = None
    if VARIANT.COLUMNS and (factors is not None):  # the columns' numbers already have their factor
        own = load_factor(factors, 1, rows, row, inside, ACC)
    part_y, part_rest, part_ce, gradient_of, more = coefficients(
        stats, sums, of_column, own, s_y, t_y, v_y, weights, scales, s_moments, classes, VARIANT
    )
    of_loss = valid
    of_gradient = valid
    if factors is not None:
        of_loss *= factor
        if not VARIANT.COLUMNS:
            of_gradient *= load_factor(factors, 1, rows, row, inside, ACC)
    store_parts(parts, loss, norm, norm_value, rows, row, inside, counted, of_loss, part_y, part_rest, part_ce, PER_ROW)
    if GRAD:
        divisor = mean_divisor(counts, target_row, count_items, ignore_index, COUNT)
        by = of_gradient * gradient_scale(scale, divisor, ACC, HALF)
        scaled = scaled_by(gradient_of, by)
        g = combine(s, t, v, stats, scaled, scales, VARIANT)
        g = tl.where(is_target, scaled.target[:, None], g)
        if POINTWISE & VARIANT.LOSS:
            more = scaled_slopes(more, by, VARIANT)
            g = add_slopes(g, s_tile, t_tile, of_columns, is_target, softmaxes, more, VARIANT)
        g = tl.where(counted[:, None], g, 0.0)
        pointers = gradient + (row * width)[:, None] + cols
        tl.store(pointers, narrowed(g, gradient.dtype.element_ty), mask=inside[:, None] & (cols < classes))
