"""The USKD kernels around a sort by PyTorch, for rows that no program holds and for float64.

``write_keys`` makes keys, which are then sorted; ``write_zipf`` brings 1 / rank into the classes' order, and
``combine_ranked`` finishes. The sort moves several times what these do, so they read their rows as often as is simple.
The arguments are those of :mod:`.uskd`; a launch does the rows from ``first`` to ``last``.
"""

from __future__ import annotations

import triton.language as tl

from fused_kd.backends.triton.kernels.constants import LOG2E, NEG_INF
from fused_kd.backends.triton.kernels.on_chip import gradient_scale, mean_divisor
from fused_kd.backends.triton.kernels.rows import as_scalars, kernel, load_factor, load_fields, store_fields
from fused_kd.backends.triton.kernels.targets import (
    ce_labels,
    class_gradient,
    find_targets,
    gradient_terms,
    load_tile,
    store_tile,
    tile_at,
)
from fused_kd.backends.triton.kernels.uskd import (
    batch_means,
    keys_and_weak_gradient,
    store_norms,
    unranked_terms,
)
from fused_kd.backends.triton.kernels.uskd_rows import rank_terms

#: The class of a row that does not count, where another kernel's rows have their first target or -1.
_IGNORED = tl.constexpr(-2)


@kernel
def write_keys(
    student,
    weak,
    target,
    batch_sums,
    weak_gradients,
    parts,
    counts,
    factors,
    keys,
    states,
    columns,
    rows: tl.int64,
    first: tl.int64,
    last: tl.int64,
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
    mu: tl.float64,
    ce_weight: tl.float64,
    smoothing: tl.float64,
    weak_scale: tl.float64,
    ACC: tl.constexpr,
    WALK: tl.constexpr,
    VEC: tl.constexpr,
    RANK: tl.constexpr,
    SQUARE: tl.constexpr,
    GRAD_W: tl.constexpr,
    COUNT: tl.constexpr,
    HALF_W: tl.constexpr,
):
    """Keys of ROWS rows, the parts that need no ranks, the weak logits' gradient; and what combine_ranked needs:
    states (6, rows), and as columns (2, rows) the targets."""
    k = tl.full((), LOG2E, ACC)
    classes = classes // VEC * VEC
    local_row = tl.program_id(0).to(tl.int64) * WALK.ROWS + tl.arange(0, WALK.ROWS)
    row = first + local_row
    inside = row < last
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
    means = batch_means(batch_sums, rows, False, ACC)
    row_parts, of_student, of_weak, key_terms, stats, poison = unranked_terms(
        views, targets, counted, valid, labels, means, alpha, mu, ce_weight, smoothing, classes, k,
        WALK, RANK, SQUARE, ACC,
    )  # fmt: skip
    if factors is not None:
        row_parts = (row_parts[0] * factor, row_parts[1] * factor, row_parts[2] * factor)
    tl.store(parts + row, row_parts[0], mask=inside)
    store_fields(parts + 2 * rows, (row_parts[1], row_parts[2]), rows, row, inside)
    store_fields(columns, (tl.where(counted, targets[0], _IGNORED), targets[1]), rows, row, inside)
    store_fields(states, (stats[0], stats[1], of_student[0], of_student[1], of_student[2], poison), rows, row, inside)
    divisor = mean_divisor(counts, target_row, count_items, ignore_index, COUNT)
    by = gradient_scale(weak_scale, divisor, ACC, HALF_W)
    if factors is not None:
        by *= load_factor(factors, 2, rows, row, inside, ACC)
    for start in range(0, WALK.BLOCK if WALK.HELD else classes, WALK.BLOCK):
        key = keys_and_weak_gradient(
            views, targets, counted, labels, of_weak, key_terms, stats[0], stats[2], poison, weak_gradients, by,
            factors, row, inside, start, classes, k, WALK, RANK, GRAD_W, ACC,
        )  # fmt: skip
        cols, stored = tile_at(start, inside, classes, WALK)
        tl.store(keys + (local_row * classes)[:, None] + cols, key, mask=stored)


