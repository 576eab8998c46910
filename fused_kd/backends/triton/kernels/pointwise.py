"""Pointwise losses: functions of both softmaxes p and q at T with a gradient that is no combination of exponentials.
At every class, the target included, it is

    g_j = p_j (h_j - sum_k p_k h_k) / T,        h_j = c_1 f_1(p_j, q_j) + c_2 f_2(p_j, q_j) [+ the column's slope]

(and the usual CE). Such a loss has three functions: the terms of its sums over a row (:func:`_summed`, three terms),
its slopes f (:func:`_slopes`), and its part, c_1 and c_2 from the sums (:func:`_terms`). ``row_losses.h`` has the same
three with their derivations. Logarithms are in base 2 here. The sums of a row need its normalisers, so they take
another pass over its classes: in registers on chip, as a third walk in the looped kernel. sum_k p_k h_k is summed in
this form, so that everything that all h_j share, rounding included, cancels in the gradient.

``of_rows`` are the softmaxes of rows: (p_y, factor, log_z, -log p_y), twice. Outside the target, p_j = factor e_j and
log p_j is the exponent minus log_z (:func:`.rows.join_target`).

With COLUMNS (DIST's column term) each class has four numbers for its slope c_0 (q - c_2) + c_1 (p - c_3), which include
the term's factor (:mod:`.columns`). If a column's correlation is near 1, the slope is a small difference, so p and q
must be exactly the numbers behind the moments: ``of_rows`` are then (maximum, scale, share) of :mod:`.columns`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.constants import LN2, NEG_INF
from fused_kd.backends.triton.kernels.rows import (
    ONE_SLOPE,
    join_target,
    load_fields,
    per_row,
    sum_items,
    total_of,
    zero_if_empty,
)
from fused_kd.backends.triton.kernels.values import PointwiseSums, Slopes
from fused_kd.core.catalogue import NUMBERS

DIST = tl.constexpr(NUMBERS["dist"])
JS = tl.constexpr(NUMBERS["js"])


@triton.jit
def _summed(p, q, log_p, log_q, constants, LOSS: tl.constexpr):
    if LOSS == DIST:
        a = p - constants.share
        b = q - constants.share
        return a * b, a * a, b * b
    elif LOSS == JS:
        to_p, to_q = _mixture_logs(log_p, log_q, constants.first)
        return tl.where(p == 0.0, 0.0, -p * to_p), p, tl.where(q == 0.0, 0.0, -q * to_q)


@triton.jit
def _slopes(p, q, log_p, log_q, constants, LOSS: tl.constexpr):
    """Return f_1 and f_2. The second one of a loss with one slope is not used."""
    if LOSS == DIST:
        return q - constants.share, p - constants.share
    elif LOSS == JS:
        to_p, _to_q = _mixture_logs(log_p, log_q, constants.first)
        return -to_p, p


@triton.jit
def _terms(sums, weights, LOSS: tl.constexpr):
    """Return the part, c_1 and c_2 of rows."""
    first, second, temperature, _ce_weight, _smoothing = weights
    c_2 = tl.zeros_like(sums.of_1)
    if LOSS == DIST:
        weight = first * temperature * temperature
        r, c_1, c_2 = correlation_terms(sums.of_1, sums.of_2, sums.of_3, weight)
        part = weight * (1.0 - r)
    elif LOSS == JS:
        rest = tl.where(first == 1.0, 1.0, second)
        weight = temperature * temperature * LN2
        part = weight * (rest * sums.of_1 + tl.where(first == 1.0, 0.0, first * sums.of_3))
        c_1 = weight * rest + tl.zeros_like(part)
    return part, c_1, c_2


@triton.jit
def _mixture_logs(log_p, log_q, beta):
    """log(m / p) and log(m / q), m = beta q + (1 - beta) p, computed relative to the larger of p and q, so that nothing
    underflows. At beta = 1 the loss is KL(p || q), and m is q."""
    d = log_q - log_p
    smaller = tl.exp2(-tl.abs(d))
    rest = 1.0 - beta
    # They sum to 1 exactly: a difference would be an error of the loss. But 0 would leave the logarithm unbounded.
    own = tl.where(rest == 1.0, beta, 1.0 - rest)
    near = tl.log2(tl.where(d > 0.0, own + rest * smaller, rest + own * smaller))
    to_p = tl.where(d > 0.0, near + d, near)
    return tl.where(beta == 1.0, d, to_p), tl.where(d > 0.0, near, near - d)


@triton.jit
def correlation_terms(ab, aa, bb, weight):
    """Return r = ab / D, D = sqrt(aa bb) + 1e-8, and the factors of b and of a in the slope of weight (1 - r):
    -weight / D and, unless a vanishes, weight r sqrt(bb) / (sqrt(aa) D)."""
    a_norm = tl.sqrt(aa)
    b_norm = tl.sqrt(bb)
    d = a_norm * b_norm + 1e-8
    flat = a_norm == 0.0
    by_a = tl.where(flat, 0.0, ab / tl.where(flat, 1.0, a_norm) / d * (b_norm / d))
    return ab / d, -weight / d, weight * by_a


@triton.jit
def row_softmaxes(stats, s_y, t_y, states, rows, row, counted, scales, VARIANT: tl.constexpr):
    """Return ``of_rows``."""
    if VARIANT.COLUMNS:
        of_teacher = load_fields(states + 3 * rows, rows, row, counted, 3)
        return load_fields(states, rows, row, counted, 3), of_teacher
    else:
        p_y, _p_rest, p_factor, p_log_z, p_nll = join_target(s_y, stats.s_max, stats.s_soft, scales.soft_s)
        q_y, _q_rest, q_factor, q_log_z, q_nll = join_target(t_y, stats.t_max, stats.t_soft, scales.soft_t)
        p_y = tl.where(s_y == NEG_INF, 0.0, p_y)  # also in a row where no class can occur
        return (p_y, p_factor, p_log_z, p_nll), (q_y, q_factor, q_log_z, q_nll)


@triton.jit
def _softmax_tile(x, is_target, maximum, of_rows, scale, VARIANT: tl.constexpr):
    """Return p and log p of tiles. With COLUMNS the logarithm is not computed."""
    if VARIANT.COLUMNS:
        p = tl.exp2((x - of_rows[0][:, None]) * of_rows[1][:, None]) * of_rows[2][:, None]
        return p, p
    else:
        p_y, factor, log_z, nll = of_rows
        u = (x - zero_if_empty(maximum)[:, None]) * per_row(scale, VARIANT.STD)
        p = tl.where(is_target, p_y[:, None], tl.exp2(u) * factor[:, None])
        return p, tl.where(is_target, -nll[:, None], u - log_z[:, None])


@triton.jit
def _softmax_tiles(s, t, is_target, softmaxes, VARIANT: tl.constexpr):
    stats, scales, of_rows, _constants = softmaxes
    p, log_p = _softmax_tile(s, is_target, stats.s_max, of_rows[0], scales.soft_s, VARIANT)
    q, log_q = _softmax_tile(t, is_target, stats.t_max, of_rows[1], scales.soft_t, VARIANT)
    return p, log_p, q, log_q


@triton.jit
def column_stride(classes):
    """Return the stride between a class's four numbers: each array starts aligned, with room to start up to three
    places later."""
    return (classes + 6) // 4 * 4


@triton.jit
def aligned_columns(columns, first, classes):
    """Return a pointer to class ``first`` in the copy of the columns' numbers where it starts a vector of four."""
    shift = (4 - first % 4) % 4
    return columns + shift * (4 * column_stride(classes)) + (first + shift) // 4 * 4


