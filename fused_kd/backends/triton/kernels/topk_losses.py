"""The row losses with a top-k teacher in Triton's language, for one row in float64. The formulas and the notation are
those of ``csrc/losses/topk_losses.h``. Kept classes other than the target are a block of entries; the target and the
rest are scalars.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.constants import INF, LN2, LOG2E, NEG_INF
from fused_kd.backends.triton.kernels.losses import DKD, KD, NKD, WSLD, log2_1p, one_minus_exp
from fused_kd.backends.triton.kernels.pointwise import JS
from fused_kd.backends.triton.kernels.rows import join_target, times, zero_if_empty
from fused_kd.core.catalogue import REST_NUMBERS

#: REST is one of these.
DROP = tl.constexpr(REST_NUMBERS["drop"])
RENORMALIZE = tl.constexpr(REST_NUMBERS["renormalize"])
BUCKET = tl.constexpr(REST_NUMBERS["bucket"])
UNIFORM = tl.constexpr(REST_NUMBERS["uniform"])


class Row(NamedTuple):
    """The numbers of a row. ``s`` and ``t`` are blocks, -inf where an entry is no kept class."""

    s: tl.tensor  # the student's logits
    t: tl.tensor  # the teacher's log-probabilities
    s_y: tl.tensor
    t_y: tl.tensor  # -inf if the target was not kept
    kept_y: tl.tensor
    number: tl.tensor  # number of classes in the rest
    top: tl.tensor  # their largest logit, 0 if none can occur
    soft: tl.tensor  # the sums of their exponentials at T and at 1, relative to it
    sharp: tl.tensor
    linear: tl.tensor  # the sum of their logits
    v: tl.tensor  # the labels V, with probability targets: a block of kept classes, 0 where there is none
    v_y: tl.tensor
    v_rest: tl.tensor  # the sums of V and of V (s - top) over the rest
    v_cross: tl.tensor


class Side(NamedTuple):
    """The softmax of the student's or the teacher's row at a scale, with exponentials relative to ``top``."""

    top: tl.tensor
    e: tl.tensor  # of the kept classes
    e_y: tl.tensor  # of the target, 0 if it is not separate
    moved: tl.tensor  # factor of exponentials relative to the rest's own largest logit
    kept: tl.tensor  # the sum of e and e_y
    rest: tl.tensor
    log_rest: tl.tensor
    total: tl.tensor
    log_total: tl.tensor  # 0 if no class can occur


@triton.jit
def _ratio(x, y):
    """x / y, 0 where y is 0."""
    none = y == 0.0
    return tl.where(none, 0.0, x / tl.where(none, 1.0, y))


@triton.jit
def _log_or(x, empty):
    """log x, or ``empty`` where x is 0."""
    none = x == 0.0
    return tl.where(none, empty, tl.log(tl.where(none, 1.0, x)))


@triton.jit
def _log_softmax(x, side, scale):
    return (x - side.top) * scale - side.log_total


@triton.jit
def _side(x, x_y, others, others_top, scale):
    some = others != 0.0
    top = tl.maximum(tl.maximum(tl.max(x, 0), x_y), tl.where(some, others_top, NEG_INF))
    top = zero_if_empty(top)
    e = tl.exp((x - top) * scale)
    e_y = tl.exp((x_y - top) * scale)
    down = (others_top - top) * scale
    moved = tl.where(some, tl.exp(down), 0.0)
    log_rest = _log_or(others, NEG_INF) + tl.where(some, down, 0.0)
    kept, rest = tl.sum(e, 0) + e_y, others * moved
    total = kept + rest
    return Side(top, e, e_y, moved, kept, rest, log_rest, total, _log_or(total, 0.0))


@triton.jit
def _split(x_y, top, total, scale):
    """Split the target's probability from all others, as :func:`.rows.join_target` with natural logarithms."""
    m = tl.where(total == 0.0, NEG_INF, top)
    p, rest, factor, log_z, nll = join_target(x_y, m, total, scale * LOG2E)
    log_z, nll = log_z * LN2, nll * LN2
    nll = tl.where(rest < 0.5, -log2_1p(-rest) * LN2, nll)
    return p, rest, factor, log_z, nll, tl.where(total == 0.0, NEG_INF, _log_or(total, 0.0) - log_z)


