# mypy: ignore-errors
# Triton compiles these functions; to a type checker they are not Python.
"""The formulas of USKD in Triton: targets of rows, their statistics, rank keys, loss parts and gradients.

As in :mod:`triton_rows` the sums run over the classes that are no target, relative to the largest logit among them, and
the at most two targets join afterwards. The gradients are, at a class j that is no target,

    d/ds_j = student * exp(s_j - m_s) + zipf / rank_j - ce_weight V_j
    d/dw_j = weak * exp(w_j - m_w) - uniform - kept V_j

and at a target a value of its own. Only ``zipf``, the share of the non-target softmax in ``student``, and one part of
the loss wait for the ranks.

Functions that walk rows take tiles (ROWS, BLOCK). With HELD a row fits one tile, and the compiler then unrolls every
walk and loads each tile once. ``view`` is (base pointers of rows (ROWS,), column stride) of a matrix, ``rows`` whether
a row is to be read. A target that there is not has the class -1, the logit -inf and the label 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton_rows import load_index, times, zero_if_empty

_NEG_INF = tl.constexpr(float("-inf"))
_INF = tl.constexpr(float("inf"))
_LN2 = tl.constexpr(0.6931471805599453)
_NO_CLASS = tl.constexpr(2147483647)


@triton.jit
def load_tile(view, cols, mask, other, UNIT: tl.constexpr, ACC: tl.constexpr):
    base, stride = view
    if UNIT:
        return tl.load(base[:, None] + cols, mask=mask, other=other).to(ACC)
    return tl.load(base[:, None] + cols.to(tl.int64) * stride, mask=mask, other=other).to(ACC)


@triton.jit
def _load_at(view, y, rows, other, UNIT: tl.constexpr, ACC: tl.constexpr):
    """One entry of each row, or ``other`` where the class is -1."""
    base, stride = view
    pointers = base + y if UNIT else base + y.to(tl.int64) * stride
    return tl.load(pointers, mask=rows & (y >= 0), other=other).to(ACC)


@triton.jit
def _largest(
    labels, rows, classes, skip,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The largest label besides that of the class ``skip``, the lowest class that has it, and the smallest label."""
    best = tl.full([ROWS, BLOCK], _NEG_INF, ACC)
    at = tl.full([ROWS, BLOCK], _NO_CLASS, tl.int32)
    smallest = tl.full([ROWS, BLOCK], _INF, ACC)
    for start in range(0, BLOCK if HELD else classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        mask = rows[:, None] & (cols < classes)
        v = load_tile(labels, cols, mask, _NEG_INF, UNIT, ACC)
        smallest = tl.minimum(smallest, tl.where(mask, v, _INF))
        better = (v > best) & (cols != skip[:, None])
        best, at = tl.where(better, v, best), tl.where(better, cols, at)
    largest = tl.max(best, 1)
    return largest, tl.min(tl.where(best == largest[:, None], at, _NO_CLASS), 1), tl.min(smallest, 1)


@triton.jit
def find_targets(
    target, row, inside, target_row, target_col, ignore_index, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, HELD: tl.constexpr, UNIT: tl.constexpr,
    PROB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(y_0, y_1, V_0, V_1), whether rows count, 1 or NaN for an index out of range, and the view of the labels.

    Of probabilities the targets are the at most two largest that exceed the row's smallest; NaN is passed over here.
    """
    nothing = tl.full([ROWS], -1, tl.int32)
    if not PROB:
        y, counted, valid = load_index(target, row, inside, target_row, ignore_index, classes)
        one = tl.full([ROWS], 1.0, ACC)
        return (y, nothing, one, one - one), counted, valid.to(ACC), (target + row, target_col)
    labels = (target + row * (target_row // VEC * VEC), target_col)
    v_0, y_0, smallest = _largest(labels, inside, classes, nothing, ROWS, BLOCK, HELD, UNIT, ACC)
    v_1, y_1, _ = _largest(labels, inside, classes, y_0, ROWS, BLOCK, HELD, UNIT, ACC)
    found_0 = v_0 > smallest
    found_1 = v_1 > smallest
    targets = (
        tl.where(found_0, y_0, -1),
        tl.where(found_1, y_1, -1),
        tl.where(found_0, v_0, 0.0),
        tl.where(found_1, v_1, 0.0),
    )
    return targets, inside, tl.full([ROWS], 1.0, ACC), labels


@triton.jit
def _is_rest(cols, classes, rows, targets):
    return rows[:, None] & (cols < classes) & (cols != targets[0][:, None]) & (cols != targets[1][:, None])


@triton.jit
def rest_sum(
    view, targets, rows, classes, k,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(m, z) of one matrix: the largest logit outside the targets, 0 if all are -inf, and the sum of exponentials."""
    top = tl.full([ROWS, BLOCK], _NEG_INF, ACC)
    for start in range(0, BLOCK if HELD else classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        mask = rows[:, None] & (cols < classes)
        rest = _is_rest(cols, classes, rows, targets)
        top = tl.maximum(top, tl.where(rest, load_tile(view, cols, mask, _NEG_INF, UNIT, ACC), _NEG_INF))
    m = zero_if_empty(tl.max(top, 1))
    z = tl.zeros([ROWS, BLOCK], ACC)
    for start in range(0, BLOCK if HELD else classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        mask = rows[:, None] & (cols < classes)
        rest = _is_rest(cols, classes, rows, targets)
        x = tl.where(rest, load_tile(view, cols, mask, _NEG_INF, UNIT, ACC), _NEG_INF)
        z += tl.exp2((x - m[:, None]) * k)
    return m, tl.sum(z, 1)


@triton.jit
def row_statistics(
    student, weak, labels, targets, rows, classes, k,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr, UNIT: tl.constexpr, PROB: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """(m_s, z_s, m_w, z_w, linear, v_rest, v_cross, v_blocked, v_weak), sums over the classes outside the targets.

    linear = sum w_j - m_w. The others are of probabilities V, else 0: sum V_j, sum V_j (s_j - m_s) of the classes that
    can occur, sum V_j of those that cannot, and sum V_j (w_j - m_w).
    """
    zero = tl.zeros([ROWS, BLOCK], ACC)
    top_s, top_w = zero + _NEG_INF, zero + _NEG_INF
    for start in range(0, BLOCK if HELD else classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        rest = _is_rest(cols, classes, rows, targets)
        mask = rows[:, None] & (cols < classes)
        top_s = tl.maximum(top_s, tl.where(rest, load_tile(student, cols, mask, _NEG_INF, UNIT, ACC), _NEG_INF))
        top_w = tl.maximum(top_w, tl.where(rest, load_tile(weak, cols, mask, _NEG_INF, UNIT, ACC), _NEG_INF))
    m_s = zero_if_empty(tl.max(top_s, 1))
    m_w = zero_if_empty(tl.max(top_w, 1))
    z_s, z_w, linear, v_rest, v_cross, v_blocked, v_weak = zero, zero, zero, zero, zero, zero, zero
    for start in range(0, BLOCK if HELD else classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        rest = _is_rest(cols, classes, rows, targets)
        mask = rows[:, None] & (cols < classes)
        d_s = tl.where(rest, load_tile(student, cols, mask, _NEG_INF, UNIT, ACC), _NEG_INF) - m_s[:, None]
        d_w = tl.where(rest, load_tile(weak, cols, mask, _NEG_INF, UNIT, ACC), _NEG_INF) - m_w[:, None]
        z_s += tl.exp2(d_s * k)
        z_w += tl.exp2(d_w * k)
        linear += tl.where(rest, d_w, 0.0)
        if PROB:
            v = tl.where(rest, load_tile(labels, cols, mask, 0.0, UNIT, ACC), 0.0)
            impossible = d_s == _NEG_INF
            v_rest += v
            v_cross += tl.where(impossible, 0.0, v * d_s)
            v_blocked += tl.where(impossible, v, 0.0)
            v_weak += tl.where(rest, v * d_w, 0.0)
    sums = (tl.sum(z_s, 1), tl.sum(z_w, 1), tl.sum(linear, 1))
    of_labels = (tl.sum(v_rest, 1), tl.sum(v_cross, 1), tl.sum(v_blocked, 1), tl.sum(v_weak, 1))
    return m_s, sums[0], m_w, sums[1], sums[2], of_labels[0], of_labels[1], of_labels[2], of_labels[3]


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 to the last digits: the quotient undoes what rounding 1 + x did."""
    u = 1.0 + x
    exact = u == 1.0
    return tl.where(exact, x, tl.log2(u) * _LN2 * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def split_softmax(x_0, x_1, m, z, k):
    """Softmax of rows split into two targets and the rest, of which the largest logit m and the sum z are known.

    Returns -log p_0, -log p_1, p_0, p_1, the rest's probability, the factor with which p_j = factor * exp(x_j - m), and
    the number from which x_j - m is taken to have -log p_j. NaN where a logit is NaN or +inf.
    """
    no_rest = z == 0.0
    top = tl.maximum(tl.maximum(x_0, x_1), tl.where(no_rest, _NEG_INF, m))
    factor = tl.where(no_rest, 0.0, tl.exp2((m - top) * k))
    rest = z * factor
    e_0 = tl.exp2((x_0 - top) * k)
    e_1 = tl.exp2((x_1 - top) * k)
    # A target above the rest has the exponential 1, which is added last, so that p near 1 keeps the digits of log p.
    below = rest + tl.where(x_0 == top, e_1, tl.where(x_1 == top, e_0, e_0 + e_1))
    led = (x_0 == top) | (x_1 == top)
    total = tl.where(led, 1.0 + below, below)
    log_total = tl.where(led, _log1p(below), tl.log2(total) * _LN2)
    total += 0.0 * top  # NaN if that is infinite
    log_rest = tl.where(no_rest, 0.0, log_total + (top - m))
    nll_0 = log_total + (top - x_0)
    nll_1 = log_total + (top - x_1)
    return nll_0, nll_1, e_0 / total, e_1 / total, rest / total, factor / total, log_rest


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
    has a value of its own there; one that is not has the formula of the rest, so that equal logits make ties."""
    is_0 = cols == targets[0][:, None]
    is_1 = cols == targets[1][:, None]
    key = d_s * 0.0
    if RANK != "final":
        key = tl.exp2(d_w * k) * of_weak[0][:, None]
        key = tl.where(is_0 & (d_w > 0.0), of_weak[1][:, None], key)
        key = tl.where(is_1 & (d_w > 0.0), of_weak[2][:, None], key)
    if RANK == "weak":
        return key
    if RANK == "cls_kd":
        by = of_student[0][:, None]
        added = tl.where(by == 0.0, 0.0, d_s * by + of_student[3][:, None])
    else:
        added = tl.exp2(d_s * k) * of_student[0][:, None]
    added = tl.where(is_0 & (d_s > 0.0), of_student[1][:, None], added)
    added = tl.where(is_1 & (d_s > 0.0), of_student[2][:, None], added)
    return added if RANK == "final" else key + added


@triton.jit
def _smoothed_at(y, label, uniform):
    return tl.where(y >= 0, 0.9 * label + uniform, 0.0)


@triton.jit
def row_terms(
    stats, x, targets, p, v, means, alpha, mu, ce_weight, classes,
    PROB: tl.constexpr, SQUARE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What rows have before they are ranked, from their statistics, the logits x = (s_0, s_1, w_0, w_1) at the targets,
    both softmaxes and the batch means.

    Returns the parts target, weak and ce, for the student's gradient (factor of exp(s_j - m_s), values at the targets)
    and for the weak logits' gradient (the same, uniform, kept), and a probe that is NaN if the rows are.
    """
    _m_s, _z_s, _m_w, _z_w, linear, v_rest, v_cross, v_blocked, v_weak = stats
    y_0, y_1, label_0, label_1 = targets
    square_0, square_1 = target_squares(p, targets, SQUARE)
    soft_0 = tl.where(y_0 >= 0, square_0 + label_0 - means[0], 0.0)
    soft_1 = tl.where(y_1 >= 0, square_1 + label_1 - means[1], 0.0)
    target = times(alpha, times(soft_0, p[0]) + times(soft_1, p[1]))

    ce = times(label_0, p[0]) + times(label_1, p[1])
    mass = label_0 + label_1
    if PROB:
        mass += v_rest
        free = v_rest - v_blocked
        ce += tl.where(free == 0.0, 0.0, free * p[6] - v_cross)
        ce = tl.where(v_blocked > 0.0, _INF, ce)
    ce = times(ce_weight, ce)

    uniform = tl.full((), 0.1, ACC) / classes.to(ACC)
    smoothed_0 = _smoothed_at(y_0, label_0, uniform)
    smoothed_1 = _smoothed_at(y_1, label_1, uniform)
    rest = (classes - (y_0 >= 0).to(tl.int32) - (y_1 >= 0).to(tl.int32)).to(ACC)
    weak = times(smoothed_0, v[0]) + times(smoothed_1, v[1]) + uniform * (rest * v[6] - linear)
    if PROB:
        weak += 0.9 * (v_rest * v[6] - v_weak)
    # Every class has a share of the smoothed label, so one that the weak logits exclude makes the term infinite.
    weak = times(mu, tl.where(linear == _NEG_INF, _INF, weak))

    # p_k (P_0 + P_1) - P_k and p_k sum V - V_k, with 1 - p_k as what the others have: nothing cancels as p_k -> 1.
    at_0 = alpha * (soft_1 * p[2] - soft_0 * (p[4] + p[3])) + ce_weight * (
        p[2] * (v_rest + label_1) - label_0 * (p[4] + p[3])
    )
    at_1 = alpha * (soft_0 * p[3] - soft_1 * (p[4] + p[2])) + ce_weight * (
        p[3] * (v_rest + label_0) - label_1 * (p[4] + p[2])
    )
    smoothed_mass = 0.9 * mass + 0.1
    student = (
        (alpha * (soft_0 + soft_1) + ce_weight * mass) * p[5],
        tl.where(x[0] == _NEG_INF, 0.0, at_0),
        tl.where(x[1] == _NEG_INF, 0.0, at_1),
    )
    of_weak = (
        mu * smoothed_mass * v[5],
        tl.where(x[2] == _NEG_INF, 0.0, mu * (v[2] * smoothed_mass - smoothed_0)),
        tl.where(x[3] == _NEG_INF, 0.0, mu * (v[3] * smoothed_mass - smoothed_1)),
        mu * uniform,
        mu * 0.9,
    )
    return (target, weak, ce), student, of_weak, 0.0 * (p[4] + v[4] + mass)


@triton.jit
def load_targets(student, weak, targets, rows, UNIT: tl.constexpr, ACC: tl.constexpr):
    """(s_0, s_1, w_0, w_1): the logits at the targets."""
    return (
        _load_at(student, targets[0], rows, _NEG_INF, UNIT, ACC),
        _load_at(student, targets[1], rows, _NEG_INF, UNIT, ACC),
        _load_at(weak, targets[0], rows, _NEG_INF, UNIT, ACC),
        _load_at(weak, targets[1], rows, _NEG_INF, UNIT, ACC),
    )


@triton.jit
def rank_terms(zipf_sum, zipf_cross, z_s, y_0, y_1, classes, beta):
    """The part non_target, and for the student's gradient what is added to its factor of exp(s_j - m_s) and the factor
    of 1 / rank, from sums over the classes that are no target and can occur: of 1 / rank, and times s_j - m_s."""
    rest = classes - (y_0 >= 0).to(tl.int32) - (y_1 >= 0).to(tl.int32)
    # One class outside the targets is sure of itself, and none has nothing to say.
    some = (rest > 1) & (zipf_sum != 0.0) & (z_s != 0.0)
    zipf_sum = tl.where(some, zipf_sum, 1.0)
    z_s = tl.where(some, z_s, 1.0)
    by = tl.where(some, beta, 0.0)
    return by * (tl.log2(z_s) * _LN2 - zipf_cross / zipf_sum), by / z_s, -by / zipf_sum


@triton.jit
def student_gradient(s, d_s, z, v, cols, targets, terms, k, PROB: tl.constexpr):
    """Tiles of it, from terms = (factor, at the first target, at the second, factor of z, ce_weight)."""
    g = terms[0][:, None] * tl.exp2(d_s * k) + terms[3][:, None] * z
    if PROB:
        g -= terms[4][:, None] * v
    g = tl.where(cols == targets[0][:, None], terms[1][:, None], g)
    g = tl.where(cols == targets[1][:, None], terms[2][:, None], g)
    return tl.where(s == _NEG_INF, 0.0, g)


@triton.jit
def weak_gradient(w, d_w, v, cols, targets, terms, k, PROB: tl.constexpr):
    """Tiles of it, from terms = (factor, at the first target, at the second, uniform, factor of V)."""
    g = terms[0][:, None] * tl.exp2(d_w * k) - terms[3][:, None]
    if PROB:
        g -= terms[4][:, None] * v
    g = tl.where(cols == targets[0][:, None], terms[1][:, None], g)
    g = tl.where(cols == targets[1][:, None], terms[2][:, None], g)
    return tl.where(w == _NEG_INF, 0.0, g)
