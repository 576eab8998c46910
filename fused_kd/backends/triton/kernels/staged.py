"""The row losses in stages: each program has a piece of a row's classes. :mod:`fused_kd.backends.staged` has the
stages, :mod:`.rows`, :mod:`.pointwise` and :mod:`.losses` the work of each, and :mod:`.on_chip` the constexpr
arguments. Further ones are

PIECES  a power of two, at least the number of pieces: their results are merged like the lanes of a program
LANES   threads of a program, each with WIDTH classes of a tile

A program walks the piece of one row. ``target`` has the class of every row, and ``labels`` the probabilities of the
piece's classes. Results of pieces are (pieces, fields, rows).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.losses import coefficients
from fused_kd.backends.triton.kernels.on_chip import all_weights, store_parts
from fused_kd.backends.triton.kernels.pieces import (
    OF_TARGET,
    OF_TEACHER,
    merged_piece_sums,
    merged_scales,
    merged_statistics,
    store_moments,
)
from fused_kd.backends.triton.kernels.pointwise import merge_sums, no_sums, row_softmaxes, scaled_slopes
from fused_kd.backends.triton.kernels.rows import (
    POINTWISE,
    TEACHER,
    at,
    empty_statistics,
    kernel,
    load_factor,
    load_index,
    merge_lanes,
    narrowed,
    scaled_by,
    store_fields,
)
from fused_kd.backends.triton.kernels.tiles import (
    accumulate_tile,
    gradient_tile,
    lane_columns,
    row_moments,
    sum_tile,
)
from fused_kd.backends.triton.kernels.values import Constants, Inputs, Softmaxes, Tile


class _Own(NamedTuple):
    """What a program has: a row, (1,), and the columns of the piece."""

    row: tl.tensor
    y: tl.tensor  # the row's target, relative to the piece's first column; it may be outside the piece
    counted: tl.tensor
    valid: tl.tensor  # 1, or NaN for an index out of range
    end: tl.tensor  # the number of columns, 0 if the row does not count
    lane: tl.tensor  # the columns of a tile, (lanes, classes)


@triton.jit
def _own(
    target, factors, rows, classes, first_class, num_classes, ignore_index,
    LANES: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, PROB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    y, counted, valid = load_index(target, row, row < rows, 1, ignore_index, num_classes)
    if PROB:
        counted = row < rows
    if factors is not None:
        counted &= load_factor(factors, 0, rows, row, counted, ACC) != 0.0
    lane_start, width = lane_columns(tl.arange(0, LANES), LANES, WIDTH, VEC)
    end = classes * tl.max(counted.to(tl.int32), 0)
    return _Own(row, y - first_class, counted, valid, end, lane_start[:, None] + width)


@triton.jit
def _row_of(matrix, stride, VEC: tl.constexpr):
    return matrix + tl.program_id(0).to(tl.int64) * (stride // VEC * VEC)


@triton.jit
def _tile(own, start):
    cols = start + own.lane
    return Tile(cols, cols < own.end, cols == own.y[:, None], True)


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
    own = _own(target, factors, rows, classes, first_class, num_classes, ignore_index, LANES, WIDTH, VEC, PROB, ACC)
    s, t = _row_of(student, student_row, VEC), _row_of(teacher, teacher_row, VEC)
    lane, end = own.lane, own.end
    s_moments = row_moments(s, student_col, 0, lane, lane < 0, lane, end, LANES, WIDTH, UNIT, False, ACC)
    t_moments = row_moments(t, teacher_col, 0, lane, lane < 0, lane, end, LANES, WIDTH, UNIT, False, ACC)
    store_moments(out, 0, rows, own.row, s_moments)
    store_moments(out, OF_TEACHER, rows, own.row, t_moments)


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
    VARIANT: tl.constexpr,
):
    """Compute the :class:`.values.Statistics` of the piece, and the target's logits and probability, 0 if the target is
    in another piece."""
    classes = classes // VEC * VEC
    temperature = tl.full((), temperature, ACC)
    own = _own(
        target, factors, rows, classes, first_class, num_classes, ignore_index, LANES, WIDTH, VEC, VARIANT.PROB, ACC
    )
    row, y = own.row, own.y
    bases = (_row_of(student, student_row, VEC), _row_of(teacher, teacher_row, VEC), _row_of(labels, labels_row, VEC))
    inputs = Inputs(bases, (student_col, teacher_col, labels_col), labels, classes)
    scales, _s_moments = merged_scales(moments, pieces, rows, row, temperature, VARIANT, PIECES, ACC)
    stats = empty_statistics(LANES, ACC)
    for start in range(0, own.end, LANES * WIDTH):
        stats = accumulate_tile(stats, inputs, _tile(own, start), scales, VARIANT, True, ACC)
    merged = merge_lanes(stats, scales, VARIANT)
    store_fields(out, merged, rows, row, None)
    here = (y >= 0) & (y < own.end)
    s_y = tl.load(at(bases[0], y, student_col, VARIANT.UNIT), mask=here, other=0.0).to(ACC)
    t_y = tl.zeros([1], ACC)
    if TEACHER & VARIANT.LOSS:
        t_y = tl.load(at(bases[1], y, teacher_col, VARIANT.UNIT), mask=here, other=0.0).to(ACC)
    v_y = tl.zeros([1], ACC)
    if VARIANT.PROB:
        v_y = tl.load(at(bases[2], y, labels_col, VARIANT.UNIT), mask=here, other=0.0).to(ACC)
    store_fields(out + rows * OF_TARGET, (s_y, t_y, v_y), rows, row, None)


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
    VARIANT: tl.constexpr,
):
    """Compute the :class:`.values.PointwiseSums` of the piece."""
    classes = classes // VEC * VEC
    temperature = tl.full((), temperature, ACC)
    own = _own(
        target, factors, rows, classes, first_class, num_classes, ignore_index, LANES, WIDTH, VEC, VARIANT.PROB, ACC
    )
    row, counted = own.row, own.counted
    bases = (_row_of(student, student_row, VEC), _row_of(teacher, teacher_row, VEC), student)
    inputs = Inputs(bases, (student_col, teacher_col, student_col), statistics, classes)
    scales, _s_moments = merged_scales(moments, pieces, rows, row, temperature, VARIANT, PIECES, ACC)
    stats, s_y, t_y, _v_y = merged_statistics(statistics, pieces, rows, row, scales, VARIANT, PIECES)
    of_rows = row_softmaxes(stats, s_y, t_y, statistics, rows, row, counted, scales, VARIANT)
    constants = Constants(tl.full((), first, ACC), 1.0 / num_classes.to(ACC))
    softmaxes = Softmaxes(stats, scales, of_rows, constants)
    sums = no_sums(LANES, ACC)
    for start in range(0, own.end, LANES * WIDTH):
        sums = sum_tile(sums, inputs, _tile(own, start), softmaxes, VARIANT, True, ACC)
    store_fields(out, merge_sums(sums), rows, row, None)


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
    VARIANT: tl.constexpr,
):
    """Compute the row's parts, the same on every piece, and the gradient of the piece's columns."""
    classes = classes // VEC * VEC
    weights = all_weights(first, second, temperature, ce_weight, smoothing, ACC)
    own = _own(
        target, factors, rows, classes, first_class, num_classes, ignore_index, LANES, WIDTH, VEC, VARIANT.PROB, ACC
    )
    row, counted, valid = own.row, own.counted, own.valid
    bases = (_row_of(student, student_row, VEC), _row_of(teacher, teacher_row, VEC), _row_of(labels, labels_row, VEC))
    inputs = Inputs(bases, (student_col, teacher_col, labels_col), labels, classes)
    scales, s_moments = merged_scales(moments, pieces, rows, row, weights.temperature, VARIANT, PIECES, ACC)
    stats, s_y, t_y, v_y = merged_statistics(statistics, pieces, rows, row, scales, VARIANT, PIECES)
    if VARIANT.PROB:
        valid = 1.0 + 0.0 * (stats.v_sum + v_y)
    all_sums, of_rows, constants = stats, stats, stats
    if POINTWISE & VARIANT.LOSS:
        of_rows = row_softmaxes(stats, s_y, t_y, statistics, rows, row, counted, scales, VARIANT)
        constants = Constants(weights.first, 1.0 / num_classes.to(ACC))
        all_sums = merged_piece_sums(sums, pieces, rows, row, PIECES)
    part_y, part_rest, part_ce, gradient_of, more = coefficients(
        stats, all_sums, tl.zeros([1], ACC), None, s_y, t_y, v_y, weights, scales, s_moments, num_classes, VARIANT
    )
    of_loss = valid
    of_gradient = valid
    if factors is not None:
        of_loss *= load_factor(factors, 0, rows, row, counted, ACC)
        of_gradient *= load_factor(factors, 1, rows, row, counted, ACC)
    store_parts(parts, parts, parts, 0.0, rows, row, row < rows, counted, of_loss, part_y, part_rest, part_ce, False)
    by = of_gradient * tl.full((), scale, ACC)
    scaled = scaled_by(gradient_of, by)
    if POINTWISE & VARIANT.LOSS:
        more = scaled_slopes(more, by, VARIANT)
    out = gradient + tl.program_id(0).to(tl.int64) * classes
    dtype = gradient.dtype.element_ty
    softmaxes = Softmaxes(stats, scales, of_rows, constants)
    for start in range(0, own.end, LANES * WIDTH):
        tile = _tile(own, start)
        g = gradient_tile(inputs, tile, softmaxes, scaled, more, VARIANT, True, ACC)
        tl.store(out + tile.offsets, narrowed(g, dtype), mask=tile.inside)
    for start in range(0, tl.where(own.end > 0, 0, classes), LANES * WIDTH):
        cols = start + own.lane
        tl.store(out + cols, tl.zeros_like(cols).to(dtype), mask=cols < classes)
