"""Shared steps of the row kernels: the statistics of a row, and its gradient as a combination of exponentials.

Outside the target class y, a row's gradient is a combination of exponentials with coefficients per row,

    g_j = soft e_j(soft_s) + sharp e_j(sharp_s) + teacher f_j + constant - v V_j,        with a separate value at y,

where e_j(k) = 2^((s_j - m_s) k), f_j = 2^((t_j - m_t) soft_t) and m_s, m_t are the largest logits *outside* y. The sums
behind the coefficients also run over the classes outside y, and y joins afterwards as one more term. So neither a
saturated target (s_y - m_s may be hundreds) nor p_y -> 1 causes cancellation. A loss of this family is a function in
:mod:`.losses`. A loss with another function of both softmaxes as its gradient has that in :mod:`.pointwise`, and only
its CE is such a combination.

An entry of :mod:`.values` that a variant does not use stays a constant, which the compiler drops. A class that a sum
leaves out, because it is the target or past the end of the row, has the logit -inf and the probability 0. RAW asks for
exponentials of the student at log2(e), for the CE.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.constants import INF, LOG2E, NEG_INF
from fused_kd.backends.triton.kernels.values import Coefficients, Moments, Scales, Statistics
from fused_kd.core.catalogue import BITS

#: The needs of a loss, bits of its number LOSS: see :data:`fused_kd.core.catalogue.NEEDS`.
TEACHER = tl.constexpr(BITS["teacher"])
SHARP = tl.constexpr(BITS["sharp"])
DIVERGENCE = tl.constexpr(BITS["divergence"])
AT_ONE = tl.constexpr(BITS["at_one"])
TEACHER_CE = tl.constexpr(BITS["teacher_ce"])
POINTWISE = tl.constexpr(BITS["pointwise"])
ONE_SLOPE = tl.constexpr(BITS["one_slope"])


#: All kernels by name.
KERNELS = {}


def kernel(function):
    """Let Triton compile a kernel that is specialised on no number, so another batch or stride compiles nothing.
    ``padding``, which may be None, is the only integer that has no annotation."""
    numbers = [name for name, kind in function.__annotations__.items() if kind in ("tl.int32", "tl.int64")]
    KERNELS[function.__name__] = triton.jit(function, do_not_specialize=[*numbers, "padding"])
    return KERNELS[function.__name__]


@triton.jit
def zero_if_empty(maximum):
    """Replace -inf by 0 in a maximum to subtract: -inf - -inf would be NaN, -inf - 0 gives the right exponential, 0."""
    return tl.where(maximum == NEG_INF, 0.0, maximum)


@triton.jit
def times(weight, value):
    """weight * value with 0 * inf = 0, for a loss, which can only be +inf. NaN stays."""
    return weight * tl.where(weight == 0.0, tl.where(value == INF, 0.0, value), value)


@triton.jit
def join_target(x_y, m, z, k):
    """Softmax at y from the sum z over the other classes, relative to their maximum m.

    Returns p_y, 1 - p_y, the factor that turns exp(x_j - m) into p_j, log2 of the whole sum relative to m, and
    -log2 p_y. With u = (x_y - m) k and M = max(u, 0) the whole sum is 2^M (z 2^-M + 2^(u - M)).
    """
    u = (x_y - zero_if_empty(m)) * k
    top = tl.where(m == NEG_INF, u, tl.maximum(u, 0.0))
    outside = tl.where(m == NEG_INF, 0.0, tl.exp2(-top))
    inside = tl.exp2(u - top)
    total = z * outside + inside
    log_total = tl.log2(total)
    return inside / total, z * outside / total, outside / total, log_total + top, log_total + (top - u)


@triton.jit
def per_row(x, STD: tl.constexpr):
    """Give a scale the shape that a tile of rows needs."""
    if STD:
        return x[:, None]
    else:  # for Triton's compiler a return ends the branch, not the function
        return x


@triton.jit
def _rescale(stats, m_s, m_t, scales, VARIANT: tl.constexpr):
    """Return the same statistics relative to other maxima, at least as large. This takes no sums."""
    (
        old_s, s_soft, s_sharp, old_t, t_soft, t_sharp, blocked, cross, v_sum, v_cross, v_cross_t, linear, number,
        s_raw, w_soft, w_sharp, w_teacher,
    ) = stats  # fmt: skip
    soft_s, soft_t, sharp_s, sharp_t, _mean = scales
    down_s = old_s - zero_if_empty(m_s)
    # If nothing finite was seen, the sums are 0 or -inf, and moving the origin changes neither.
    moved_s = tl.where(old_s == NEG_INF, 0.0, down_s)
    factor_s = tl.exp2(down_s * soft_s)
    s_soft = s_soft * factor_s
    w_soft = w_soft * factor_s
    if not VARIANT.SINGLE:
        sharp = tl.exp2(down_s * sharp_s)
        s_sharp = s_sharp * sharp
        w_sharp = w_sharp * sharp
    s_raw = s_raw * tl.exp2(down_s * LOG2E)
    v_cross = v_cross + moved_s * v_sum
    linear = linear + moved_s * number
    if TEACHER & VARIANT.LOSS:
        down_t = old_t - zero_if_empty(m_t)
        moved_t = tl.where(old_t == NEG_INF, 0.0, down_t)
        factor_t = tl.exp2(down_t * soft_t)
        if (POINTWISE & VARIANT.LOSS) == 0:
            moved = moved_s * soft_s
            if DIVERGENCE & VARIANT.LOSS:
                moved -= moved_t * soft_t
            cross = tl.where(factor_t == 0.0, 0.0, factor_t * (cross + moved * t_soft))
        t_soft = t_soft * factor_t
        blocked = blocked * factor_t
        w_teacher = w_teacher * factor_t
        if (not VARIANT.SINGLE) and ((POINTWISE & VARIANT.LOSS) == 0):
            t_sharp = t_sharp * tl.exp2(down_t * sharp_t)
        v_cross_t = v_cross_t + moved_t * v_sum
    return Statistics(
        m_s, s_soft, s_sharp, m_t, t_soft, t_sharp, blocked, cross, v_sum, v_cross, v_cross_t, linear, number, s_raw,
        w_soft, w_sharp, w_teacher,
    )  # fmt: skip


@triton.jit
def empty_statistics(LANES: tl.constexpr, ACC: tl.constexpr):
    nothing = tl.full([LANES], NEG_INF, ACC)
    zero = tl.zeros([LANES], ACC)
    return Statistics(
        nothing, zero, zero, nothing, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero,
    )  # fmt: skip


@triton.jit
def accumulate(stats, s, t, v, present, scales, VARIANT: tl.constexpr, WALKED: tl.constexpr):
    """Add tiles (lanes, classes) to the statistics of their lanes. ``present`` marks the classes that count. WALKED
    says that there is more than one tile, with few classes per lane."""
    soft_s, soft_t, sharp_s, sharp_t, mean = scales
    m_s = tl.maximum(stats.s_max, tl.max(s, 1))
    m_t = tl.maximum(stats.t_max, tl.max(t, 1)) if TEACHER & VARIANT.LOSS else stats.t_max
    (
        m_s, s_soft, s_sharp, m_t, t_soft, t_sharp, blocked, cross, v_sum, v_cross, v_cross_t, linear, number, s_raw,
        w_soft, w_sharp, w_teacher,
    ) = _rescale(stats, m_s, m_t, scales, VARIANT)  # fmt: skip
    d_s = s - zero_if_empty(m_s)[:, None]
    u = d_s * per_row(soft_s, VARIANT.STD)
    e = tl.exp2(u)
    s_soft += tl.sum(e, 1)
    if VARIANT.STD and ((POINTWISE & VARIANT.LOSS) == 0):
        centred = tl.where(s == NEG_INF, 0.0, s - mean[:, None])
        w_soft += tl.sum(e * centred, 1)
    if not VARIANT.SINGLE:
        sharp = tl.exp2(d_s * per_row(sharp_s, VARIANT.STD))
        s_sharp += tl.sum(sharp, 1)
        if VARIANT.STD and ((POINTWISE & VARIANT.LOSS) == 0):
            w_sharp += tl.sum(sharp * centred, 1)
    if VARIANT.RAW:
        s_raw += tl.sum(tl.exp2(d_s * LOG2E), 1)
    if TEACHER & VARIANT.LOSS:
        d_t = t - zero_if_empty(m_t)[:, None]
        u_t = d_t * per_row(soft_t, VARIANT.STD)
        f = tl.exp2(u_t)
        t_soft += tl.sum(f, 1)
        if DIVERGENCE & VARIANT.LOSS:
            u = u - u_t
        if (POINTWISE & VARIANT.LOSS) == 0:
            # 0 log 0 = 0: an impossible class costs something only if the teacher gives it a probability.
            cross += tl.sum(f * tl.where(f == 0.0, 0.0, u), 1)
            if VARIANT.STD:
                w_teacher += tl.sum(f * centred, 1)
                blocked += tl.sum(tl.where(s == NEG_INF, f, 0.0), 1)
        if not VARIANT.SINGLE:
            if ((DIVERGENCE & VARIANT.LOSS) == 0) and ((POINTWISE & VARIANT.LOSS) == 0):
                t_sharp += tl.sum(tl.exp2(d_t * per_row(sharp_t, VARIANT.STD)), 1)
    if VARIANT.PROB:
        v_sum += tl.sum(v, 1)
        v_cross += tl.sum(v * tl.where(v == 0.0, 0.0, d_s), 1)
        if TEACHER_CE & VARIANT.LOSS:
            v_cross_t += tl.sum(v * tl.where(v == 0.0, 0.0, d_t), 1)
    if VARIANT.LINEAR:
        linear += tl.sum(tl.where(present, d_s, 0.0), 1)
        counted = present
        if WALKED:
            # Otherwise the compiler gives these another layout than the logits, and exchanges numbers in every tile.
            # The dependence on the logits avoids that. For a row with a NaN, the sum above is NaN anyway.
            counted = present & (s == s)
        number += tl.sum(tl.where(counted, 1.0, 0.0), 1)
    return Statistics(
        m_s, s_soft, s_sharp, m_t, t_soft, t_sharp, blocked, cross, v_sum, v_cross, v_cross_t, linear, number, s_raw,
        w_soft, w_sharp, w_teacher,
    )  # fmt: skip


@triton.jit
def total_of(x):
    """Sum over lanes, (1,)."""
    return tl.sum(x, 0, keep_dims=True)


@triton.jit
def merge_lanes(stats, scales, VARIANT: tl.constexpr):
    """Merge the statistics of a row's lanes to (1,)."""
    m_s = tl.max(stats.s_max, 0, keep_dims=True)
    m_t = tl.max(stats.t_max, 0, keep_dims=True)
    return Statistics(*[total_of(lanes) for lanes in _rescale(stats, m_s, m_t, scales, VARIANT)])


