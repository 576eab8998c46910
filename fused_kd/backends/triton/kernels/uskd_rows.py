"""The formulas of USKD in Triton: statistics of rows, rank keys, loss parts and gradients. What other losses share, and
the conventions, are in :mod:`.targets`.

The weak logits' gradient is, at a class j that is no target,

    d/dw_j = weak * exp(w_j - m_w) - uniform - kept V_j

and at a target a value of its own. Only the student's ``zipf``, the share of the non-target softmax in its ``factor``,
and one part of the loss wait for the ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.constants import INF, LN2, NEG_INF
from fused_kd.backends.triton.kernels.rows import times, zero_if_empty
from fused_kd.backends.triton.kernels.targets import (
    cross_entropy,
    gradual_exp2,
    is_rest,
    load_at,
    load_tile,
    rest_number,
    smoothed_at,
    tile_at,
)


@triton.jit
def row_statistics(student, weak, labels, targets, rows, classes, k, WALK: tl.constexpr, ACC: tl.constexpr):
    """(m_s, z_s, m_w, z_w, linear, v_rest, v_cross, v_blocked, v_weak, linear_s), sums over the classes outside the
    targets.

    linear = sum w_j - m_w, and with LINEAR linear_s the same of the student. The others are of probabilities V, else 0:
    sum V_j, sum V_j (s_j - m_s) of the classes that can occur, sum V_j of those that cannot, and sum V_j (w_j - m_w).
    """
    zero = tl.full(WALK.TILE, 0.0, ACC)
    top_s, top_w = zero + NEG_INF, zero + NEG_INF
    for start in range(0, WALK.BLOCK if WALK.HELD else classes, WALK.BLOCK):
        cols, mask = tile_at(start, rows, classes, WALK)
        rest = is_rest(cols, mask, targets)
        top_s = tl.maximum(top_s, tl.where(rest, load_tile(student, cols, mask, NEG_INF, WALK.UNIT, ACC), NEG_INF))
        top_w = tl.maximum(top_w, tl.where(rest, load_tile(weak, cols, mask, NEG_INF, WALK.UNIT, ACC), NEG_INF))
    m_s = zero_if_empty(tl.max(top_s, 1))
    m_w = zero_if_empty(tl.max(top_w, 1))
    z_s, z_w, linear, v_rest, v_cross, v_blocked, v_weak = zero, zero, zero, zero, zero, zero, zero
    linear_s = zero
    for start in range(0, WALK.BLOCK if WALK.HELD else classes, WALK.BLOCK):
        cols, mask = tile_at(start, rows, classes, WALK)
        rest = is_rest(cols, mask, targets)
        d_s = tl.where(rest, load_tile(student, cols, mask, NEG_INF, WALK.UNIT, ACC), NEG_INF) - m_s[:, None]
        d_w = tl.where(rest, load_tile(weak, cols, mask, NEG_INF, WALK.UNIT, ACC), NEG_INF) - m_w[:, None]
        z_s += tl.exp2(d_s * k)
        z_w += tl.exp2(d_w * k)
        linear += tl.where(rest, d_w, 0.0)
        if WALK.LINEAR:
            linear_s += tl.where(rest, d_s, 0.0)
        if WALK.PROB:
            v = tl.where(rest, load_tile(labels, cols, mask, 0.0, WALK.UNIT, ACC), 0.0)
            impossible = d_s == NEG_INF
            v_rest += v
            v_cross += tl.where(impossible, 0.0, v * d_s)
            v_blocked += tl.where(impossible, v, 0.0)
            v_weak += tl.where(rest, v * d_w, 0.0)
    sums = (tl.sum(z_s, 1), tl.sum(z_w, 1), tl.sum(linear, 1))
    of_labels = (tl.sum(v_rest, 1), tl.sum(v_cross, 1), tl.sum(v_blocked, 1), tl.sum(v_weak, 1))
    return (
        m_s, sums[0], m_w, sums[1], sums[2], of_labels[0], of_labels[1], of_labels[2], of_labels[3],
        tl.sum(linear_s, 1),
    )  # fmt: skip


@triton.jit
def target_squares(p, targets, SQUARE: tl.constexpr):
    """p_k^2 of both targets, or p_k; 0 for one that there is not."""
    p_0 = tl.where(targets[0] >= 0, p[2], 0.0)
    p_1 = tl.where(targets[1] >= 0, p[3], 0.0)
    if SQUARE:
        return p_0 * p_0, p_1 * p_1
    return p_0, p_1


@triton.jit
def _key_factors(p, RANKED: tl.constexpr, NORMALIZED: tl.constexpr):
    """What a softmax adds to the keys: the factor of exp(x_j - m), and the values at the targets."""
    if not RANKED:
        nothing = p[4] * 0.0
        return nothing, nothing, nothing
    by = 1.0 / (p[4] + 1e-6) if NORMALIZED else 1.0
    return by * p[5], by * p[2], by * p[3]


@triton.jit
def key_factors(p, v, targets, RANK: tl.constexpr):
    """Of the student and of the weak logits: a factor, the values at both targets, and for ``cls_kd`` a constant."""
    of_weak = _key_factors(v, RANK != "final", RANK == "normalized" or RANK == "cls_kd")
    if RANK != "cls_kd":
        of_student = _key_factors(p, RANK != "weak", RANK == "normalized")
        return (of_student[0], of_student[1], of_student[2], of_student[0]), of_weak
    divisor = 1.0 + 1e-6 + tl.where(targets[0] >= 0, p[0], 0.0) + tl.where(targets[1] >= 0, p[1], 0.0)
    # A target that cannot occur makes it infinite: the student then adds nothing.
    by = 1.0 / divisor
    at_0 = -times(by, p[0])
    at_1 = -times(by, p[1])
    return (by, at_0, at_1, -by * p[6]), of_weak


@triton.jit
def rank_keys(d_s, d_w, cols, targets, of_student, of_weak, k, RANK: tl.constexpr):
    """The keys of tiles of s - m_s and w - m_w. A target above the rest in a softmax, whose exponential may overflow,
    has a value of its own there, as one beside which there is no rest; one that is not has the formula of the rest, so
    that equal logits make ties."""
    is_0 = cols == targets[0][:, None]
    is_1 = cols == targets[1][:, None]
    key = d_s * 0.0
    if RANK != "final":
        key = gradual_exp2(d_w * k) * of_weak[0][:, None]
        above = (d_w > 0.0) | (of_weak[0][:, None] == 0.0)
        key = tl.where(is_0 & above, of_weak[1][:, None], key)
        key = tl.where(is_1 & above, of_weak[2][:, None], key)
    if RANK == "weak":
        return key
    if RANK == "cls_kd":
        by = of_student[0][:, None]
        added = tl.where(by == 0.0, 0.0, d_s * by + of_student[3][:, None])
    else:
        added = gradual_exp2(d_s * k) * of_student[0][:, None]
    added = tl.where(is_0 & (d_s > 0.0), of_student[1][:, None], added)
    added = tl.where(is_1 & (d_s > 0.0), of_student[2][:, None], added)
    return added if RANK == "final" else key + added


@triton.jit
def row_terms(
    stats, x, targets, p, v, means, alpha, mu, ce_weight, smoothing, classes,
    WALK: tl.constexpr, SQUARE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What rows have before they are ranked, from their statistics, the logits x = (s_0, s_1, w_0, w_1) at the targets,
    both softmaxes and the batch means.

    Returns the parts target, weak and ce, for the student's gradient (factor of exp(s_j - m_s), values at the targets)
    and for the weak logits' gradient (the same, uniform, kept), and a probe that is NaN if the rows are.
    """
    _m_s, _z_s, _m_w, _z_w, linear, v_rest, v_cross, v_blocked, v_weak, linear_s = stats
    y_0, y_1, label_0, label_1 = targets
    square_0, square_1 = target_squares(p, targets, SQUARE)
    soft_0 = tl.where(y_0 >= 0, square_0 + label_0 - means[0], 0.0)
    soft_1 = tl.where(y_1 >= 0, square_1 + label_1 - means[1], 0.0)
    target = times(alpha, times(soft_0, p[0]) + times(soft_1, p[1]))

    ce, ce_student, ce_at_0, ce_at_1 = cross_entropy(
        (v_rest, v_cross, v_blocked), linear_s, targets, p, ce_weight, smoothing, classes, WALK
    )
    mass = label_0 + label_1
    if WALK.PROB:
        mass += v_rest

    uniform = tl.full((), 0.1, ACC) / classes.to(ACC)
    smoothed_0 = smoothed_at(y_0, label_0, 0.9, uniform)
    smoothed_1 = smoothed_at(y_1, label_1, 0.9, uniform)
    rest = rest_number(targets, classes).to(ACC)
    weak = times(smoothed_0, v[0]) + times(smoothed_1, v[1]) + uniform * (rest * v[6] - linear)
    if WALK.PROB:
        weak += 0.9 * (v_rest * v[6] - v_weak)
    # Every class has a share of the smoothed label, so one that the weak logits exclude makes the term infinite.
    weak = times(mu, tl.where(linear == NEG_INF, INF, weak))

    # p_k (P_0 + P_1) - P_k, as in the CE.
    at_0 = alpha * (soft_1 * p[2] - soft_0 * (p[4] + p[3])) + ce_at_0
    at_1 = alpha * (soft_0 * p[3] - soft_1 * (p[4] + p[2])) + ce_at_1
    smoothed_mass = 0.9 * mass + 0.1
    student = (
        alpha * (soft_0 + soft_1) * p[5] + ce_student,
        tl.where(x[0] == NEG_INF, 0.0, at_0),
        tl.where(x[1] == NEG_INF, 0.0, at_1),
    )
    of_weak = (
        mu * smoothed_mass * v[5],
        tl.where(x[2] == NEG_INF, 0.0, mu * (v[2] * smoothed_mass - smoothed_0)),
        tl.where(x[3] == NEG_INF, 0.0, mu * (v[3] * smoothed_mass - smoothed_1)),
        mu * uniform,
        mu * 0.9,
    )
    return (target, weak, ce), student, of_weak, 0.0 * (p[4] + v[4] + mass)