@kernel
def write_zipf(order, zipf, classes: tl.int32, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """zipf of the class at each place of a row's order: 1 / (place + 1)."""
    tiles = (classes + (BLOCK - 1)) // BLOCK
    row = tl.program_id(0) // tiles
    place = (tl.program_id(0) - row * tiles) * BLOCK + tl.arange(0, BLOCK)
    start = row.to(tl.int64) * classes
    column = tl.load(order + start + place, mask=place < classes, other=0)
    tl.store(zipf + start + column, 1.0 / (place + 1).to(ACC), mask=place < classes)


@kernel
def combine_ranked(
    student,
    target,
    student_gradients,
    loss,
    parts,
    student_norm,
    weak_norm,
    counts,
    factors,
    zipf,
    states,
    columns,
    rows: tl.int64,
    first: tl.int64,
    last: tl.int64,
    classes: tl.int32,
    student_row: tl.int64,
    student_col: tl.int64,
    target_row: tl.int64,
    target_col: tl.int64,
    count_items: tl.int32,
    ignore_index: tl.int64,
    beta: tl.float64,
    ce_weight: tl.float64,
    smoothing: tl.float64,
    student_scale: tl.float64,
    student_norm_value: tl.float64,
    weak_norm_value: tl.float64,
    ACC: tl.constexpr,
    WALK: tl.constexpr,
    VEC: tl.constexpr,
    GRAD_S: tl.constexpr,
    COUNT: tl.constexpr,
    HALF_S: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """The part that waits for the ranks, and the student's gradient."""
    k = tl.full((), LOG2E, ACC)
    classes = classes // VEC * VEC
    local_row = tl.program_id(0).to(tl.int64) * WALK.ROWS + tl.arange(0, WALK.ROWS)
    row = first + local_row
    inside = row < last
    targets = (
        tl.load(columns + row, mask=inside, other=_IGNORED),
        tl.load(columns + rows + row, mask=inside, other=-1),
    )
    counted = inside & (targets[0] != _IGNORED)
    m_s, z_s, factor, at_0, at_1, poison = load_fields(states, rows, row, inside, 6)
    view = (student + row * (student_row // VEC * VEC), student_col)
    of_rank = (zipf + local_row * classes, student_col)
    sums = tl.full(WALK.TILE, 0.0, ACC)
    cross = tl.full(WALK.TILE, 0.0, ACC)
    for start in range(0, WALK.BLOCK if WALK.HELD else classes, WALK.BLOCK):
        cols, mask = tile_at(start, counted, classes, WALK)
        s = load_tile(view, cols, mask, NEG_INF, WALK.UNIT, ACC)
        z = load_tile(of_rank, cols, mask, 0.0, True, ACC)
        takes = (s != NEG_INF) & (cols != targets[0][:, None]) & (cols != targets[1][:, None])
        sums += tl.where(takes, z, 0.0)
        cross += tl.where(takes, z * (s - m_s[:, None]), 0.0)
    beta, ce_weight, smoothing = as_scalars((beta, ce_weight, smoothing), ACC)
    zipf_sum, zipf_cross = tl.sum(sums, 1), tl.sum(cross, 1)
    non_target, more, by_zipf = rank_terms(zipf_sum, zipf_cross, z_s, targets[0], targets[1], classes, beta)
    non_target = tl.where(counted, non_target + poison, 0.0)
    if factors is not None:
        non_target *= load_factor(factors, 0, rows, row, inside, ACC)
    tl.store(parts + rows + row, non_target, mask=inside)
    if PER_ROW:
        total = tl.load(parts + row, mask=inside, other=0.0) + non_target
        total += tl.load(parts + 2 * rows + row, mask=inside, other=0.0)
        tl.store(loss + row, total + tl.load(parts + 3 * rows + row, mask=inside, other=0.0), mask=inside)
        store_norms((student_norm, weak_norm), (student_norm_value, weak_norm_value), row, ACC)
    if GRAD_S:
        divisor = mean_divisor(counts, target_row, count_items, ignore_index, COUNT)
        by = gradient_scale(student_scale, divisor, ACC, HALF_S)
        if factors is not None:
            by *= load_factor(factors, 1, rows, row, inside, ACC)
        kept, uniform = ce_labels(ce_weight, smoothing, classes, WALK)
        terms = gradient_terms((factor + more, at_0, at_1), by_zipf, kept, uniform, by, factors)
        labels = (target + row * (target_row // VEC * VEC if WALK.PROB else target_row), target_col)
        for start in range(0, WALK.BLOCK if WALK.HELD else classes, WALK.BLOCK):
            cols, mask = tile_at(start, counted, classes, WALK)
            s = load_tile(view, cols, mask, NEG_INF, WALK.UNIT, ACC)
            z = load_tile(of_rank, cols, mask, 0.0, True, ACC)
            g = class_gradient(s, s - m_s[:, None], z, labels, cols, mask, targets, terms, poison, k, WALK, ACC)
            store_tile(student_gradients, row, classes, cols, inside[:, None] & (cols < classes), g)