@triton.jit
def tile_moments(x):
    """Compute :class:`.values.Moments` of whole rows in registers."""
    possible = x != NEG_INF
    # Relative to the largest, so that the deviation of a constant row is exactly 0.
    largest = zero_if_empty(tl.max(x, 1))
    number = tl.sum(tl.where(possible, 1.0, 0.0).to(x.dtype), 1)
    mean = largest + tl.sum(tl.where(possible, x - largest[:, None], 0.0), 1) / tl.maximum(number, 1.0)
    centred = tl.where(possible, x - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / tl.maximum(number - 1.0, 1.0))
    return Moments(mean, deviation, number, tl.sum(centred, 1) / tl.maximum(number, 1.0))


@triton.jit
def make_scales(temperature, s_moments, t_moments, k, VARIANT: tl.constexpr):
    """Return the scales, with STD from the moments."""
    if VARIANT.STD:
        sharp_s = k / (s_moments.deviation + 1e-7)
        sharp_t = k / (t_moments.deviation + 1e-7)
        soft_s = sharp_s / temperature
        soft_t = sharp_t / temperature
        mean = s_moments.mean
        if (SHARP & VARIANT.LOSS) == 0:  # here the sharp exponentials belong to the CE
            sharp_s = tl.zeros_like(sharp_s) + k
            sharp_t = tl.zeros_like(sharp_t) + k
    else:
        sharp_s = k
        sharp_t = k
        soft_s = k if AT_ONE & VARIANT.LOSS else k / temperature
        soft_t = soft_s
        mean = k
    return Scales(soft_s, soft_t, sharp_s, sharp_t, mean)