@triton.jit
def _soft_entry(log_p, log_q, q, by_p, e, temperature, ENTROPY: tl.constexpr):
    """Return the value and the gradient of a class in weight T sum q (log q - log p), or without log q."""
    value = times(temperature * q, -log_p)
    if ENTROPY:
        value -= times(temperature * q, -log_q)
    return value, by_p * e - q


@triton.jit
def _soft_term(x, others, s, t, s_y, t_y, weight, share, temperature, ENTROPY: tl.constexpr, REST: tl.constexpr):
    """Compute such a term over the kept classes, the target if separate, and the rest. ``others`` are the number, the
    sum of exponentials and the sum of logits of the rest's classes. Return the value, the gradients at the kept classes
    and at the target, and for the rest's gradient the factor of exponentials and the constant.

    In a bucket the others are one class. They share its gradient in proportion to their probabilities.
    """
    number, exponentials, linear = others
    scale = 1.0 / temperature
    # Less than 1 with drop. Renormalised it is 1, or NaN if the teacher is NaN.
    counting = t.kept / t.total if (REST == DROP or REST == RENORMALIZE) else tl.full((), 1.0, tl.float64)
    by_q = weight / t.total
    by_p = _ratio(weight * counting, s.total)
    log_p, log_q = _log_softmax(x.s, s, scale), _log_softmax(x.t, t, scale)
    values, by = _soft_entry(log_p, log_q, by_q * t.e, by_p, s.e, temperature, ENTROPY)
    log_p, log_q = _log_softmax(s_y, s, scale), _log_softmax(t_y, t, scale)
    value_y, by_y = _soft_entry(log_p, log_q, by_q * t.e_y, by_p, s.e_y, temperature, ENTROPY)
    value = tl.sum(values, 0) + value_y
    soft, constant = by_p * s.moved, tl.zeros_like(value)
    q, some = by_q * t.rest, number > 0.0
    if REST == BUCKET:
        of_rest, _by = _soft_entry(s.log_rest - s.log_total, t.log_rest - t.log_total, q, by_p, q,
                                   temperature, ENTROPY)  # fmt: skip
        value += tl.where(some, of_rest, 0.0)
        soft = tl.where(some, _ratio(by_p * s.rest - q, exponentials), soft)
    if REST == UNIFORM:
        log_p, log_q = _log_softmax(_ratio(linear, number), s, scale), _log_softmax(share, t, scale)
        of_rest, _by = _soft_entry(log_p, log_q, q, by_p, q, temperature, ENTROPY)
        value += tl.where(some, of_rest, 0.0)
        constant = -_ratio(q, number)
    return value, by, by_y, soft, constant


@triton.jit
def _js_slope(p, q, log_p, log_q, beta):
    """Return a class's term of beta KL(q | m) + (1 - beta) KL(p | m), and the slope in p: log p - log m, times
    1 - beta, or times 1 if beta is 1."""
    of_p = tl.where(beta == 1.0, 1.0, 1.0 - beta)
    by_q, by_p = tl.log(beta) + log_q, tl.log(1.0 - tl.where(beta == 1.0, 0.0, beta)) + log_p
    larger, smaller = tl.maximum(by_q, by_p), tl.minimum(by_q, by_p)
    mixed = larger + log2_1p(tl.exp(smaller - larger)) * LN2
    log_m = tl.where(beta == 1.0, log_q, mixed)
    h = tl.where(p == 0.0, 0.0, of_p * (log_p - log_m))
    of_q = tl.where(q == 0.0, 0.0, beta * q * (log_q - log_m))
    return p * h + tl.where(beta == 1.0, 0.0, of_q), h


