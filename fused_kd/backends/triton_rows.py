# mypy: ignore-errors
# Triton compiles these functions; to a type checker they are not Python.
"""Triton kernels of the row losses: statistics of a row, then coefficients, then one combine pass.

A row's gradient is, outside the target class y, a combination of three exponentials with per-row coefficients,

    g_j = a * exp(s_j - m_s) + b * exp((s_j - m_s) / T) + c * exp((t_j - m_t) / T),        and a value of its own at y,

with m_s and m_t the largest logits *outside* y. The sums behind the coefficients run over the classes outside y too,
and y joins afterwards as one more term, so neither a saturated target (s_y - m_s may be hundreds) nor p_y -> 1 costs
anything by cancellation. Another loss of the family is another coefficients function.

Exponents are in base 2: ``k`` is log2(e) and ``k_T`` is log2(e) / T.

Two kernels share these functions. ``rows_on_chip`` holds its rows in registers: each input is read once.
``rows_looped`` gives a row to one program, which walks it twice; its first walk keeps statistics per lane, each lane
with the maximum of what it has seen (online softmax), and merges the lanes once at the end.

Conventions: a statistics tuple is (m_s, z_s, z_sT, m_t, z_t, z_tT, dot, v_sum, v_dot), where z are sums of exponentials
relative to the maximum, dot = sum f_j u_j with f_j = exp((t_j - m_t)/T) and u_j = (s_j - m_s) k_T, and v are class
probabilities: v_sum = sum v_j, v_dot = sum v_j (s_j - m_s) k. With UNIT_T (T = 1) z_sT and z_tT are unused, without
PROB so are v_sum and v_dot; they then stay constants that the compiler drops. A class left out of a sum, for being the
target or past the end of the row, has the logit -inf and the probability 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NEG_INF = tl.constexpr(float("-inf"))
_INF = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def zero_if_empty(maximum):
    """A maximum to subtract: -inf - -inf would be NaN, -inf - 0 gives the exponential 0 that is meant."""
    return tl.where(maximum == _NEG_INF, 0.0, maximum)


@triton.jit
def times(weight, value):
    """weight * value with 0 * inf = 0, for a loss, which is +inf if anything; NaN stays."""
    return weight * tl.where(weight == 0.0, tl.where(value == _INF, 0.0, value), value)


@triton.jit
def _weighted(weight, value):
    """A part times its hyper-parameter, which switches it off at 0, whatever the part is."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def _rescale(stats, m_s, m_t, k, k_T, UNIT_T: tl.constexpr):
    """The same statistics relative to other maxima, at least as large. No sum of anything is taken here."""
    old_s, z_s, z_sT, old_t, z_t, z_tT, dot, v_sum, v_dot = stats
    base_s = zero_if_empty(m_s)
    down_s = old_s - base_s
    down_t = old_t - zero_if_empty(m_t)
    # Where nothing finite was seen, dot and v_dot are 0 or -inf, and moving the origin changes neither.
    moved = tl.where(old_s == _NEG_INF, 0.0, down_s)
    factor_t = tl.exp2(down_t * k_T)
    mass = z_t if UNIT_T else z_tT
    dot = tl.where(factor_t == 0.0, 0.0, factor_t * (dot + moved * k_T * mass))
    v_dot = v_dot + moved * k * v_sum
    z_s = z_s * tl.exp2(down_s * k)
    if UNIT_T:
        z_t = z_t * factor_t
    else:
        z_sT = z_sT * tl.exp2(down_s * k_T)
        z_t = z_t * tl.exp2(down_t * k)
        z_tT = z_tT * factor_t
    return base_s, z_s, z_sT, z_t, z_tT, dot, v_sum, v_dot


@triton.jit
def empty_statistics(LANES: tl.constexpr, ACC: tl.constexpr):
    nothing = tl.full([LANES], _NEG_INF, ACC)
    zero = tl.zeros([LANES], ACC)
    return nothing, zero, zero, nothing, zero, zero, zero, zero, zero


