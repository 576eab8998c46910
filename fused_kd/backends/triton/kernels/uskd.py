"""The USKD kernels. :mod:`.uskd_rows` has the formulas and the conventions.

``target_probabilities`` makes what couples the rows. Then ``ranked_on_chip`` does rows that a program holds, sorting
them in registers; or ``write_keys`` makes keys, PyTorch sorts them, ``write_zipf`` brings 1 / rank into the classes'
order and ``combine_ranked`` finishes. The weak logits' gradient waits for no rank and is written before.

Meaning of the constexpr arguments besides those that :mod:`.on_chip` explains (ACC, VEC, COUNT, PER_ROW):

RANK     the key that classes are ranked by
SQUARE   p_k^2 in the targets' labels, else p_k
GRAD_S   the student's gradient is wanted; GRAD_W, the weak logits'
BY_ROW   batch_sums are those of each row, (3, rows), which every program adds up
HALF_S   the student's logits are float16: as HALF in :mod:`.on_chip`; HALF_W, the weak logits
WALK     how rows are walked, a :class:`fused_kd.backends.triton.plans.common.Walk`. Tiles are made by tl.full, since
         Triton 3.6 cannot pass the fields on to its own functions, such as tl.zeros:

ROWS     rows of a program
BLOCK    width of a tile
HELD     a row fits one tile
UNIT     and PROB, as in :mod:`.on_chip`
LINEAR   the CE's labels are smoothed, for which the sum of the student's logits is wanted

``factors`` is None where rows weigh the same, else (3, rows): of parts, the student's and the weak logits' gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.constants import LOG2E, NEG_INF
from fused_kd.backends.triton.kernels.on_chip import COUNT_BLOCK, gradient_scale, mean_divisor
from fused_kd.backends.triton.kernels.rows import as_scalars, kernel, load_factor, store_fields, sum_items
from fused_kd.backends.triton.kernels.targets import (
    ce_labels,
    class_gradient,
    find_targets,
    gradient_terms,
    load_tile,
    rest_sum,
    split_softmax,
    store_tile,
    tile_at,
)
from fused_kd.backends.triton.kernels.uskd_rows import (
    key_factors,
    load_targets,
    rank_keys,
    rank_terms,
    row_statistics,
    row_terms,
    target_squares,
)


@triton.jit
def batch_means(batch_sums, rows, BY_ROW: tl.constexpr, ACC: tl.constexpr):
    if BY_ROW:
        count = tl.maximum(sum_items(batch_sums + 2 * rows, rows, COUNT_BLOCK, ACC), 1.0)
        first = sum_items(batch_sums, rows, COUNT_BLOCK, ACC)
        return first / count, sum_items(batch_sums + rows, rows, COUNT_BLOCK, ACC) / count
    else:
        count = tl.maximum(tl.load(batch_sums + 2), 1.0)
        return (tl.load(batch_sums) / count).to(ACC), (tl.load(batch_sums + 1) / count).to(ACC)


@triton.jit
def store_norms(norms, values, row, ACC: tl.constexpr):
    tl.store(norms[0] + row * 0, tl.full(row.shape, values[0], ACC), mask=row == 0)
    tl.store(norms[1] + row * 0, tl.full(row.shape, values[1], ACC), mask=row == 0)


@kernel
def target_probabilities(
    student,
    target,
    row_sums,
    rows: tl.int64,
    classes: tl.int32,
    student_row: tl.int64,
    student_col: tl.int64,
    target_row: tl.int64,
    target_col: tl.int64,
    ignore_index: tl.int64,
    ACC: tl.constexpr,
    WALK: tl.constexpr,
    VEC: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """row_sums (3, rows): p_k^2, or p_k, of the first and of the second target, and 1 if the row counts."""
    k = tl.full((), LOG2E, ACC)
    classes = classes // VEC * VEC
    row = tl.program_id(0).to(tl.int64) * WALK.ROWS + tl.arange(0, WALK.ROWS)
    inside = row < rows
    targets, counted, valid, labels = find_targets(
        target, row, inside, target_row, target_col, ignore_index, classes, WALK, VEC, ACC
    )
    view = (student + row * (student_row // VEC * VEC), student_col)
    m, z = rest_sum(view, targets, counted, classes, k, WALK, ACC)
    logits = load_targets(view, view, targets, counted, WALK.UNIT, ACC)
    p = split_softmax(logits[0], logits[1], m, z, k)
    first, second = target_squares(p, targets, SQUARE)
    if WALK.PROB:
        # A NaN among the labels.
        total = tl.full(WALK.TILE, 0.0, ACC)
        for start in range(0, WALK.BLOCK if WALK.HELD else classes, WALK.BLOCK):
            cols, mask = tile_at(start, inside, classes, WALK)
            total += load_tile(labels, cols, mask, 0.0, WALK.UNIT, ACC)
        valid += 0.0 * tl.sum(total, 1)
    # An absent target adds 0, unless the row has no value; an index target has no second one.
    first = tl.where(counted, first * valid, 0.0)
    second = tl.where(counted & WALK.PROB, second * valid, 0.0)
    store_fields(row_sums, (first, second, counted.to(ACC)), rows, row, inside)


@triton.jit
def unranked_terms(
    views, targets, counted, valid, labels, means, alpha, mu, ce_weight, smoothing, classes, k,
    WALK: tl.constexpr, RANK: tl.constexpr, SQUARE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """All that rows have before they are ranked: see row_terms; the key factors; (m_s, z_s, m_w); 0, or NaN."""
    alpha, mu, ce_weight, smoothing = as_scalars((alpha, mu, ce_weight, smoothing), ACC)
    stats = row_statistics(views[0], views[1], labels, targets, counted, classes, k, WALK, ACC)
    x = load_targets(views[0], views[1], targets, counted, WALK.UNIT, ACC)
    p = split_softmax(x[0], x[1], stats[0], stats[1], k)
    v = split_softmax(x[2], x[3], stats[2], stats[3], k)
    parts, of_student, of_weak, probe = row_terms(
        stats, x, targets, p, v, means, alpha, mu, ce_weight, smoothing, classes, WALK, SQUARE, ACC
    )
    poison = probe + 0.0 * valid
    kept = (
        tl.where(counted, parts[0] + poison, 0.0),
        tl.where(counted, parts[1] + poison, 0.0),
        tl.where(counted, parts[2] + poison, 0.0),
    )
    return kept, of_student, of_weak, key_factors(p, v, targets, RANK), (stats[0], stats[1], stats[2]), poison


@triton.jit
def keys_and_weak_gradient(
    views, targets, counted, labels, of_weak, key, m_s, m_w, poison, gradient, by, factors, row, inside, start,
    classes, k,
    WALK: tl.constexpr, RANK: tl.constexpr, GRAD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The rank keys of a tile; writes the tile of the weak logits' gradient."""
    cols, mask = tile_at(start, counted, classes, WALK)
    w = load_tile(views[1], cols, mask, NEG_INF, WALK.UNIT, ACC)
    d_w = w - m_w[:, None]
    if GRAD:
        terms = gradient_terms(of_weak, 0.0, of_weak[4], of_weak[3], by, factors)
        g = class_gradient(w, d_w, None, labels, cols, mask, targets, terms, poison, k, WALK, ACC)
        store_tile(gradient, row, classes, cols, inside[:, None] & (cols < classes), g)
    d_s = load_tile(views[0], cols, mask, NEG_INF, WALK.UNIT, ACC) - m_s[:, None]
    # Adding 0 makes -0 equal to 0 in its bits too.
    return rank_keys(d_s, d_w, cols, targets, key[0], key[1], k, RANK) + 0.0


