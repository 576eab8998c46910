"""DIST's column term: for every class the correlation r_j of both softmaxes' columns, over the rows that count.

``normalize_rows`` reads the logits and stores six numbers of each row. With them a probability is
exp2((x - maximum) scale) share. ``column_moments`` reads the logits again, in blocks of classes and chunks of rows, and
stores means and second moments. ``finish_columns`` merges the chunks, in time proportional to their number. For the row
kernels it leaves the part of the loss, and for each column a slope that is linear in p and q.

The moments are centred from the first row on (Welford's recurrence; merged by Chan's formula): a sum of p^2 minus n
times the square of the mean would cancel if a column varies less than its mean. No sum depends on the scheduling of
programs: same input, same bits.

Constexpr arguments, in addition to those of :mod:`.on_chip`:

ROWS   rows of a program, or of its tile
BLOCK  classes of a tile
CHUNKS chunks of a tile
LANES  threads of a row, each with WIDTH classes of a tile
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.constants import LOG2E, NEG_INF
from fused_kd.backends.triton.kernels.pointwise import column_stride, correlation_terms
from fused_kd.backends.triton.kernels.rows import kernel, load_factor, load_fields, store_fields, zero_if_empty
from fused_kd.backends.triton.kernels.targets import load_tile
from fused_kd.backends.triton.kernels.tiles import lane_columns
from fused_kd.backends.triton.kernels.values import ColumnMoments


@triton.jit
def counted_rows(target, row, inside, stride, ignore_index, PROB: tl.constexpr):
    """Return a mask of the rows that count: with probabilities, all."""
    if PROB:
        return inside
    return inside & (tl.load(target + row * stride, mask=inside, other=0).to(tl.int64) != ignore_index)


@triton.jit
def _row_totals(x, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Return, for each lane, the sum over the lanes of its row."""
    total = tl.sum(tl.reshape(x, [ROWS, LANES]), 1)
    return tl.reshape(tl.broadcast_to(total[:, None], [ROWS, LANES]), [ROWS * LANES])


