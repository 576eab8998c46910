# mypy: ignore-errors
# Triton compiles these functions; to a type checker they are not Python.
"""The row losses in stages: each program has a piece of a row's classes. :mod:`fused_kd.backends.staged` has the
stages, :mod:`.rows`, :mod:`.pointwise` and :mod:`.losses` the work of each, and :mod:`.on_chip` the constexpr
arguments. Further ones are

PIECES  a power of two, at least the number of pieces: their results are merged like the lanes of a program
LANES   threads of a program, each with WIDTH classes of a tile

A program walks the piece of one row. ``target`` has the class of every row, and ``labels`` the probabilities of the
piece's classes. Results of pieces are (pieces, fields, rows).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.losses import coefficients
from fused_kd.backends.triton.kernels.on_chip import all_weights, at, store_parts
from fused_kd.backends.triton.kernels.pieces import (
    OF_TARGET,
    OF_TEACHER,
    SUMS,
    merged_piece_sums,
    merged_scales,
    merged_statistics,
    store_moments,
)
from fused_kd.backends.triton.kernels.pointwise import merge_sums, no_sums, scaled_slopes, softmaxes
from fused_kd.backends.triton.kernels.rows import (
    POINTWISE,
    TEACHER,
    empty_statistics,
    kernel,
    load_factor,
    load_index,
    merge_lanes,
    narrowed,
    scaled_by,
)
from fused_kd.backends.triton.kernels.tiles import (
    accumulate_others,
    gradient_tile,
    lane_columns,
    load_tiles,
    row_moments,
    sum_tile,
)
from fused_kd.backends.triton.kernels.values import Constants


@triton.jit
def _of_row(row, target, factors, rows, ignore_index, first_class, num_classes, PROB: tl.constexpr, ACC: tl.constexpr):
    """Return, for a row, (1,): its target relative to the piece's first column (it may be outside the piece), whether
    the row counts, and 1, or NaN for an index out of range."""
    y, counted, valid = load_index(target, row, row < rows, 1, ignore_index, num_classes)
    if PROB:
        counted = row < rows
    if factors is not None:
        counted &= load_factor(factors, 0, rows, row, counted, ACC) != 0.0
    return y - first_class, counted, valid


@kernel
def piece_moments(
    student,
    teacher,
    target,
    factors,
    out,
    rows: tl.int64,
    classes: tl.int32,
    first_class: tl.int32,
    num_classes: tl.int32,
    student_row: tl.int64,
    student_col: tl.int64,
    teacher_row: tl.int64,
    teacher_col: tl.int64,
    ignore_index: tl.int64,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
    PROB: tl.constexpr,
):
    """Compute number, mean and sum of squares about it, of the student's logits and the teacher's."""
    classes = classes // VEC * VEC
    program = tl.program_id(0).to(tl.int64)
    row = program + tl.arange(0, 1)
    _y, counted, _valid = _of_row(row, target, factors, rows, ignore_index, first_class, num_classes, PROB, ACC)
    end = classes * tl.max(counted.to(tl.int32), 0)
    lane_start, width = lane_columns(tl.arange(0, LANES), LANES, WIDTH, VEC)
    lane = lane_start[:, None] + width
    s = student + program * (student_row // VEC * VEC)
    t = teacher + program * (teacher_row // VEC * VEC)
    s_moments = row_moments(s, student_col, 0, lane, lane < 0, lane, end, LANES, WIDTH, UNIT, False, ACC)
    t_moments = row_moments(t, teacher_col, 0, lane, lane < 0, lane, end, LANES, WIDTH, UNIT, False, ACC)
    store_moments(out, 0, rows, row, s_moments)
    store_moments(out, OF_TEACHER, rows, row, t_moments)


@kernel
def piece_statistics(
    student,
    teacher,
    labels,
    target,
    factors,
    moments,
    out,
    rows: tl.int64,
    classes: tl.int32,
    pieces: tl.int32,
    first_class: tl.int32,
    num_classes: tl.int32,
    student_row: tl.int64,
    student_col: tl.int64,
    teacher_row: tl.int64,
    teacher_col: tl.int64,
    labels_row: tl.int64,
    labels_col: tl.int64,
    ignore_index: tl.int64,
    temperature: tl.float64,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    PIECES: tl.constexpr,
    UNIT: tl.constexpr,
    LOSS: tl.constexpr,
    SINGLE: tl.constexpr,
    PROB: tl.constexpr,
    STD: tl.constexpr,
    LINEAR: tl.constexpr,
    RAW: tl.constexpr,
):
    """Compute the :class:`.values.Statistics` of the piece, and the target's logits and probability, 0 if the target is
    in another piece."""
    classes = classes // VEC * VEC
    temperature = tl.full((), temperature, ACC)
    program = tl.program_id(0).to(tl.int64)
    row = program + tl.arange(0, 1)
    y, counted, _valid = _of_row(row, target, factors, rows, ignore_index, first_class, num_classes, PROB, ACC)
    end = classes * tl.max(counted.to(tl.int32), 0)
    bases = (
        student + program * (student_row // VEC * VEC),
        teacher + program * (teacher_row // VEC * VEC),
        labels + program * (labels_row // VEC * VEC),
    )
    strides = (student_col, teacher_col, labels_col)
    scales, _s_moments = merged_scales(moments, pieces, rows, row, temperature, PIECES, LOSS, STD, ACC)
    lane_start, width = lane_columns(tl.arange(0, LANES), LANES, WIDTH, VEC)
    lane = lane_start[:, None] + width
    stats = empty_statistics(LANES, ACC)
    for start in range(0, end, LANES * WIDTH):
        cols = start + lane
        s, t, v = load_tiles(bases, strides, cols, cols < end, True, UNIT, LOSS, PROB, False, ACC)
        stats = accumulate_others(
            stats, s, t, v, cols == y[:, None], cols < end, scales, LOSS, SINGLE, PROB, STD, LINEAR, RAW
        )
    merged = merge_lanes(stats, scales, LOSS, SINGLE)
    for field in tl.static_range(OF_TARGET):
        tl.store(out + field * rows + row, merged[field])
    here = (y >= 0) & (y < end)
    s_y = tl.load(at(bases[0], y, student_col, UNIT), mask=here, other=0.0).to(ACC)
    tl.store(out + rows * OF_TARGET + row, s_y)
    t_y = tl.zeros([1], ACC)
    if TEACHER & LOSS:
        t_y = tl.load(at(bases[1], y, teacher_col, UNIT), mask=here, other=0.0).to(ACC)
    tl.store(out + rows * (OF_TARGET + 1) + row, t_y)
    v_y = tl.zeros([1], ACC)
    if PROB:
        v_y = tl.load(at(bases[2], y, labels_col, UNIT), mask=here, other=0.0).to(ACC)
    tl.store(out + rows * (OF_TARGET + 2) + row, v_y)


@kernel
def piece_sums(
    student,
    teacher,
    target,
    factors,
    moments,
    statistics,
    out,
    rows: tl.int64,
    classes: tl.int32,
    pieces: tl.int32,
    first_class: tl.int32,
    num_classes: tl.int32,
    student_row: tl.int64,
    student_col: tl.int64,
    teacher_row: tl.int64,
    teacher_col: tl.int64,
    ignore_index: tl.int64,
    first: tl.float64,
    temperature: tl.float64,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    PIECES: tl.constexpr,
    UNIT: tl.constexpr,
    LOSS: tl.constexpr,
    SINGLE: tl.constexpr,
    PROB: tl.constexpr,
    STD: tl.constexpr,
):
    """Compute the :class:`.values.PointwiseSums` of the piece."""
    classes = classes // VEC * VEC
    temperature = tl.full((), temperature, ACC)
    program = tl.program_id(0).to(tl.int64)
    row = program + tl.arange(0, 1)
    y, counted, _valid = _of_row(row, target, factors, rows, ignore_index, first_class, num_classes, PROB, ACC)
    end = classes * tl.max(counted.to(tl.int32), 0)
    bases = (student + program * (student_row // VEC * VEC), teacher + program * (teacher_row // VEC * VEC), student)
    strides = (student_col, teacher_col, student_col)
    scales, _s_moments = merged_scales(moments, pieces, rows, row, temperature, PIECES, LOSS, STD, ACC)
    stats, s_y, t_y, _v_y = merged_statistics(statistics, pieces, rows, row, scales, PIECES, LOSS, SINGLE)
    of_rows = softmaxes(stats, s_y, t_y, statistics, rows, row, counted, scales, False)
    constants = Constants(tl.full((), first, ACC), 1.0 / num_classes.to(ACC))
    lane_start, width = lane_columns(tl.arange(0, LANES), LANES, WIDTH, VEC)
    lane = lane_start[:, None] + width
    sums = no_sums(LANES, ACC)
    for start in range(0, end, LANES * WIDTH):
        cols = start + lane
        sums = sum_tile(
            sums, bases, strides, cols, cols < end, cols == y[:, None], statistics, classes, stats, of_rows, constants,
            scales, True, UNIT, LOSS, STD, False, ACC,
        )  # fmt: skip
    sums = merge_sums(sums)
    for field in tl.static_range(SUMS):
        tl.store(out + field * rows + row, sums[field])


@kernel
def piece_gradient(
    student,
    teacher,
    labels,
    target,
    factors,
    moments,
    statistics,
    sums,
    gradient,
    parts,
    rows: tl.int64,
    classes: tl.int32,
    pieces: tl.int32,
    first_class: tl.int32,
    num_classes: tl.int32,
    student_row: tl.int64,
    student_col: tl.int64,
    teacher_row: tl.int64,
    teacher_col: tl.int64,
    labels_row: tl.int64,
    labels_col: tl.int64,
    ignore_index: tl.int64,
    first: tl.float64,
    second: tl.float64,
    temperature: tl.float64,
    ce_weight: tl.float64,
    smoothing: tl.float64,
    scale: tl.float64,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    PIECES: tl.constexpr,
    UNIT: tl.constexpr,
    LOSS: tl.constexpr,
    SINGLE: tl.constexpr,
    PROB: tl.constexpr,
    STD: tl.constexpr,
    LINEAR: tl.constexpr,
    RAW: tl.constexpr,
):
    """Compute the row's parts, the same on every piece, and the gradient of the piece's columns."""
    classes = classes // VEC * VEC
    weights = all_weights(first, second, temperature, ce_weight, smoothing, ACC)
    program = tl.program_id(0).to(tl.int64)
    row = program + tl.arange(0, 1)
    y, counted, valid = _of_row(row, target, factors, rows, ignore_index, first_class, num_classes, PROB, ACC)
    read = tl.max(counted.to(tl.int32), 0)
    end = classes * read
    bases = (
        student + program * (student_row // VEC * VEC),
        teacher + program * (teacher_row // VEC * VEC),
        labels + program * (labels_row // VEC * VEC),
    )
    strides = (student_col, teacher_col, labels_col)
    scales, s_moments = merged_scales(moments, pieces, rows, row, weights.temperature, PIECES, LOSS, STD, ACC)
    stats, s_y, t_y, v_y = merged_statistics(statistics, pieces, rows, row, scales, PIECES, LOSS, SINGLE)
    if PROB:
        valid = 1.0 + 0.0 * (stats.v_sum + v_y)
    all_sums, of_rows, constants = stats, stats, stats
    if POINTWISE & LOSS:
        of_rows = softmaxes(stats, s_y, t_y, statistics, rows, row, counted, scales, False)
        constants = Constants(weights.first, 1.0 / num_classes.to(ACC))
        all_sums = merged_piece_sums(sums, pieces, rows, row, PIECES)
    part_y, part_rest, part_ce, gradient_of, more = coefficients(
        stats, all_sums, tl.zeros([1], ACC), None, s_y, t_y, v_y, weights, scales, s_moments, num_classes,
        LOSS, SINGLE, PROB, STD, LINEAR, RAW,
    )  # fmt: skip
    of_loss = valid
    of_gradient = valid
    if factors is not None:
        of_loss *= load_factor(factors, 0, rows, row, counted, ACC)
        of_gradient *= load_factor(factors, 1, rows, row, counted, ACC)
    store_parts(parts, parts, parts, 0.0, rows, row, row < rows, counted, of_loss, part_y, part_rest, part_ce, False)
    by = of_gradient * tl.full((), scale, ACC)
    scaled = scaled_by(gradient_of, by)
    if POINTWISE & LOSS:
        more = scaled_slopes(more, by)
    out = gradient + program * classes
    dtype = gradient.dtype.element_ty
    lane_start, width = lane_columns(tl.arange(0, LANES), LANES, WIDTH, VEC)
    lane = lane_start[:, None] + width
    for start in range(0, end, LANES * WIDTH):
        cols = start + lane
        g = gradient_tile(
            bases, strides, cols, cols < end, cols == y[:, None], True, statistics, classes, stats, scaled, of_rows,
            constants, more, scales, True, UNIT, LOSS, SINGLE, PROB, STD, LINEAR, RAW, False, ACC,
        )  # fmt: skip
        tl.store(out + cols, narrowed(g, dtype), mask=cols < end)
    for start in range(0, tl.where(read == 1, 0, classes), LANES * WIDTH):
        tl.store(out + (start + lane), tl.zeros_like(lane).to(dtype), mask=start + lane < classes)