@kernel
def ranked_on_chip(
    student,
    weak,
    target,
    batch_sums,
    student_gradients,
    weak_gradients,
    loss,
    parts,
    student_norm,
    weak_norm,
    counts,
    factors,
    rows: tl.int64,
    classes: tl.int32,
    student_row: tl.int64,
    student_col: tl.int64,
    weak_row: tl.int64,
    weak_col: tl.int64,
    target_row: tl.int64,
    target_col: tl.int64,
    count_items: tl.int32,
    ignore_index: tl.int64,
    alpha: tl.float64,
    beta: tl.float64,
    mu: tl.float64,
    ce_weight: tl.float64,
    smoothing: tl.float64,
    student_scale: tl.float64,
    weak_scale: tl.float64,
    student_norm_value: tl.float64,
    weak_norm_value: tl.float64,
    ACC: tl.constexpr,
    WALK: tl.constexpr,
    VEC: tl.constexpr,
    RANK: tl.constexpr,
    SQUARE: tl.constexpr,
    GRAD_S: tl.constexpr,
    GRAD_W: tl.constexpr,
    COUNT: tl.constexpr,
    HALF_S: tl.constexpr,
    HALF_W: tl.constexpr,
    PER_ROW: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """ROWS whole rows per program, float32. A row is sorted as words of 64 bits: a key's, which order as the keys
    descend, above the class, which thus breaks ties. After that the student's logits are read again in that order, from
    the nearest cache, and its gradient is written in it: that is less to move than ranks to be brought back."""
    k = tl.full((), LOG2E, ACC)
    classes = classes // VEC * VEC
    row = tl.program_id(0).to(tl.int64) * WALK.ROWS + tl.arange(0, WALK.ROWS)
    inside = row < rows
    targets, counted, valid, labels = find_targets(
        target, row, inside, target_row, target_col, ignore_index, classes, WALK, VEC, ACC
    )
    views = (
        (student + row * (student_row // VEC * VEC), student_col),
        (weak + row * (weak_row // VEC * VEC), weak_col),
    )
    if factors is not None:
        factor = load_factor(factors, 0, rows, row, inside, ACC)
        counted &= factor != 0.0
    means = batch_means(batch_sums, rows, BY_ROW, ACC)
    row_parts, of_student, of_weak, key_terms, stats, poison = unranked_terms(
        views, targets, counted, valid, labels, means, alpha, mu, ce_weight, smoothing, classes, k,
        WALK, RANK, SQUARE, ACC,
    )  # fmt: skip
    divisor = mean_divisor(counts, target_row, count_items, ignore_index, COUNT)
    by = gradient_scale(weak_scale, divisor, ACC, HALF_W)
    if factors is not None:
        row_parts = (row_parts[0] * factor, row_parts[1] * factor, row_parts[2] * factor)
        by *= load_factor(factors, 2, rows, row, inside, ACC)
    key = keys_and_weak_gradient(
        views, targets, counted, labels, of_weak, key_terms, stats[0], stats[2], poison, weak_gradients, by, factors,
        row, inside, 0, classes, k, WALK, RANK, GRAD_W, ACC,
    )  # fmt: skip
    position = tl.arange(0, WALK.BLOCK)[None, :]
    bits = key.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ -2147483648, bits ^ -1)
    # What is past the row's end sorts last.
    words = tl.where(position < classes, (bits.to(tl.int64) << 32) | position.to(tl.int64), 9223372036854775807)
    cols = (tl.sort(words) & 2147483647).to(tl.int32)

    in_row = position < classes
    mask = counted[:, None] & in_row
    s = load_tile(views[0], cols, mask, NEG_INF, WALK.UNIT, ACC)
    z = 1.0 / (position + 1).to(ACC)
    d_s = s - stats[0][:, None]
    takes = (s != NEG_INF) & (cols != targets[0][:, None]) & (cols != targets[1][:, None])
    zipf_sum = tl.sum(tl.where(takes, z, 0.0), 1)
    zipf_cross = tl.sum(tl.where(takes, z * d_s, 0.0), 1)
    beta, ce_weight, smoothing = as_scalars((beta, ce_weight, smoothing), ACC)
    non_target, more, by_zipf = rank_terms(zipf_sum, zipf_cross, stats[1], targets[0], targets[1], classes, beta)
    non_target = tl.where(counted, non_target + poison, 0.0)
    if factors is not None:
        non_target *= factor
    store_fields(parts, (row_parts[0], non_target, row_parts[1], row_parts[2]), rows, row, inside)
    if PER_ROW:
        tl.store(loss + row, row_parts[0] + non_target + row_parts[1] + row_parts[2], mask=inside)
        store_norms((student_norm, weak_norm), (student_norm_value, weak_norm_value), row, ACC)
    if GRAD_S:
        by = gradient_scale(student_scale, divisor, ACC, HALF_S)
        if factors is not None:
            by *= load_factor(factors, 1, rows, row, inside, ACC)
        kept, uniform = ce_labels(ce_weight, smoothing, classes, WALK)
        of_row = (of_student[0] + more, of_student[1], of_student[2])
        terms = gradient_terms(of_row, by_zipf, kept, uniform, by, factors)
        g = class_gradient(s, d_s, z, labels, cols, mask, targets, terms, poison, k, WALK, ACC)
        store_tile(student_gradients, row, classes, cols, inside[:, None] & in_row, g)