@triton.jit
def _jensen_shannon(x, others, s, t, s_y, t_y, beta, temperature):
    """As :func:`_soft_term` for Jensen-Shannon. The rest is one more class."""
    number, exponentials, _linear = others
    scale = 1.0 / temperature
    log_p, log_q = _log_softmax(x.s, s, scale), _log_softmax(x.t, t, scale)
    p, p_y, of_rest = s.e / s.total, s.e_y / s.total, s.rest / s.total
    values, h = _js_slope(p, t.e / t.total, log_p, log_q, beta)
    log_p, log_q = _log_softmax(s_y, s, scale), _log_softmax(t_y, t, scale)
    value_y, h_y = _js_slope(p_y, t.e_y / t.total, log_p, log_q, beta)
    some = number > 0.0
    log_p, log_q = s.log_rest - s.log_total, t.log_rest - t.log_total
    value_r, h_r = _js_slope(of_rest, t.rest / t.total, log_p, log_q, beta)
    value_r, h_r = tl.where(some, value_r, 0.0), tl.where(some, h_r, 0.0)
    mean = tl.sum(p * h, 0) + p_y * h_y + tl.where(some, of_rest * h_r, 0.0)
    by, by_y = temperature * p * (h - mean), temperature * p_y * (h_y - mean)
    soft = _ratio(temperature * of_rest * (h_r - mean), exponentials)
    value = temperature * temperature * (tl.sum(values, 0) + value_y + value_r)
    return value, by, by_y, soft, tl.zeros_like(value)


@triton.jit
def _whole_term(x, share, weight, beta, temperature, KIND: tl.constexpr, REST: tl.constexpr):
    """Compute a term of the softmaxes at T over all classes: weight T times KL or the cross-entropy, or
    Jensen-Shannon."""
    scale = 1.0 / temperature
    possible = x.s_y != NEG_INF
    # A target that was not kept belongs to the rest.
    joins = (x.kept_y == 0) & possible
    some = x.soft != 0.0
    top = tl.where(joins, tl.where(some, tl.maximum(x.s_y, x.top), x.s_y), x.top)
    exponentials = tl.where(some, x.soft * tl.exp((x.top - top) * scale), 0.0)
    exponentials += tl.where(joins, tl.exp((x.s_y - top) * scale), 0.0)
    number = x.number + tl.where(x.kept_y, 0.0, 1.0)
    linear = x.linear + tl.where(x.kept_y, 0.0, x.s_y)
    s_y, t_y = tl.where(x.kept_y, x.s_y, NEG_INF), x.t_y
    s, t = _side(x.s, s_y, exponentials, top, scale), _side(x.t, t_y, number, share, scale)
    others = (number, exponentials, linear)
    if KIND == KD or KIND == WSLD:
        value, by, by_y, soft, constant = _soft_term(
            x, others, s, t, s_y, t_y, weight, share, temperature, KIND == KD, REST
        )
    else:
        tl.static_assert(KIND == JS, "a loss with a rest in the catalogue that has no branch")
        value, by, by_y, soft, constant = _jensen_shannon(x, others, s, t, s_y, t_y, beta, temperature)
    by_y += tl.where(joins, soft * tl.exp((x.s_y - top) * scale) + constant, 0.0)
    soft = tl.where(some, soft * tl.exp((x.top - top) * scale), 0.0)
    return tl.where(s.total == 0.0, float("nan"), value), by, by_y, soft, constant