@triton.jit
def load_columns(columns, cols, inside, classes, MASKED: tl.constexpr, COLUMNS: tl.constexpr):
    """Load tiles of the four numbers of each class. Without COLUMNS the result is not used."""
    if COLUMNS:
        pointers = columns + cols
        stride = column_stride(classes)
        if MASKED:
            return (
                tl.load(pointers, mask=inside, other=0.0),
                tl.load(pointers + stride, mask=inside, other=0.0),
                tl.load(pointers + 2 * stride, mask=inside, other=0.0),
                tl.load(pointers + 3 * stride, mask=inside, other=0.0),
            )
        else:
            at = pointers + 2 * stride
            return tl.load(pointers), tl.load(pointers + stride), tl.load(at), tl.load(at + stride)
    else:
        return cols, cols, cols, cols


@triton.jit
def _column_slope(columns, p, q):
    return columns[0] * (q - columns[2]) + columns[1] * (p - columns[3])


@triton.jit
def column_part(correlations, items, weights, classes, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Return the part of DIST's column term, the same for every row, from partial sums of the columns' correlations."""
    _first, gamma, temperature, _ce_weight, _smoothing = weights
    return gamma * temperature * temperature * (1.0 - sum_items(correlations, items, BLOCK, ACC) / classes)


@triton.jit
def no_sums(LANES: tl.constexpr, ACC: tl.constexpr):
    zero = tl.zeros([LANES], ACC)
    return PointwiseSums(zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def add_sums(sums, s, t, columns, is_target, inside, softmaxes, VARIANT: tl.constexpr):
    """Add tiles (lanes, classes) to sums of lanes."""
    x_1, x_2, x_3, y_1, y_2, y_column, w, w_1, w_2, w_column = sums
    p, log_p, q, log_q = _softmax_tiles(s, t, is_target, softmaxes, VARIANT)
    one, two, three = _summed(p, q, log_p, log_q, softmaxes.constants, VARIANT.LOSS)
    x_1 += tl.sum(tl.where(inside, one, 0.0), 1)
    if (ONE_SLOPE & VARIANT.LOSS) == 0:
        x_2 += tl.sum(tl.where(inside, two, 0.0), 1)
    x_3 += tl.sum(tl.where(inside, three, 0.0), 1)
    f_1, f_2 = _slopes(p, q, log_p, log_q, softmaxes.constants, VARIANT.LOSS)
    # If p vanishes, a logarithm is infinite or the class cannot occur.
    none = (p == 0.0) | (inside == 0)
    by_1 = tl.where(none, 0.0, p * f_1)
    by_2 = tl.where(none, 0.0, p * f_2)
    y_1 += tl.sum(by_1, 1)
    y_2 += tl.sum(tl.where(none, 0.0, p) if ONE_SLOPE & VARIANT.LOSS else by_2, 1)
    by_column = p
    if VARIANT.COLUMNS:
        by_column = tl.where(none, 0.0, p * _column_slope(columns, p, q))
        y_column += tl.sum(by_column, 1)
    if VARIANT.STD:
        centred = tl.where(none, 0.0, s - softmaxes.scales.mean_s[:, None])
        w += tl.sum(tl.where(none, 0.0, p * centred), 1)
        w_1 += tl.sum(by_1 * centred, 1)
        if (ONE_SLOPE & VARIANT.LOSS) == 0:
            w_2 += tl.sum(by_2 * centred, 1)
        if VARIANT.COLUMNS:
            w_column += tl.sum(by_column * centred, 1)
    return PointwiseSums(x_1, x_2, x_3, y_1, y_2, y_column, w, w_1, w_2, w_column)


@triton.jit
def merge_sums(sums):
    """Merge the sums of a row's lanes to (1,)."""
    return PointwiseSums(*[total_of(lanes) for lanes in sums])


@triton.jit
def pointwise(sums, own, weights, VARIANT: tl.constexpr):
    """Return the loss's part, its :class:`.values.Slopes`, and with STD the sum of g_j (s_j - mean)."""
    part, c_1, c_2 = _terms(sums, weights, VARIANT.LOSS)
    if own is not None:
        c_1, c_2 = c_1 * own, c_2 * own
    by = 1.0 / weights.temperature
    if ONE_SLOPE & VARIANT.LOSS:
        # The p_k sum to 1 up to rounding. Times a slope of 7, that rounding exceeds the allowed error of a saturated
        # row's gradient. It is in both sums, so the quotient cancels it.
        mean = sums.by_1 / sums.by_2
        mean_slope, offset = c_1 * mean, -mean
    else:
        mean_slope = c_1 * sums.by_1 + c_2 * sums.by_2 + sums.by_column
        offset = -mean_slope * by
    with_s = by * (c_1 * sums.w_1 + c_2 * sums.w_2 + sums.w_column - mean_slope * sums.w)
    return part, Slopes(c_1 * by, c_2 * by, tl.zeros_like(c_1) + by, offset), with_s


@triton.jit
def scaled_slopes(more, by, VARIANT: tl.constexpr):
    """Multiply the slopes by a number per row."""
    offset = more.offset if ONE_SLOPE & VARIANT.LOSS else more.offset * by
    return Slopes(more.by_1 * by, more.by_2 * by, more.by_column * by, offset)


@triton.jit
def add_slopes(g, s, t, columns, is_target, softmaxes, more, VARIANT: tl.constexpr):
    """Add the loss's own gradient, from its slopes, to g, tiles of the CE's gradient."""
    p, log_p, q, log_q = _softmax_tiles(s, t, is_target, softmaxes, VARIANT)
    f_1, f_2 = _slopes(p, q, log_p, log_q, softmaxes.constants, VARIANT.LOSS)
    if ONE_SLOPE & VARIANT.LOSS:
        # Equal to the bit where p_j = 1: at beta = 1 an ulp of f_1 can be any number.
        h = more.by_1[:, None] * (f_1 + more.offset[:, None])
    else:
        h = more.by_1[:, None] * f_1 + more.offset[:, None]
        h += more.by_2[:, None] * f_2
    if VARIANT.COLUMNS:
        h += more.by_column[:, None] * _column_slope(columns, p, q)
    impossible = s == NEG_INF
    if not VARIANT.COLUMNS:  # the tile may lack the target's logit, but p there is 0 where it is -inf
        impossible = impossible & (is_target == 0)
    return g + tl.where((p == 0.0) | impossible, 0.0, p * h)