@triton.jit
def scaled_by(of, by):
    """Multiply coefficients by a number per row."""
    return Coefficients(
        of.soft * by, of.sharp * by, of.teacher * by, of.raw * by, of.v * by, of.constant * by, of.slope * by,
        tl.where(of.target == 0.0, 0.0, of.target * by),  # a class that cannot occur, in a row without a value too
    )  # fmt: skip


@triton.jit
def combine(s, t, v, stats, coefficients, scales, VARIANT: tl.constexpr):
    """Compute the gradient of tiles outside the target, from the row's statistics and coefficients
    (:func:`.losses.coefficients`). The last coefficient is the value at the target."""
    soft, sharp, teacher, raw, v_weight, constant, slope, _at_target = coefficients
    soft_s, soft_t, sharp_s, _sharp_t, mean = scales
    d_s = s - zero_if_empty(stats.s_max)[:, None]
    if VARIANT.SINGLE or ((POINTWISE & VARIANT.LOSS) == 0):
        g = soft[:, None] * tl.exp2(d_s * per_row(soft_s, VARIANT.STD))
        # The terms that cancel come first: with z-scores these two may be 1e7 times the rest.
        if ((TEACHER & VARIANT.LOSS) != 0) and ((POINTWISE & VARIANT.LOSS) == 0):
            d_t = t - zero_if_empty(stats.t_max)[:, None]
            g += teacher[:, None] * tl.exp2(d_t * per_row(soft_t, VARIANT.STD))
        if not VARIANT.SINGLE:
            g += sharp[:, None] * tl.exp2(d_s * per_row(sharp_s, VARIANT.STD))
    else:  # only the CE
        g = sharp[:, None] * tl.exp2(d_s * per_row(sharp_s, VARIANT.STD))
    if VARIANT.RAW:
        g += raw[:, None] * tl.exp2(d_s * LOG2E)
    if VARIANT.PROB:
        g -= v_weight[:, None] * v
    if VARIANT.LINEAR or VARIANT.STD:
        g += constant[:, None]
    if VARIANT.STD:
        g -= slope[:, None] * (s - mean[:, None])
    # A class that cannot occur gets no gradient, whatever the teacher gives it.
    return tl.where(s == NEG_INF, 0.0, g)


