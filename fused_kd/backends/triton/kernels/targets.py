"""Rows with up to two targets, for USKD and Zipf's label smoothing: find the targets, split the softmax into targets
and rest, and compute the cross-entropy and the student's gradient.

As in :mod:`.rows` sums run over the classes that are no target, relative to the largest logit among them. The targets
join afterwards. The student's gradient at a class j that is no target is

    d/ds_j = factor * exp(s_j - m_s) + zipf * z_j - uniform - kept V_j

and each target has a separate value. ``uniform`` and ``kept`` belong to the CE, which smooths its labels with LINEAR.

Functions that walk rows take tiles (ROWS, BLOCK), fields of WALK (:mod:`.uskd`). With HELD a row fits one tile, and the
compiler then unrolls every walk and loads each tile once. ``view`` is (base pointers of rows (ROWS,), column stride) of
a matrix, ``rows`` a mask of the rows to read. A missing target has class -1, logit -inf and label 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.constants import INF, LN2, NEG_INF, NO_CLASS
from fused_kd.backends.triton.kernels.rows import at, load_index, narrowed, times, zero_if_empty


@triton.jit
def load_tile(view, cols, mask, other, UNIT: tl.constexpr, ACC: tl.constexpr):
    base, stride = view
    return tl.load(at(base[:, None], cols, stride, UNIT), mask=mask, other=other).to(ACC)


@triton.jit
def store_tile(gradient, row, classes, cols, mask, g):
    tl.store(gradient + (row * classes)[:, None] + cols, narrowed(g, gradient.dtype.element_ty), mask=mask)


@triton.jit
def load_at(view, y, rows, other, UNIT: tl.constexpr, ACC: tl.constexpr):
    """Load one entry of each row, or ``other`` if the class is -1."""
    base, stride = view
    return tl.load(at(base, y, stride, UNIT), mask=rows & (y >= 0), other=other).to(ACC)


@triton.jit
def tile_at(start, rows, classes, WALK: tl.constexpr):
    """Return the classes of a tile, (1, BLOCK), and a mask of what to read of it."""
    cols = start + tl.arange(0, WALK.BLOCK)[None, :]
    return cols, rows[:, None] & (cols < classes)


@triton.jit
def _largest(labels, rows, classes, skip, WALK: tl.constexpr, ACC: tl.constexpr):
    """Return the largest label except for the class ``skip``, the lowest class that has it, and the smallest label."""
    best = tl.full(WALK.TILE, NEG_INF, ACC)
    index = tl.full(WALK.TILE, NO_CLASS, tl.int32)
    smallest = tl.full(WALK.TILE, INF, ACC)
    for start in range(0, WALK.BLOCK if WALK.HELD else classes, WALK.BLOCK):
        cols, mask = tile_at(start, rows, classes, WALK)
        v = load_tile(labels, cols, mask, NEG_INF, WALK.UNIT, ACC)
        smallest = tl.minimum(smallest, tl.where(mask, v, INF))
        better = (v > best) & (cols != skip[:, None])
        best, index = tl.where(better, v, best), tl.where(better, cols, index)
    largest = tl.max(best, 1)
    return largest, tl.min(tl.where(best == largest[:, None], index, NO_CLASS), 1), tl.min(smallest, 1)


@triton.jit
def find_targets(
    target, row, inside, target_row, target_col, ignore_index, classes,
    WALK: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return (y_0, y_1, V_0, V_1), a mask of the rows that count, 1 or NaN for an index out of range, and the view of
    the labels.

    The targets of probabilities are up to two largest entries that exceed the row's smallest. NaN is skipped here.
    """
    nothing = tl.full(WALK.COLUMN, -1, tl.int32)
    if not WALK.PROB:
        y, counted, valid = load_index(target, row, inside, target_row, ignore_index, classes)
        one = tl.full(WALK.COLUMN, 1.0, ACC)
        return (y, nothing, one, one - one), counted, valid.to(ACC), (target + row, target_col)
    labels = (target + row * (target_row // VEC * VEC), target_col)
    v_0, y_0, smallest = _largest(labels, inside, classes, nothing, WALK, ACC)
    v_1, y_1, _ = _largest(labels, inside, classes, y_0, WALK, ACC)
    found_0 = v_0 > smallest
    found_1 = v_1 > smallest
    targets = (
        tl.where(found_0, y_0, -1),
        tl.where(found_1, y_1, -1),
        tl.where(found_0, v_0, 0.0),
        tl.where(found_1, v_1, 0.0),
    )
    return targets, inside, tl.full(WALK.COLUMN, 1.0, ACC), labels


@triton.jit
def is_rest(cols, mask, targets):
    return mask & (cols != targets[0][:, None]) & (cols != targets[1][:, None])


@triton.jit
def rest_maximum(view, targets, rows, classes, WALK: tl.constexpr, ACC: tl.constexpr):
    """Return the largest logit outside the targets, 0 if all are -inf."""
    top = tl.full(WALK.TILE, NEG_INF, ACC)
    for start in range(0, WALK.BLOCK if WALK.HELD else classes, WALK.BLOCK):
        cols, mask = tile_at(start, rows, classes, WALK)
        x = load_tile(view, cols, mask, NEG_INF, WALK.UNIT, ACC)
        top = tl.maximum(top, tl.where(is_rest(cols, mask, targets), x, NEG_INF))
    return zero_if_empty(tl.max(top, 1))


@triton.jit
def rest_sum(view, targets, rows, classes, k, WALK: tl.constexpr, ACC: tl.constexpr):
    """Return (m, z) of one matrix: :func:`rest_maximum`, and the sum of exponentials."""
    m = rest_maximum(view, targets, rows, classes, WALK, ACC)
    z = tl.full(WALK.TILE, 0.0, ACC)
    for start in range(0, WALK.BLOCK if WALK.HELD else classes, WALK.BLOCK):
        cols, mask = tile_at(start, rows, classes, WALK)
        x = load_tile(view, cols, mask, NEG_INF, WALK.UNIT, ACC)
        x = tl.where(is_rest(cols, mask, targets), x, NEG_INF)
        z += tl.exp2((x - m[:, None]) * k)
    return m, tl.sum(z, 1)


@triton.jit
def rest_number(targets, classes):
    """Return the number of classes that are no target."""
    return classes - (targets[0] >= 0).to(tl.int32) - (targets[1] >= 0).to(tl.int32)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 to the last digits: the quotient corrects the rounding of 1 + x."""
    u = 1.0 + x
    exact = u == 1.0
    return tl.where(exact, x, tl.log2(u) * LN2 * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def gradual_exp2(x):
    """2^x with subnormal results, which the hardware's instruction flushes to 0. Order or sign may depend on them."""
    low = x < -64.0
    return tl.exp2(tl.where(low, x + 64.0, x)) * tl.where(low, 5.421010862427522e-20, 1.0)  # 2^-64


@triton.jit
def split_softmax(x_0, x_1, m, z, k):
    """Split the softmax of rows into two targets and the rest, given the rest's largest logit m and sum z.

    Return -log p_0, -log p_1, p_0, p_1, the rest's probability, the factor in p_j = factor * exp(x_j - m), and the
    number log_rest in -log p_j = log_rest - (x_j - m). All are NaN if a logit is NaN or +inf.
    """
    no_rest = z == 0.0
    top = tl.maximum(tl.maximum(x_0, x_1), tl.where(no_rest, NEG_INF, m))
    factor = tl.where(no_rest, 0.0, gradual_exp2((m - top) * k))
    rest = z * factor
    e_0 = tl.exp2((x_0 - top) * k)
    e_1 = tl.exp2((x_1 - top) * k)
    # A target above the rest has the exponential 1. Adding it last keeps the digits of log p for p near 1.
    below = rest + tl.where(x_0 == top, e_1, tl.where(x_1 == top, e_0, e_0 + e_1))
    led = (x_0 == top) | (x_1 == top)
    total = tl.where(led, 1.0 + below, below)
    log_total = tl.where(led, _log1p(below), tl.log2(total) * LN2)
    total += 0.0 * top  # NaN if that is infinite
    log_rest = tl.where(no_rest, 0.0, log_total + (top - m))
    nll_0 = log_total + (top - x_0)
    nll_1 = log_total + (top - x_1)
    return nll_0, nll_1, e_0 / total, e_1 / total, rest / total, factor / total, log_rest


@triton.jit
def ce_labels(ce_weight, smoothing, classes, WALK: tl.constexpr):
    """Return ce_weight times (1 - e) and e / C, the terms of the CE's labels V' = (1 - e) V + e / C."""
    if not WALK.LINEAR:
        return ce_weight, ce_weight * 0.0
    return ce_weight * (1.0 - smoothing), ce_weight * smoothing / classes.to(ce_weight.dtype)


@triton.jit
def cross_entropy(of_labels, linear, targets, p, ce_weight, smoothing, classes, WALK: tl.constexpr):
    """Return ce_weight CE(s, V') and, for its gradient, the factor of exp(s_j - m_s) and the values at the targets.

    ``of_labels`` are (v_rest, v_cross, v_blocked); ``linear`` is sum s_j - m_s, -inf if a class cannot occur.
    """
    y_0, y_1, label_0, label_1 = targets
    v_rest, v_cross, v_blocked = of_labels
    ce = times(label_0, p[0]) + times(label_1, p[1])
    mass = label_0 + label_1
    if WALK.PROB:
        mass += v_rest
        free = v_rest - v_blocked
        ce += tl.where(free == 0.0, 0.0, free * p[6] - v_cross)
        ce = tl.where(v_blocked > 0.0, INF + 0.0 * p[4], ce)  # NaN where no class can occur
    if WALK.LINEAR:
        uniform = smoothing / classes.to(mass.dtype)
        rest = rest_number(targets, classes).to(mass.dtype)
        # A smoothed label covers every class, so one that cannot occur makes the CE infinite.
        all_logs = rest * p[6] - linear + tl.where(y_0 >= 0, p[0], 0.0) + tl.where(y_1 >= 0, p[1], 0.0)
        ce = (1.0 - smoothing) * ce + times(uniform, all_logs)
        v_rest = (1.0 - smoothing) * v_rest + rest * uniform
        label_0 = smoothed_at(y_0, label_0, 1.0 - smoothing, uniform)
        label_1 = smoothed_at(y_1, label_1, 1.0 - smoothing, uniform)
        mass = (1.0 - smoothing) * mass + smoothing
    # p_k sum V - V_k, with 1 - p_k as the sum of the others: nothing cancels as p_k -> 1.
    at_0 = ce_weight * (p[2] * (v_rest + label_1) - label_0 * (p[4] + p[3]))
    at_1 = ce_weight * (p[3] * (v_rest + label_0) - label_1 * (p[4] + p[2]))
    return times(ce_weight, ce), ce_weight * mass * p[5], at_0, at_1


@triton.jit
def smoothed_at(y, label, kept, uniform):
    return tl.where(y >= 0, kept * label + uniform, 0.0)


@triton.jit
def gradient_terms(of_row, by_zipf, kept, uniform, by, factors):
    """Return what :func:`class_gradient` needs of a row: ``of_row`` (the factor of exp(x_j - m), and the values at both
    targets), and the factors of z and of V_j, and a constant, all times ``by``."""
    if factors is None:  # then these are one number for all rows
        kept, uniform = (kept * by)[None], (uniform * by)[None]
    else:
        kept, uniform = kept * by, uniform * by
    return of_row[0] * by, of_row[1] * by, of_row[2] * by, by_zipf * by, kept, uniform


@triton.jit
def class_gradient(x, d, z, labels, cols, mask, targets, terms, poison, k, WALK: tl.constexpr, ACC: tl.constexpr):
    """Compute tiles of a gradient from :func:`gradient_terms` and d = x - m. ``z`` is None for the weak logits, which
    are not ranked, and whose labels are always smoothed. It is NaN if the row's ``poison`` is, but 0 at a class that
    cannot occur."""
    factor, at_0, at_1, by_zipf, kept, uniform = terms
    if WALK.PROB:
        v = load_tile(labels, cols, mask, 0.0, WALK.UNIT, ACC)
    g = factor[:, None] * tl.exp2(d * k)
    if z is not None:
        g += by_zipf[:, None] * z
    if (z is None) or WALK.LINEAR:
        g -= uniform[:, None]
    if WALK.PROB:
        g -= kept[:, None] * v
    g = tl.where(cols == targets[0][:, None], at_0[:, None], g)
    g = tl.where(cols == targets[1][:, None], at_1[:, None], g)
    return tl.where(x == NEG_INF, 0.0, g + poison[:, None])
