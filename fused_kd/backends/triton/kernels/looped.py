"""The row losses' kernel for rows that are too long for the chip. :mod:`.on_chip` has its constexpr arguments,
:mod:`.rows` the conventions, :mod:`.tiles` the work on a part of a row."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.constants import LOG2E, NEG_INF, NO_CLASS
from fused_kd.backends.triton.kernels.losses import coefficients
from fused_kd.backends.triton.kernels.on_chip import (
    all_weights,
    gradient_scale,
    gradient_width,
    mean_divisor,
    store_parts,
)
from fused_kd.backends.triton.kernels.pointwise import (
    aligned_columns,
    column_part,
    merge_sums,
    no_sums,
    row_softmaxes,
    scaled_slopes,
)
from fused_kd.backends.triton.kernels.rows import (
    POINTWISE,
    TEACHER,
    at,
    empty_statistics,
    kernel,
    load_factor,
    load_index,
    make_scales,
    merge_lanes,
    narrowed,
    scaled_by,
)
from fused_kd.backends.triton.kernels.tiles import (
    accumulate_tile,
    gradient_tile,
    keep_largest,
    lane_columns,
    load_part,
    row_moments,
    sum_tile,
)
from fused_kd.backends.triton.kernels.values import Constants, Inputs, Moments, Softmaxes, Tile


@triton.jit
def _tile(start, lane, width, y_lane, inside, target_here):
    return Tile(start + lane, inside, width == (y_lane - start)[:, None], target_here)


@kernel
def rows_looped(
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
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    EDGES: tl.constexpr,
    VARIANT: tl.constexpr,
    GRAD: tl.constexpr,
    COUNT: tl.constexpr,
    HALF: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """One row per program, walked in tiles of LANES x WIDTH, WIDTH classes per lane.

    Rows of an odd length start anywhere. So positions count from ``head``, the first column with an address that is a
    multiple of ALIGN elements, a cache line: then no load touches more lines than it must. The body has whole tiles,
    loaded in full vectors without a mask. Each vector of the tail is fully inside or outside the row: neighbours with
    separate masks would be loaded one by one, and their sector as often. The columns before head (negative positions)
    and the fewer than VEC columns after the tail form one tile, the edges, with one column per lane. Here VEC divides
    the difference of each row stride and the gradient's, so that one head serves every tensor. The second walk runs
    backward, because the cache still holds the row's end.
    """
    BLOCK: tl.constexpr = LANES * WIDTH
    weights = all_weights(first, second, temperature, ce_weight, smoothing, ACC)
    k = tl.full((), LOG2E, ACC)
    row = tl.program_id(0).to(tl.int64)
    one_row = row + tl.arange(0, 1)
    inside = one_row < rows
    # Without EDGES every row starts with a vector, or VEC is 1. Then positions are columns.
    LINE: tl.constexpr = 8 * VEC if 16 * VEC <= LANES else LANES // 2
    ALIGN: tl.constexpr = LINE if EDGES else 1
    gradient_row = row * gradient_width(classes, padding, 1)
    head = (ALIGN - gradient_row % ALIGN) % ALIGN
    student_head = student + (row * student_row + head) // VEC * VEC
    teacher_head = teacher + (row * teacher_row + head) // VEC * VEC
    before = head.to(tl.int32)
    of_classes = columns
    if VARIANT.COLUMNS and EDGES:
        of_classes = aligned_columns(columns, before, classes)
    vectors = tl.maximum(classes - before, 0) // VEC * VEC
    lane_start, width = lane_columns(tl.arange(0, LANES), LANES, WIDTH, VEC)
    lane = lane_start[:, None] + width
    edge_lane = tl.arange(0, LANES)[:, None]
    at_edge = tl.where(edge_lane < before, edge_lane, edge_lane + vectors) - before
    of_edge = edge_lane < classes - vectors
    in_edge = of_edge
    end = vectors
    if VARIANT.PROB:
        target_head = target + (row * target_row + head) // VEC * VEC
        body = end // BLOCK
        best, y = tl.full([LANES], NEG_INF, ACC), tl.full([LANES], NO_CLASS, tl.int32)
        if EDGES:
            v_edge = load_part(target_head, at_edge, target_col, in_edge, True, VARIANT.UNIT, False, ACC)
            best, y = keep_largest(best, y, v_edge, at_edge)
        for i in range(body):
            v = load_part(target_head, i * BLOCK + lane, target_col, lane >= 0, False, VARIANT.UNIT, False, ACC)
            best, y = keep_largest(best, y, v, i * BLOCK + lane)
        for start in range(body * BLOCK, end, BLOCK):
            v = load_part(target_head, start + lane, target_col, start + lane < end, True, VARIANT.UNIT, False, ACC)
            best, y = keep_largest(best, y, v, start + lane)
        largest = tl.max(best, 0, keep_dims=True)
        # A row of NaN has no largest entry, and the index stays in range.
        y = tl.minimum(tl.min(tl.where(best == largest, y, NO_CLASS), 0, keep_dims=True), classes - 1 - before)
        counted = inside
        v_y = tl.load(at(target_head, y, target_col, VARIANT.UNIT)).to(ACC)
    else:
        target_head = target
        y, counted, valid = load_index(target, one_row, inside, target_row, ignore_index, classes)
        y -= before
        v_y = tl.zeros([1], ACC)
    if factors is not None:
        factor = load_factor(factors, 0, rows, one_row, inside, ACC)
        counted &= factor != 0.0
    if (not VARIANT.PROB) or (factors is not None):
        # A row that does not count is not read.
        read = tl.max(counted.to(tl.int32), 0)
        in_edge = in_edge & counted[:, None]
        end *= read
        body = end // BLOCK
    # In the body a lane looks for the target among its WIDTH classes; y_lane is y relative to the lane's first.
    y_lane = y - lane_start
    target_tile = tl.where(tl.max(y, 0) >= 0, tl.max(y, 0) // BLOCK, -1)

    bases, strides = (student_head, teacher_head, target_head), (student_col, teacher_col, target_col)
    inputs = Inputs(bases, strides, of_classes, classes)
    s_moments = Moments(v_y, v_y, v_y, v_y)
    t_moments = s_moments
    if VARIANT.STD:
        s_moments = row_moments(
            student_head, student_col, head, at_edge, in_edge, lane, end, LANES, WIDTH, VARIANT.UNIT, EDGES, ACC
        )
        t_moments = row_moments(
            teacher_head, teacher_col, head, at_edge, in_edge, lane, end, LANES, WIDTH, VARIANT.UNIT, EDGES, ACC
        )
    scales = make_scales(weights.temperature, s_moments, t_moments, k, VARIANT)
    stats = empty_statistics(LANES, ACC)
    edges = Tile(at_edge, in_edge, at_edge == y[:, None], True)
    if EDGES:
        stats = accumulate_tile(stats, inputs, edges, scales, VARIANT, True, ACC)
    for i in range(body):
        tile = _tile(i * BLOCK, lane, width, y_lane, lane >= 0, target_tile == i)
        stats = accumulate_tile(stats, inputs, tile, scales, VARIANT, False, ACC)
    for start in range(body * BLOCK, end, BLOCK):
        tile = _tile(start, lane, width, y_lane, start + lane < end, True)
        stats = accumulate_tile(stats, inputs, tile, scales, VARIANT, True, ACC)
    merged = merge_lanes(stats, scales, VARIANT)

    s_y = tl.load(at(student_head, y, student_col, VARIANT.UNIT), mask=counted, other=0.0).to(ACC)
    t_y = s_y
    if TEACHER & VARIANT.LOSS:
        t_y = tl.load(at(teacher_head, y, teacher_col, VARIANT.UNIT), mask=counted, other=0.0).to(ACC)
    if VARIANT.PROB:
        valid = 1.0 + 0.0 * (merged.v_sum + v_y)
    sums, of_rows, constants = merged, merged, merged
    of_column = tl.zeros([1], ACC)
    if POINTWISE & VARIANT.LOSS:
        of_rows = row_softmaxes(merged, s_y, t_y, states, rows, one_row, counted, scales, VARIANT)
        constants = Constants(weights.first, 1.0 / classes.to(ACC))
    softmaxes = Softmaxes(merged, scales, of_rows, constants)
    if POINTWISE & VARIANT.LOSS:
        sums = no_sums(LANES, ACC)
        if EDGES:
            sums = sum_tile(sums, inputs, edges, softmaxes, VARIANT, True, ACC)
        for i in range(body):
            tile = _tile(i * BLOCK, lane, width, y_lane, lane >= 0, target_tile == i)
            sums = sum_tile(sums, inputs, tile, softmaxes, VARIANT, False, ACC)
        for start in range(body * BLOCK, end, BLOCK):
            tile = _tile(start, lane, width, y_lane, start + lane < end, True)
            sums = sum_tile(sums, inputs, tile, softmaxes, VARIANT, True, ACC)
        sums = merge_sums(sums)
    if VARIANT.COLUMNS:
        of_column = column_part(correlations, correlation_items, weights, classes, BLOCK, ACC)
    own = None
    if VARIANT.COLUMNS and (factors is not None):  # the columns' numbers already have their factor
        own = load_factor(factors, 1, rows, one_row, inside, ACC)
    part_y, part_rest, part_ce, gradient_of, more = coefficients(
        merged, sums, of_column, own, s_y, t_y, v_y, weights, scales, s_moments, classes, VARIANT
    )
    of_loss = valid
    of_gradient = valid
    if factors is not None:
        of_loss *= factor
        if not VARIANT.COLUMNS:
            of_gradient *= load_factor(factors, 1, rows, one_row, inside, ACC)
    store_parts(
        parts, loss, norm, norm_value, rows, one_row, inside, counted, of_loss, part_y, part_rest, part_ce, PER_ROW
    )
    if GRAD:
        divisor = mean_divisor(counts, target_row, count_items, ignore_index, COUNT)
        by = of_gradient * gradient_scale(scale, divisor, ACC, HALF)
        scaled = scaled_by(gradient_of, by)
        if POINTWISE & VARIANT.LOSS:
            more = scaled_slopes(more, by, VARIANT)
        gradient_head = gradient + (gradient_row + head) // VEC * VEC
        dtype = gradient.dtype.element_ty
        for start in range(body * BLOCK, end, BLOCK):
            tile = _tile(start, lane, width, y_lane, start + lane < end, True)
            g = gradient_tile(inputs, tile, softmaxes, scaled, more, VARIANT, True, ACC)
            tl.store(gradient_head + tile.offsets, narrowed(g, dtype), mask=tile.inside)
        for i in range(body):
            tile = _tile((body - 1 - i) * BLOCK, lane, width, y_lane, lane >= 0, target_tile == body - 1 - i)
            g = gradient_tile(inputs, tile, softmaxes, scaled, more, VARIANT, False, ACC)
            tl.store(gradient_head + tile.offsets, narrowed(g, dtype), eviction_policy="evict_first")
        if EDGES:
            g_edge = gradient_tile(inputs, edges, softmaxes, scaled, more, VARIANT, True, ACC)
            g_edge = tl.where(counted[:, None], g_edge, 0.0)
            tl.store(gradient_head + at_edge, narrowed(g_edge, dtype), mask=of_edge)
        if (not VARIANT.PROB) or (factors is not None):
            rest = tl.where(read == 1, 0, vectors)
            for start in range(0, rest, BLOCK):
                tl.store(gradient_head + (start + lane), tl.zeros_like(lane).to(dtype), mask=start + lane < rest)