@triton.jit
def _binary_term(x, s, t, share, alpha, temperature, REST: tl.constexpr):
    """Return alpha T^2 sum b_t (log b_t - log b_s) over (target, all others), where ``drop`` leaves the rest out of
    b_t; and D, the gradient at the target over alpha T. Another class has -D times its probability among the others."""
    scale = 1.0 / temperature
    p, p_rest, _f, _z, p_nll, p_log_rest = _split(x.s_y, s.top, s.total, scale)
    t_y = tl.where(x.kept_y, x.t_y, share)
    q, q_rest, _f, log_z, q_nll, q_log_rest = _split(t_y, t.top, t.total, scale)
    if REST == DROP:
        q_log_rest = tl.where(t.kept == 0.0, NEG_INF, _log_or(t.kept, 0.0) - log_z)
        q_rest = tl.where(t.total == 0.0, q_rest, _ratio(q_rest * t.kept, t.total))
        q = tl.where(x.kept_y, q, 0.0)
        q_nll = tl.where(x.kept_y, q_nll, INF)
    weight = alpha * temperature * temperature
    value = times(weight * q, p_nll) - times(weight * q, q_nll)
    value += times(weight * q_rest, -p_log_rest) - times(weight * q_rest, -q_log_rest)
    total = q + q_rest
    return value, tl.where((p > 0.5) & (q > 0.5), q_rest - total * p_rest, total * p - q)


@triton.jit
def _hat_terms(x, share, weight, alpha, temperature, num_classes, KIND: tl.constexpr, REST: tl.constexpr):
    """Compute a term of the softmaxes at T over the classes other than the target: weight T times KL, or the
    cross-entropy. Hats renormalise, also with ``drop``. DKD adds the term of the target against all others."""
    scale = 1.0 / temperature
    nothing = tl.full((), NEG_INF, tl.float64)
    s, t = _side(x.s, nothing, x.soft, x.top, scale), _side(x.t, nothing, x.number, share, scale)
    one, by, by_y, soft = tl.zeros_like(weight), tl.zeros_like(x.s), tl.zeros_like(weight), tl.zeros_like(weight)
    if KIND == DKD:
        one, difference = _binary_term(x, s, t, share, alpha, temperature, REST)
        by_p = -_ratio(alpha * temperature * difference, s.total)
        by = by_p * s.e
        by_y, soft = alpha * temperature * difference, by_p * s.moved
    if REST == DROP:
        t = Side(t.top, t.e, t.e_y, t.moved, t.kept, t.rest, t.log_rest, t.kept, _log_or(t.kept, 0.0))
    alone = (num_classes == 2) | (t.total == 0.0)
    others = (x.number, x.soft, x.linear)
    value, more, _y, more_soft, constant = _soft_term(
        x, others, s, t, nothing, nothing, weight, share, temperature, KIND == DKD,
        RENORMALIZE if REST == DROP else REST,
    )  # fmt: skip
    two = tl.where(alone, 0.0, value)
    by += tl.where(alone, 0.0, more)
    soft += tl.where(alone, 0.0, more_soft)
    return one, two, by, by_y, soft, tl.where(alone, 0.0, constant)