@triton.jit
def accumulate(stats, s, t, v, k, k_T, UNIT_T: tl.constexpr, PROB: tl.constexpr):
    """Add tiles (lanes, classes) to the statistics of their lanes."""
    m_s = tl.maximum(stats[0], tl.max(s, 1))
    m_t = tl.maximum(stats[3], tl.max(t, 1))
    base_s, z_s, z_sT, z_t, z_tT, dot, v_sum, v_dot = _rescale(stats, m_s, m_t, k, k_T, UNIT_T)
    d_s = s - base_s[:, None]
    d_t = t - zero_if_empty(m_t)[:, None]
    u = d_s * k_T
    f = tl.exp2(d_t * k_T)
    z_s += tl.sum(tl.exp2(d_s * k), 1)
    if UNIT_T:
        z_t += tl.sum(f, 1)
    else:
        z_sT += tl.sum(tl.exp2(u), 1)
        z_t += tl.sum(tl.exp2(d_t * k), 1)
        z_tT += tl.sum(f, 1)
    # 0 log 0 = 0: an impossible class costs only where the teacher gives it mass.
    dot += tl.sum(f * tl.where(f == 0.0, 0.0, u), 1)
    if PROB:
        v_sum += tl.sum(v, 1)
        v_dot += tl.sum(v * tl.where(v == 0.0, 0.0, d_s * k), 1)
    return m_s, z_s, z_sT, m_t, z_t, z_tT, dot, v_sum, v_dot


@triton.jit
def merge_lanes(stats, k, k_T, UNIT_T: tl.constexpr):
    """The statistics (1,) of a row from those of its lanes."""
    m_s = tl.max(stats[0], 0, keep_dims=True)
    m_t = tl.max(stats[3], 0, keep_dims=True)
    _base, z_s, z_sT, z_t, z_tT, dot, v_sum, v_dot = _rescale(stats, m_s, m_t, k, k_T, UNIT_T)
    return (
        m_s,
        tl.sum(z_s, 0, keep_dims=True),
        tl.sum(z_sT, 0, keep_dims=True),
        m_t,
        tl.sum(z_t, 0, keep_dims=True),
        tl.sum(z_tT, 0, keep_dims=True),
        tl.sum(dot, 0, keep_dims=True),
        tl.sum(v_sum, 0, keep_dims=True),
        tl.sum(v_dot, 0, keep_dims=True),
    )


@triton.jit
def _join_target(x_y, m, z, k):
    """Softmax at y from the sum z over the other classes, relative to their maximum m.

    Returns p_y, 1 - p_y, the factor that turns exp(x_j - m) into p_j, log2 of the whole sum relative to m, and
    -log2 p_y. With u = (x_y - m) k and M = max(u, 0) the whole sum is 2^M (z 2^-M + 2^(u - M)).
    """
    u = (x_y - zero_if_empty(m)) * k
    top = tl.where(m == _NEG_INF, u, tl.maximum(u, 0.0))
    outside = tl.where(m == _NEG_INF, 0.0, tl.exp2(-top))
    inside = tl.exp2(u - top)
    total = z * outside + inside
    log_total = tl.log2(total)
    return inside / total, z * outside / total, outside / total, log_total + top, log_total + (top - u)


