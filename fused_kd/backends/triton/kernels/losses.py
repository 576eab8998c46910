"""The row losses in Triton's language: from the statistics of a row to its parts and the coefficients of its gradient.

The formulas are those of ``csrc/losses/row_losses.h``, which has their derivations. Logarithms are in base 2 here.
:mod:`.rows` has the statistics and the conventions, :mod:`.pointwise` the losses that are no combination of
exponentials. The first two :class:`.values.Weights` are a loss's own, or its only one and 1 minus that. For Tf-KD the
first three are instead its virtual teacher's probability of every other class and of the target, and its negative
entropy (:func:`fused_kd.backends.triton.plans.rows.kernel_weights`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.constants import INF, LN2, LOG2E, NEG_INF
from fused_kd.backends.triton.kernels.pointwise import pointwise, scaled_slopes
from fused_kd.backends.triton.kernels.rows import POINTWISE, join_target, times
from fused_kd.backends.triton.kernels.values import Coefficients, Slopes
from fused_kd.core.catalogue import NUMBERS

#: LOSS is one of these, or one of :mod:`.pointwise`.
NKD = tl.constexpr(NUMBERS["nkd"])
KD = tl.constexpr(NUMBERS["kd"])
DKD = tl.constexpr(NUMBERS["dkd"])
WSLD = tl.constexpr(NUMBERS["wsld"])
TF_KD = tl.constexpr(NUMBERS["tf_kd"])


@triton.jit
def log2_1p(x):
    """log2(1 + x) with the digits of a small x: the ratio restores what 1 + x loses."""
    u = 1.0 + x
    lost = tl.where(u == 1.0, 1.0, x / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.where(u == 1.0, x * LOG2E, tl.log2(u) * lost)


@triton.jit
def one_minus_exp(x):
    """1 - exp(-x) for x >= 0, with the digits of a small x."""
    series = tl.zeros_like(x)
    for i in tl.static_range(8):
        series = x / (8 - i) * (1.0 - series)
    return tl.where(x < 0.05, series, 1.0 - tl.exp2(-x * LOG2E))


@triton.jit
def _cross_entropy(stats, s_y, v_y, z, weights, classes, VARIANT: tl.constexpr):
    """weight CE(s, V'), V' = (1 - e) V + e / C, of raw logits: the part, and the gradient's (raw, v, constant, at y).

    p_y sum V' - V'_y is computed as p_y (sum of the others) - V'_y (1 - p_y), which does not cancel as p_y -> 1.
    """
    _first, _second, _temperature, ce_weight, smoothing = weights
    p_y, p_rest, p_factor, log_z, nll = join_target(s_y, stats.s_max, z, LOG2E)
    if VARIANT.PROB:
        ce = times(v_y, nll) + stats.v_sum * log_z - stats.v_cross * LOG2E
        others = stats.v_sum
    else:
        ce = nll
        others = tl.zeros_like(p_y)
        v_y = tl.full(p_y.shape, 1.0, p_y.dtype)
    constant = tl.zeros_like(p_y)
    kept = ce_weight
    if VARIANT.LINEAR:
        share = smoothing / classes
        everything = nll + (classes - 1) * log_z - stats.linear * LOG2E
        ce = (1.0 - smoothing) * ce + times(share, everything)
        others = (1.0 - smoothing) * others + (smoothing - share)
        v_y = (1.0 - smoothing) * v_y + share
        constant = -ce_weight * share + constant
        kept = ce_weight * (1.0 - smoothing)
    raw = ce_weight * (others + v_y) * p_factor
    ce = tl.where(ce_weight == 0.0, 0.0, ce_weight * ce * LN2)  # without the CE, a row need not have a softmax
    return ce, raw, kept, constant, ce_weight * (p_y * others - v_y * p_rest)


@triton.jit
def _if_several(weight, classes):
    """Return the weight of a term of the non-target classes: 0 for two classes, where only one is not the target."""
    return tl.where(classes == 2, 0.0, weight)


@triton.jit
def _nkd(stats, s_y, t_y, z_sharp, z_tsharp, weights, scales, classes):
    gamma, _second, temperature, _ce_weight, _smoothing = weights
    gamma = _if_several(gamma, classes)
    z_s, z_t, dot = stats.s_soft, stats.t_soft, stats.cross
    _p_y, p_rest, p_factor, _log_z, nll = join_target(s_y, stats.s_max, z_sharp, scales.sharp_s)
    q_y, _q_rest, _q_factor, _log_q, _nll_q = join_target(t_y, stats.t_max, z_tsharp, scales.sharp_t)
    # A teacher that excludes every other class has no q_hat, and the term is 0.
    asked = tl.where(z_t == 0.0, 0.0, 1.0).to(z_t.dtype)
    z_s = tl.where(z_s == 0.0, 1.0, z_s)
    z_t = tl.where(z_t == 0.0, 1.0, z_t)
    non_target = times(gamma * temperature * temperature, (asked * tl.log2(z_s) - dot / z_t) * LN2)
    soft = gamma * temperature * asked / z_s
    return times(q_y, nll * LN2), non_target, soft, q_y * p_factor, -gamma * temperature / z_t, -q_y * p_rest


@triton.jit
def _both_soft(stats, s_y, t_y, scales):
    """Compute the numbers of both softmaxes at T for KD, DKD and WSLD."""
    p_y, p_rest, p_factor, p_log_z, p_nll = join_target(s_y, stats.s_max, stats.s_soft, scales.soft_s)
    q_y, q_rest, q_factor, q_log_z, q_nll = join_target(t_y, stats.t_max, stats.t_soft, scales.soft_t)
    difference = tl.where((p_y > 0.5) & (q_y > 0.5), q_rest - p_rest, p_y - q_y)
    p_rest_nll = p_log_z - tl.log2(stats.s_soft)
    q_rest_nll = q_log_z - tl.log2(stats.t_soft)
    # Logarithms of q / p. If p and q are close, both use one difference, and its error cancels.
    small = tl.abs(difference) < 0.25 * tl.minimum(p_y, p_rest)
    log_target = tl.where(small, log2_1p(-difference / tl.where(small, p_y, 1.0)), p_nll - q_nll)
    log_rest = tl.where(small, log2_1p(difference / tl.where(small, p_rest, 1.0)), p_rest_nll - q_rest_nll)
    log_target = tl.where(q_y == 0.0, 0.0, log_target)
    log_rest = tl.where(q_rest == 0.0, 0.0, log_rest)
    return p_nll, p_rest_nll, p_factor, q_y, q_rest, q_factor, difference, log_target, log_rest


@triton.jit
def _decoupled(stats, s_y, t_y, weights, scales, classes, WHOLE: tl.constexpr):
    """DKD, or with WHOLE KD: alpha = 1 and beta = 1 - q_y."""
    first, second, temperature, _ce_weight, _smoothing = weights
    z_s, z_t, dot = stats.s_soft, stats.t_soft, stats.cross
    _p, _r, _factor, q_y, q_rest, _q, difference, log_target, log_rest = _both_soft(stats, s_y, t_y, scales)
    alpha = tl.full(q_y.shape, 1.0, q_y.dtype) if WHOLE else tl.zeros_like(q_y) + first
    asked = tl.where(z_t == 0.0, 0.0, 1.0).to(z_t.dtype)
    beta = _if_several(q_rest if WHOLE else second, classes) * asked
    binary = q_y * log_target + q_rest * log_rest
    safe_s = tl.where(z_s == 0.0, 1.0, z_s)
    safe_t = tl.where(z_t == 0.0, 1.0, z_t)
    rest = tl.log2(safe_s / safe_t) - dot / safe_t
    square = temperature * temperature
    binary = times(alpha * square, binary * LN2)
    rest = times(beta * square, rest * LN2)
    soft = temperature * (beta - alpha * difference) / safe_s
    target = alpha * temperature * difference
    if WHOLE:
        return binary + rest, tl.zeros_like(rest), soft, tl.zeros_like(soft), -beta * temperature / safe_t, target
    return binary, rest, soft, tl.zeros_like(soft), -beta * temperature / safe_t, target


@triton.jit
def _wsld(stats, s_y, t_y, v_y, z_sharp, z_tsharp, weights, scales, VARIANT: tl.constexpr):
    alpha, _second, temperature, _ce_weight, _smoothing = weights
    z_s, z_t, dot = stats.s_soft, stats.t_soft, stats.cross
    _p, s_rest, _f, s_log_z, s_ce = join_target(s_y, stats.s_max, z_sharp, scales.sharp_s)
    _q, t_rest, _qf, t_log_z, t_ce = join_target(t_y, stats.t_max, z_tsharp, scales.sharp_t)
    # u is a function of their ratio. As p_y -> 1 they are nearly 1 - p_y.
    s_ce = tl.where(s_rest < 0.5, -log2_1p(-s_rest), s_ce)
    t_ce = tl.where(t_rest < 0.5, -log2_1p(-t_rest), t_ce)
    if VARIANT.PROB:
        s_ce = times(v_y, s_ce) + stats.v_sum * s_log_z - stats.v_cross * scales.sharp_s
        t_ce = times(v_y, t_ce) + stats.v_sum * t_log_z - stats.v_cross_t * scales.sharp_t
    # A student with the target at -inf has u = 1. If the teacher has it there too, the quotient would be inf / inf.
    u = tl.where(s_ce == INF, 1.0, one_minus_exp(s_ce * LN2 / (t_ce * LN2 + 1e-7)))
    p_nll, p_rest_nll, p_factor, q_y, q_rest, q_factor, difference, _t, _r = _both_soft(stats, s_y, t_y, scales)
    weight = alpha * temperature * u
    safe_s = tl.where(z_s == 0.0, 1.0, z_s)
    safe_t = tl.where(z_t == 0.0, 1.0, z_t)
    rest = tl.log2(safe_s) - dot / safe_t + tl.where(z_s == 0.0, 0.0, p_rest_nll)
    part = times(weight * q_y, p_nll * LN2) + times(weight * q_rest, rest * LN2)
    soft = weight * p_factor
    return part * temperature, tl.zeros_like(part), soft, tl.zeros_like(soft), -weight * q_factor, weight * difference


@triton.jit
def coefficients(stats, sums, column, own, s_y, t_y, v_y, weights, scales, moments, classes, VARIANT: tl.constexpr):
    """Return a loss's three parts, and its gradient's :class:`.values.Coefficients` and :class:`.values.Slopes`.

    Inputs are the statistics of rows that count and are valid; for a pointwise loss also the sums and the part of the
    column term. ``own``, if not None, multiplies the gradient of all terms but the column term.
    """
    z_sharp = stats.s_soft if VARIANT.SINGLE else stats.s_sharp
    z_tsharp = stats.t_soft if VARIANT.SINGLE else stats.t_sharp
    z_ce = stats.s_raw if VARIANT.RAW else z_sharp
    ce, raw, v_weight, constant, at_ce = _cross_entropy(stats, s_y, v_y, z_ce, weights, classes, VARIANT)
    if own is not None:
        raw, v_weight, constant, at_ce = raw * own, v_weight * own, constant * own, at_ce * own
    if VARIANT.LOSS == NKD:
        one, two, soft, sharp, teacher, at_y = _nkd(stats, s_y, t_y, z_sharp, z_tsharp, weights, scales, classes)
    elif VARIANT.LOSS == KD:
        one, two, soft, sharp, teacher, at_y = _decoupled(stats, s_y, t_y, weights, scales, classes, True)
    elif VARIANT.LOSS == DKD:
        one, two, soft, sharp, teacher, at_y = _decoupled(stats, s_y, t_y, weights, scales, classes, False)
    elif VARIANT.LOSS == WSLD:
        one, two, soft, sharp, teacher, at_y = _wsld(stats, s_y, t_y, v_y, z_sharp, z_tsharp, weights, scales, VARIANT)
    elif VARIANT.LOSS == TF_KD:
        u_j, u_y, entropy, _ce_weight, _smoothing = weights
        p_y, p_rest, p_factor, log_z, nll = join_target(s_y, stats.s_max, stats.s_soft, LOG2E)
        everything = (classes - 1) * log_z - stats.linear * LOG2E
        one = entropy + u_y * nll * LN2 + u_j * everything * LN2  # neither weight is 0
        two = tl.zeros_like(one)
        raw += p_factor
        constant -= u_j
        at_y = tl.where(u_y > 0.5, (classes - 1) * u_j - p_rest, p_y - u_y)
        soft, sharp, teacher = tl.zeros_like(raw), tl.zeros_like(raw), tl.zeros_like(raw)
    else:
        tl.static_assert((POINTWISE & VARIANT.LOSS) != 0, "a loss in the catalogue that has no branch")
        soft, sharp, teacher, at_y = tl.zeros_like(raw), tl.zeros_like(raw), tl.zeros_like(raw), tl.zeros_like(raw)
    slope = tl.zeros_like(soft)
    more, with_s = Slopes(slope, slope, slope, slope), slope
    if POINTWISE & VARIANT.LOSS:
        one, more, with_s = pointwise(sums, own, weights, VARIANT)
        two = tl.zeros_like(one) + column
    possible = s_y != NEG_INF
    at_y = tl.where(possible, at_y, 0.0)
    if VARIANT.STD:
        # Backward through z = f (x - mean), f = 1 / (d + 1e-7): f (g_j - sum(g) / n) - z_j sum(g z) / ((n - 1) d).
        mean, deviation, number, low = moments
        # A class alone has the z-score 0, whatever its logit.
        f = tl.where(number == 1.0, 0.0, 1.0 / (deviation + 1e-7))
        w_sharp = stats.w_soft if VARIANT.SINGLE else stats.w_sharp
        centred = tl.where(possible, s_y - mean, 0.0)
        with_z = (
            with_s
            if POINTWISE & VARIANT.LOSS
            else soft * stats.w_soft + sharp * w_sharp + teacher * stats.w_teacher + at_y * centred
        )
        flat = deviation == 0.0
        slope = tl.where(flat, 0.0, f * f * with_z / (tl.maximum(number - 1.0, 1.0) * tl.where(flat, 1.0, deviation)))
        shift = slope * low
        if (POINTWISE & VARIANT.LOSS) == 0:
            # g sums to 0, a softmax being indifferent to a shift, unless the student rules out what the teacher asks.
            s_sharp = stats.s_soft if VARIANT.SINGLE else stats.s_sharp
            total = soft * stats.s_soft + sharp * s_sharp + teacher * (stats.t_soft - stats.blocked) + at_y
            shift -= tl.where((stats.blocked > 0.0) | (s_y == NEG_INF), f * total / tl.maximum(number, 1.0), 0.0)
        constant += shift
        soft, sharp, teacher, at_y = soft * f, sharp * f, teacher * f, at_y * f - slope * centred + shift
        if POINTWISE & VARIANT.LOSS:
            more = scaled_slopes(more, f, VARIANT)
    if not VARIANT.RAW:  # the CE's exponentials are the sharp ones
        sharp += raw
    if VARIANT.SINGLE:
        soft += sharp
    at_y = tl.where(possible, at_y + at_ce, 0.0)
    return one, two, ce, Coefficients(soft, sharp, teacher, raw, v_weight, constant, slope, at_y), more