@triton.jit
def _deviation(
    view, counted, lane_cols, classes,
    ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return, for each lane, its row's unbiased deviation over the classes that can occur."""
    # Relative to some logit, so that the deviation of a constant row is exactly 0.
    about = zero_if_empty(tl.load(view[0], mask=counted, other=0.0).to(ACC))
    total = tl.zeros([ROWS * LANES], ACC)
    number = tl.zeros([ROWS * LANES], ACC)
    for start in range(0, classes, LANES * WIDTH):
        cols = start + lane_cols
        x = load_tile(view, cols, counted[:, None] & (cols < classes), NEG_INF, UNIT, ACC)
        total += tl.sum(tl.where(x == NEG_INF, 0.0, x - about[:, None]), 1)
        number += tl.sum(tl.where(x == NEG_INF, 0.0, 1.0).to(ACC), 1)
    number = _row_totals(number, ROWS, LANES)
    mean = about + _row_totals(total, ROWS, LANES) / tl.maximum(number, 1.0)
    square = tl.zeros([ROWS * LANES], ACC)
    for start in range(0, classes, LANES * WIDTH):
        cols = start + lane_cols
        x = load_tile(view, cols, counted[:, None] & (cols < classes), NEG_INF, UNIT, ACC)
        centred = tl.where(x == NEG_INF, 0.0, x - mean[:, None])
        square += tl.sum(centred * centred, 1)
    return tl.sqrt(_row_totals(square, ROWS, LANES) / tl.maximum(number - 1.0, 1.0))


@triton.jit
def _normalize(
    view, states, rows, first, counted, lane_cols, classes, temperature,
    ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, STD: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    scale = tl.zeros([ROWS * LANES], ACC) + LOG2E
    if STD:
        scale /= _deviation(view, counted, lane_cols, classes, ROWS, LANES, WIDTH, UNIT, ACC) + 1e-7
    scale /= temperature
    lane_maximum = tl.full([ROWS * LANES], NEG_INF, ACC)
    total = tl.zeros([ROWS * LANES], ACC)
    for start in range(0, classes, LANES * WIDTH):
        cols = start + lane_cols
        x = load_tile(view, cols, counted[:, None] & (cols < classes), NEG_INF, UNIT, ACC)
        higher = tl.maximum(lane_maximum, tl.max(x, 1))
        origin = zero_if_empty(higher)
        total = total * tl.exp2((lane_maximum - origin) * scale)
        total += tl.sum(tl.exp2((x - origin[:, None]) * scale[:, None]), 1)
        lane_maximum = higher
    by_row = tl.reshape(lane_maximum, [ROWS, LANES])
    maximum = tl.max(by_row, 1)
    scale = tl.reshape(scale, [ROWS, LANES])
    factor = tl.exp2((by_row - zero_if_empty(maximum)[:, None]) * scale)
    total = tl.sum(tl.reshape(total, [ROWS, LANES]) * factor, 1)
    row = first + tl.arange(0, ROWS)
    store_fields(states, (maximum, tl.max(scale, 1), 1.0 / total), rows, row, row < rows)


@kernel
def normalize_rows(
    student,
    teacher,
    target,
    states,
    rows: tl.int64,
    classes: tl.int32,
    student_row: tl.int64,
    student_col: tl.int64,
    teacher_row: tl.int64,
    teacher_col: tl.int64,
    target_row: tl.int64,
    ignore_index: tl.int64,
    temperature: tl.float64,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
    PROB: tl.constexpr,
    STD: tl.constexpr,
):
    """states (6, rows): the largest logit, the scale and the share of the student's rows, then of the teacher's."""
    temperature = tl.full((), temperature, ACC)
    classes = classes // VEC * VEC
    first = tl.program_id(0).to(tl.int64) * ROWS
    lane = tl.arange(0, ROWS * LANES)
    row = first + lane // LANES
    counted = counted_rows(target, row, row < rows, target_row, ignore_index, PROB)
    lane_start, width = lane_columns(lane % LANES, LANES, WIDTH, VEC)
    cols = lane_start[:, None] + width
    s = (student + row * (student_row // VEC * VEC), student_col)
    t = (teacher + row * (teacher_row // VEC * VEC), teacher_col)
    _normalize(s, states, rows, first, counted, cols, classes, temperature, ROWS, LANES, WIDTH, UNIT, STD, ACC)
    states += 3 * rows
    _normalize(t, states, rows, first, counted, cols, classes, temperature, ROWS, LANES, WIDTH, UNIT, STD, ACC)


@triton.jit
def _probabilities(view, states, rows, row, inside, cols, mask, UNIT: tl.constexpr, ACC: tl.constexpr):
    maximum, scale, share = load_fields(states, rows, row, inside, 3)
    x = load_tile(view, cols, mask, NEG_INF, UNIT, ACC)
    return tl.exp2((x - maximum[:, None]) * scale[:, None]) * share[:, None]


@triton.jit
def _no_moments(PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    zero = tl.zeros([PARTS, BLOCK], ACC)
    return ColumnMoments(tl.zeros([PARTS], ACC), zero, zero, zero, zero, zero)


@triton.jit
def _accumulate(moments, p, q, counted, mask, ACC: tl.constexpr):
    """Add a row to each part, by Welford's recurrence."""
    number, mean_p, mean_q, pp, pq, qq = moments
    number += counted.to(ACC)
    # A quotient may be two units off. For the first row it must be 1, or the mean would differ from the row.
    by = tl.where(number > 1.0, 1.0 / tl.maximum(number, 1.0), 1.0)[:, None]
    d_p = tl.where(mask, p - mean_p, 0.0)
    d_q = tl.where(mask, q - mean_q, 0.0)
    # Not d times the distance from the new mean: if both are only rounding, that may be below 0.
    e_p = d_p * (1.0 - by)
    e_q = d_q * (1.0 - by)
    return ColumnMoments(number, mean_p + d_p * by, mean_q + d_q * by, pp + d_p * e_p, pq + d_p * e_q, qq + d_q * e_q)


@triton.jit
def _join(moments, chunk, number, classes, mask):
    """Add a chunk of ``number`` rows to each part, by Chan's formula. ``chunk`` points to its means and sums."""
    total, mean_p, mean_q, pp, pq, qq = moments
    total += number
    share = tl.where(number < total, number / tl.maximum(total, 1.0), 1.0)[:, None]
    d_p = tl.where(mask, tl.load(chunk, mask=mask, other=0.0) - mean_p, 0.0)
    d_q = tl.where(mask, tl.load(chunk + classes, mask=mask, other=0.0) - mean_q, 0.0)
    mean_p += d_p * share
    mean_q += d_q * share
    between = (total - number)[:, None] * share
    pp += tl.load(chunk + 2 * classes, mask=mask, other=0.0) + between * d_p * d_p
    pq += tl.load(chunk + 3 * classes, mask=mask, other=0.0) + between * d_p * d_q
    qq += tl.load(chunk + 4 * classes, mask=mask, other=0.0) + between * d_q * d_q
    return ColumnMoments(total, mean_p, mean_q, pp, pq, qq)


@triton.jit
def _merge(moments):
    """Merge all parts. One may have no rows."""
    number, mean_p, mean_q, pp, pq, qq = moments
    number = number[:, None]
    total = tl.sum(number, 0)
    by = 1.0 / tl.maximum(total, 1.0)
    # Relative to the largest mean, so that equal means stay exact.
    about_p = zero_if_empty(tl.max(tl.where(number > 0.0, mean_p, NEG_INF), 0))
    about_q = zero_if_empty(tl.max(tl.where(number > 0.0, mean_q, NEG_INF), 0))
    new_p = about_p + tl.sum(number * (mean_p - about_p[None, :]), 0) * by
    new_q = about_q + tl.sum(number * (mean_q - about_q[None, :]), 0) * by
    d_p = mean_p - new_p[None, :]
    d_q = mean_q - new_q[None, :]
    return ColumnMoments(
        total, new_p, new_q,
        tl.sum(pp + number * d_p * d_p, 0), tl.sum(pq + number * d_p * d_q, 0), tl.sum(qq + number * d_q * d_q, 0),
    )  # fmt: skip


@kernel
def column_moments(
    student,
    teacher,
    target,
    factors,
    states,
    moments,
    numbers,
    rows: tl.int64,
    classes: tl.int32,
    student_row: tl.int64,
    student_col: tl.int64,
    teacher_row: tl.int64,
    teacher_col: tl.int64,
    target_row: tl.int64,
    ignore_index: tl.int64,
    chunk: tl.int64,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
    PROB: tl.constexpr,
):
    """moments (chunks, 5, classes): the means of p and q over a chunk's rows that count, and the sums pp, pq, qq of
    their centred squares and product. numbers (chunks,): how many rows count."""
    classes = classes // VEC * VEC
    blocks = (classes + (BLOCK - 1)) // BLOCK
    this_chunk = tl.program_id(0) // blocks
    block = tl.program_id(0) - this_chunk * blocks
    cols = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = this_chunk * chunk
    last = tl.minimum(rows, first + chunk)
    found = _no_moments(ROWS, BLOCK, ACC)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < last
        # Rows that do not count are read too, and left out below, so that no logit waits for its row's target.
        counted = counted_rows(target, row, inside, target_row, ignore_index, PROB)
        if factors is not None:
            counted &= load_factor(factors, 0, rows, row, inside, ACC) != 0.0
        mask = inside[:, None] & (cols < classes)
        s = (student + row * (student_row // VEC * VEC), student_col)
        t = (teacher + row * (teacher_row // VEC * VEC), teacher_col)
        p = _probabilities(s, states, rows, row, inside, cols, mask, UNIT, ACC)
        q = _probabilities(t, states + 3 * rows, rows, row, inside, cols, mask, UNIT, ACC)
        mask = counted[:, None] & (cols < classes)
        found = _accumulate(found, p, q, counted, mask, ACC)
    total, mean_p, mean_q, pp, pq, qq = _merge(found)
    column = block * BLOCK + tl.arange(0, BLOCK)
    moments += this_chunk.to(tl.int64) * 5 * classes
    store_fields(moments, (mean_p, mean_q, pp, pq, qq), classes, column, column < classes)
    tl.store(numbers + this_chunk + tl.arange(0, 1), total, mask=block == 0)


@kernel
def finish_columns(
    moments,
    numbers,
    column_factor,
    columns,
    correlations,
    classes: tl.int32,
    chunks: tl.int32,
    gamma: tl.float64,
    temperature: tl.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    COPIES: tl.constexpr,
):
    """correlations (programs,): the sum of r_j over each program's classes. columns (COPIES, 4, padded classes): the
    numbers for a column's slope in :mod:`.pointwise`, the slope of T^2 gamma (1 - mean r) times ``column_factor``. None
    means the number of rows that count, since each gets the whole term. Each copy starts one place later than the one
    before, so wherever a vector starts in a row, it also starts a vector in some copy."""
    weight = tl.full((), gamma, ACC) * tl.full((), temperature, ACC) * tl.full((), temperature, ACC) / classes
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < classes
    part = tl.arange(0, CHUNKS)
    found = _no_moments(CHUNKS, BLOCK, ACC)
    for start in range(0, chunks, CHUNKS):
        chunk = start + part
        mask = (chunk < chunks)[:, None] & inside[None, :]
        at = moments + chunk.to(tl.int64)[:, None] * 5 * classes + cols[None, :]
        number = tl.load(numbers + chunk, mask=chunk < chunks, other=0.0)
        found = _join(found, at, number, classes, mask)
    total, mean_p, mean_q, pp, pq, qq = _merge(found)
    if column_factor is not None:
        total = tl.load(column_factor).to(ACC)
    r, by_b, by_a = correlation_terms(pq, pp, qq, total * weight)
    stride = column_stride(classes)
    for shift in tl.static_range(COPIES):
        store_fields(columns + shift * (4 * stride + 1), (by_b, by_a, mean_q, mean_p), stride, cols, inside)
    tl.store(correlations + tl.program_id(0), tl.sum(tl.where(inside, r, 0.0), 0))