@triton.jit
def nkd_coefficients(stats, s_y, t_y, v_y, gamma, temperature, ce_weight, k, UNIT_T: tl.constexpr, PROB: tl.constexpr):
    """NKD's parts (target, non_target, ce) and its gradient's (a, b, c, value at y), of rows that count and are valid.

    With V the CE target (one-hot, or the probabilities), a = (q_y + ce_weight sum V) / Z, b = gamma T / Z_hat and
    c = -gamma T / Z_hat of the teacher; at y, -(q_y)(1 - p_y) + ce_weight (p_y sum V - V_y), in which
    p_y sum V - V_y = p_y sum_{j != y} V_j - V_y (1 - p_y) does not cancel as p_y -> 1.
    """
    m_s, z_s, z_sT, m_t, z_t, z_tT, dot, v_sum, v_dot = stats
    p_y, p_rest, p_factor, log_z, nll = _join_target(s_y, m_s, z_s, k)
    q_y, _q_rest, _q_factor, _log_q, _nll_q = _join_target(t_y, m_t, z_t, k)
    hat_s = z_s if UNIT_T else z_sT
    hat_t = z_t if UNIT_T else z_tT
    # A teacher that excludes every other class has no q_hat: nothing is asked of the student there.
    asked = tl.where(hat_t == 0.0, 0.0, 1.0).to(hat_t.dtype)
    hat_s = tl.where(hat_s == 0.0, 1.0, hat_s)
    hat_t = tl.where(hat_t == 0.0, 1.0, hat_t)
    target = times(q_y, nll * _LN2)
    non_target = _weighted(gamma * temperature * temperature, (asked * tl.log2(hat_s) - dot / hat_t) * _LN2)
    if PROB:
        ce = _weighted(ce_weight, (times(v_y, nll) + v_sum * log_z - v_dot) * _LN2)
        mass = v_sum + v_y
        at_target = -q_y * p_rest + ce_weight * (p_y * v_sum - v_y * p_rest)
    else:
        ce = _weighted(ce_weight, nll * _LN2)
        mass = 1.0
        at_target = -(q_y + ce_weight) * p_rest
    a = (q_y + ce_weight * mass) * p_factor
    b = gamma * temperature * asked / hat_s
    c = -gamma * temperature / hat_t
    at_target = tl.where(s_y == _NEG_INF, 0.0, at_target)
    return target, non_target, ce, a, b, c, at_target


@triton.jit
def combine(s, t, v, is_target, stats, coefficients, k, k_T, UNIT_T: tl.constexpr, PROB: tl.constexpr):
    """The gradient of tiles from the row's statistics and coefficients (a, b, c, the weight of -v, the value at y)."""
    a, b, c, v_weight, at_target = coefficients
    d_s = s - zero_if_empty(stats[0])[:, None]
    d_t = t - zero_if_empty(stats[3])[:, None]
    if UNIT_T:
        g = (a + b)[:, None] * tl.exp2(d_s * k)
    else:
        g = a[:, None] * tl.exp2(d_s * k) + b[:, None] * tl.exp2(d_s * k_T)
    g += c[:, None] * tl.exp2(d_t * k_T)
    if PROB:
        g -= v_weight[:, None] * v
    # A class that cannot occur gets no gradient, whatever the teacher says of it.
    g = tl.where(s == _NEG_INF, 0.0, g)
    return tl.where(is_target, at_target[:, None], g)


@triton.jit
def count_rows(source, stride, items, ignore_index, PARTIAL: tl.constexpr, BLOCK: tl.constexpr):
    """How many rows count: targets other than ignore_index, or the sum of partial counts."""
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, items, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < items
        if PARTIAL:
            total += tl.load(source + index, mask=inside, other=0)
        else:
            value = tl.load(source + index.to(tl.int64) * stride, mask=inside, other=0)
            total += (inside & (value != ignore_index)).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """x in the dtype it is stored in; float64 reaches the 16-bit formats through float32, as eager PyTorch does."""
    if x.dtype == tl.float64 and tl.float64 != DTYPE:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def power_of_two_below(count):
    """The largest power of two of at most an integer from 1 to 2^24, as float32: its exponent alone."""
    bits = count.to(tl.float32).to(tl.int32, bitcast=True)
    return (bits & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def load_index(target, row, inside, stride, ignore_index, classes):
    """Target class of rows, clamped into range; whether the row counts; and 1, or NaN for an index out of range."""
    index = tl.load(target + row * stride, mask=inside, other=0).to(tl.int64)
    counted = inside & (index != ignore_index)
    in_range = (index >= 0) & (index < classes)
    return tl.where(in_range, index, 0).to(tl.int32), counted, tl.where(in_range, 1.0, _NAN)