@triton.jit
def load_targets(student, weak, targets, rows, UNIT: tl.constexpr, ACC: tl.constexpr):
    """(s_0, s_1, w_0, w_1): the logits at the targets."""
    return (
        load_at(student, targets[0], rows, NEG_INF, UNIT, ACC),
        load_at(student, targets[1], rows, NEG_INF, UNIT, ACC),
        load_at(weak, targets[0], rows, NEG_INF, UNIT, ACC),
        load_at(weak, targets[1], rows, NEG_INF, UNIT, ACC),
    )


@triton.jit
def rank_terms(zipf_sum, zipf_cross, z_s, y_0, y_1, classes, beta):
    """The part non_target, and for the student's gradient what is added to its factor of exp(s_j - m_s) and the factor
    of 1 / rank, from sums over the classes that are no target and can occur: of 1 / rank, and times s_j - m_s."""
    rest = rest_number((y_0, y_1), classes)
    # One class outside the targets is sure of itself, and none has nothing to say.
    some = (rest > 1) & (zipf_sum != 0.0) & (z_s != 0.0)
    zipf_sum = tl.where(some, zipf_sum, 1.0)
    z_s = tl.where(some, z_s, 1.0)
    by = tl.where(some, beta, 0.0)
    return times(by, tl.log2(z_s) * LN2 - zipf_cross / zipf_sum), by / z_s, -by / zipf_sum