@triton.jit
def resolve(x, own, weights, num_classes, LOSS: tl.constexpr, REST: tl.constexpr, CE: tl.constexpr, PROB: tl.constexpr):
    """Return the three parts, the gradient at the kept classes and at the target, and (soft, sharp, constant, of_v) of
    the rest's gradient, soft exp((s - top) / T) + sharp exp(s - top) + constant - of_v V. ``weights`` are the loss's
    own two hyper-parameters, temperature, ce_weight and label_smoothing. CE says that ce_weight is not 0, PROB that the
    target has probabilities."""
    first, second, temperature, ce_weight, smoothing = weights
    zero = tl.zeros_like(temperature)
    entries = tl.sum(own.to(tl.int32), 0) + x.kept_y.to(tl.int32)
    left = 1.0 - tl.sum(tl.where(own, tl.exp(x.t), 0.0), 0) - tl.exp(x.t_y)
    spread = left / tl.maximum(num_classes - entries, 1).to(tl.float64)
    share = tl.where(left <= 0.0, NEG_INF, tl.log(tl.where(left <= 0.0, 1.0, spread)))
    share = tl.where(entries == num_classes, NEG_INF, share)
    if REST == RENORMALIZE:
        share = zero + NEG_INF
    one, two, ce, u = zero, zero, zero, zero + 1.0
    by, by_y, sharp, constant, of_v = tl.zeros_like(x.s), zero, zero, zero, zero
    distilled: tl.constexpr = LOSS == NKD or LOSS == WSLD
    if distilled or CE:
        s = _side(x.s, zero + NEG_INF, x.sharp, x.top, 1.0)
        p_y, p_rest, factor, log_z, nll, _l = _split(x.s_y, s.top, s.total, 1.0)
        by_p, of_labels, rest_of_labels = zero, nll, zero
        if PROB:
            rest_of_labels = x.v_rest + tl.sum(x.v, 0)
            v_cross = x.v_cross + x.v_rest * (x.top - s.top) - tl.sum(times(x.v, s.top - x.s), 0)
            of_labels = times(x.v_y, nll) + rest_of_labels * log_z - v_cross
        if CE:
            logits = tl.sum(tl.where(own, x.s - s.top, 0.0), 0) + x.linear - x.number * s.top
            everything = nll + (num_classes - 1) * log_z - logits
            uniform = smoothing / num_classes
            ce = ce_weight * (times(1.0 - smoothing, of_labels) + tl.where(smoothing == 0.0, 0.0, uniform * everything))
            others, label = smoothing - uniform, (1.0 - smoothing) + uniform
            by_p = ce_weight * factor
            if PROB:
                others += (1.0 - smoothing) * rest_of_labels
                label = (1.0 - smoothing) * x.v_y + uniform
                by_p = ce_weight * (others + label) * factor
                of_v = ce_weight * (1.0 - smoothing)
            constant = -ce_weight * uniform
            by_y = ce_weight * (p_y * others - label * p_rest)
        if distilled:
            outside = x.number + tl.where(x.kept_y, 0.0, 1.0)
            t = _side(x.t, x.t_y, outside, share, 1.0)
            log_outside = _log_softmax(share, t, 1.0)
            if REST == DROP or REST == RENORMALIZE:
                log_outside = tl.where(t.total == t.total, NEG_INF, t.total)
            log_q = tl.where(x.kept_y, _log_softmax(x.t_y, t, 1.0), log_outside)
            if LOSS == NKD:
                q = tl.exp(log_q)
                one = times(q, nll)
                by_p += q * factor
                by_y -= q * p_rest
            else:
                if PROB:
                    log_q = -times(x.v_y, -log_q) - times(x.v_rest, -log_outside)
                    log_q -= tl.sum(times(x.v, -_log_softmax(x.t, t, 1.0)), 0)
                u = tl.where(of_labels == INF, 1.0, one_minus_exp(of_labels / (1e-7 - log_q)))
        by = by_p * s.e + constant
        if PROB:
            by -= of_v * x.v
        sharp = by_p * s.moved
    if LOSS == NKD or LOSS == DKD:
        weight, alpha = (first if LOSS == NKD else second) * temperature, first
        first_part, two, more, more_y, soft, further = _hat_terms(
            x, share, weight, alpha, temperature, num_classes, LOSS, REST
        )
        one += first_part
    else:
        weight = (first * u if LOSS == WSLD else 1.0) * temperature
        one, more, more_y, soft, further = _whole_term(x, share, weight, first, temperature, LOSS, REST)
    by, by_y, constant = by + more, by_y + more_y, constant + further
    # No class of the teacher can occur: all kept ones have probability 0, and the others have no share.
    missing = tl.maximum(tl.maximum(tl.max(x.t, 0), x.t_y), share) == NEG_INF
    nan = tl.where(missing, float("nan"), 0.0).to(tl.float64)
    if PROB:  # a NaN among the labels reaches loss and gradient, whatever the weights
        nan += 0.0 * (x.v_y + x.v_rest + tl.sum(x.v, 0))
    one, two, ce, by, by_y, soft = one + nan, two + nan, ce + nan, by + nan, by_y + nan, soft + nan
    return one, two, ce, by, by_y, soft, sharp, constant, of_v