@triton.jit
def count_rows(source, stride, items, ignore_index, PARTIAL: tl.constexpr, BLOCK: tl.constexpr):
    """Count the rows that count: targets other than ignore_index, or the sum of partial counts."""
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
def at(base, cols, stride, UNIT: tl.constexpr):
    """Return pointers to columns of a row, with 64-bit offsets only if a column stride may take them past 2^31."""
    if UNIT:
        return base + cols
    return base + cols.to(tl.int64) * stride


@triton.jit
def as_scalars(numbers, ACC: tl.constexpr):
    """Convert hyper-parameters, which arrive in float64."""
    return [tl.full((), number, ACC) for number in numbers]


@triton.jit
def sum_items(values, items, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Add up an array, in an order that only BLOCK decides."""
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, items, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(values + index, mask=index < items, other=0.0).to(ACC)
    return tl.sum(total, 0)


@triton.jit
def store_fields(out, fields, rows, row, mask):
    """Store numbers of rows as out (fields, rows)."""
    for i in tl.static_range(len(fields)):
        tl.store(out + i * rows + row, fields[i], mask=mask)


@triton.jit
def load_fields(found, rows, row, mask, FIELDS: tl.constexpr):
    """Load what :func:`store_fields` has stored."""
    fields = ()
    for i in tl.static_range(FIELDS):
        fields += (tl.load(found + i * rows + row, mask=mask, other=0.0),)
    return fields


@triton.jit
def load_factor(factors, which, rows, row, inside, ACC: tl.constexpr):
    """Load the factor of rows, for their parts (which = 0) or for a gradient. A row with 0 does not count."""
    return tl.load(factors + which * rows + row, mask=inside, other=0.0).to(ACC)


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """Convert x to its stored dtype. Float64 goes through float32 to the 16-bit formats, as in eager PyTorch."""
    if x.dtype == tl.float64 and tl.float64 != DTYPE:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def power_of_two_below(count):
    """Return the largest power of two up to an integer of at least 1, as float32: only its exponent."""
    # Above 2^24 float32 could round up to the next power. The upper 24 bits suffice.
    count = tl.where(count >= 16777216, count & -256, count)
    bits = count.to(tl.float32).to(tl.int32, bitcast=True)
    return (bits & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def load_index(target, row, inside, stride, ignore_index, classes):
    """Return the target class of rows, clamped into range; whether the row counts; and 1, or NaN if out of range."""
    index = tl.load(target + row * stride, mask=inside, other=0).to(tl.int64)
    counted = inside & (index != ignore_index)
    in_range = (index >= 0) & (index < classes)
    return tl.where(in_range, index, 0).to(tl.int32), counted, tl.where(in_range, 1.0, float("nan"))
