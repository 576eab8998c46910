"""The kernels of Zipf's label smoothing: votes, their ranks, and the rows. :mod:`.targets` has the conventions.

``find_votes`` reads the dense logits, which are nearly all that there is to read. At most P of a row's classes have a
vote, and all the others share one rank, 1 + the number of those that have; so ``rank_votes`` compares votes with votes,
P x P of them, instead of sorting classes, and ``zipf_rows`` takes every class for one without a vote and corrects what
the voted ones add. Nothing of the classes' number is kept between kernels.

With z_j = (best / rank_j)^power over the classes that are no target and can occur, relative to the best rank of them,
and d_j = s_j - m_s, a row's divergence is

    weight (sum z log z / sum z - log sum z + log sum exp(d) - sum z d / sum z)

where each sum is one over all classes, as if they had the weight z_0 of a class without a vote, and what the voted ones
have beyond.

Meaning of the constexpr arguments besides those that :mod:`.on_chip` and :mod:`.uskd` explain:

POSITIONS, CLASSES    a tile of the dense logits
POSITION_UNIT         their positions are neighbours in memory; CLASS_UNIT, their classes
VOTES                 votes of a tile
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.constants import LN2, LOG2E, NEG_INF, NO_CLASS
from fused_kd.backends.triton.kernels.on_chip import gradient_scale, mean_divisor
from fused_kd.backends.triton.kernels.rows import as_scalars, kernel, load_factor, store_fields, times
from fused_kd.backends.triton.kernels.targets import (
    ce_labels,
    class_gradient,
    cross_entropy,
    find_targets,
    gradient_terms,
    is_rest,
    load_at,
    load_tile,
    rest_maximum,
    split_softmax,
    store_tile,
    tile_at,
)

#: What a position votes for that has a NaN, and the number of voted classes of its row.
BROKEN = tl.constexpr(-1)


@kernel
def find_votes(
    dense,
    target,
    votes,
    positions: tl.int32,
    classes: tl.int32,
    dense_row: tl.int64,
    dense_position: tl.int64,
    dense_class: tl.int64,
    target_row: tl.int64,
    ignore_index: tl.int64,
    ACC: tl.constexpr,
    POSITIONS: tl.constexpr,
    CLASSES: tl.constexpr,
    VEC: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    CLASS_UNIT: tl.constexpr,
    PROB: tl.constexpr,
):
    """votes (rows, positions): the lowest class among a position's largest; a row that does not count is not read.

    ACC is float64 for such logits, else float32, which every other format fits in. VEC divides the strides that are
    not 1 and the length of what is contiguous.
    """
    blocks = (positions + (POSITIONS - 1)) // POSITIONS
    row = (tl.program_id(0) // blocks).to(tl.int64)
    position = (tl.program_id(0) % blocks) * POSITIONS + tl.arange(0, POSITIONS)
    if POSITION_UNIT:
        positions = positions // VEC * VEC
        at_position = position
        dense_class = dense_class // VEC * VEC
    else:
        at_position = position.to(tl.int64) * (dense_position // VEC * VEC)
    if CLASS_UNIT:
        classes = classes // VEC * VEC
    base = dense + row * (dense_row // VEC * VEC)
    end = classes
    if not PROB:
        counted = tl.load(target + row * target_row).to(tl.int64) != ignore_index
        end = tl.where(counted, classes, 0)
    best = tl.full([POSITIONS, CLASSES], NEG_INF, ACC)
    at = tl.full([POSITIONS, CLASSES], NO_CLASS, tl.int32)
    broken = tl.zeros([POSITIONS, CLASSES], tl.int1)
    for start in range(0, end, CLASSES):
        column = start + tl.arange(0, CLASSES)
        at_class = column if CLASS_UNIT else column.to(tl.int64) * dense_class
        mask = (position < positions)[:, None] & (column < classes)[None, :]
        x = tl.load(base + at_position[:, None] + at_class[None, :], mask=mask, other=NEG_INF).to(ACC)
        better = x > best
        best = tl.where(better, x, best)
        at = tl.where(better, column[None, :], at)
        broken |= x != x
    largest = tl.max(best, 1)
    vote = tl.min(tl.where(best == largest[:, None], at, NO_CLASS), 1)
    vote = tl.where(vote == NO_CLASS, 0, vote)  # all are -inf
    vote = tl.where(tl.max(broken.to(tl.int32), 1) == 1, BROKEN, vote)
    tl.store(votes + row * positions + position, vote, mask=position < positions)


@kernel
def rank_votes(votes, counts, ranks, voted, positions: tl.int32, VOTES: tl.constexpr):
    """ranks (rows, positions): of the class that a position votes for, where it is the first to, else 0. voted (rows,):
    how many classes have a vote. counts (rows, positions) is scratch: votes, where ranks has a rank."""
    row = tl.program_id(0).to(tl.int64)
    first = row * positions
    number = tl.zeros([1], tl.int32)
    broken = tl.zeros([1], tl.int32)
    for start in range(0, positions, VOTES):
        i = start + tl.arange(0, VOTES)
        mine = tl.load(votes + first + i, mask=i < positions, other=-2)
        count = tl.zeros([VOTES], tl.int32)
        earlier = tl.zeros([VOTES], tl.int32)
        for other_start in range(0, positions, VOTES):
            j = other_start + tl.arange(0, VOTES)
            other = tl.load(votes + first + j, mask=j < positions, other=-3)
            same = (mine[:, None] == other[None, :]).to(tl.int32)
            count += tl.sum(same, 1)
            earlier += tl.sum(tl.where(j[None, :] < i[:, None], same, 0), 1)
        count = tl.where(earlier == 0, count, 0)
        tl.store(counts + first + i, count, mask=i < positions)
        number += tl.sum((count > 0).to(tl.int32), 0, keep_dims=True)
        broken += tl.sum((mine == BROKEN).to(tl.int32), 0, keep_dims=True)
    tl.store(voted + row + tl.arange(0, 1), tl.where(broken > 0, BROKEN, number))
    tl.debug_barrier()  # the counts are written by other threads than read them
    for start in range(0, positions, VOTES):
        i = start + tl.arange(0, VOTES)
        mine = tl.load(counts + first + i, mask=i < positions, other=0)
        more = tl.zeros([VOTES], tl.int32)
        for other_start in range(0, positions, VOTES):
            j = other_start + tl.arange(0, VOTES)
            other = tl.load(counts + first + j, mask=j < positions, other=0)
            more += tl.sum((other[None, :] > mine[:, None]).to(tl.int32), 1)
        tl.store(ranks + first + i, tl.where(mine > 0, 1 + more, 0), mask=i < positions)


@triton.jit
def _row_sums(view, labels, targets, rows, classes, k, WALK: tl.constexpr, ACC: tl.constexpr):
    """(m, z, linear, number, v_rest, v_cross, v_blocked), sums over the classes that are no target: of exponentials; of
    s_j - m and of 1 where s_j is not -inf; and of probabilities V, else 0: of V_j, of V_j (s_j - m) where it is not
    -inf, and of V_j where it is."""
    m = rest_maximum(view, targets, rows, classes, WALK, ACC)
    zero = tl.full(WALK.TILE, 0.0, ACC)
    z, linear, number, v_rest, v_cross, v_blocked = zero, zero, zero, zero, zero, zero
    for start in range(0, WALK.BLOCK if WALK.HELD else classes, WALK.BLOCK):
        cols, mask = tile_at(start, rows, classes, WALK)
        rest = is_rest(cols, mask, targets)
        x = load_tile(view, cols, mask, NEG_INF, WALK.UNIT, ACC)
        d = tl.where(rest, x, NEG_INF) - m[:, None]
        possible = d != NEG_INF
        z += tl.exp2(d * k)
        linear += tl.where(possible, d, 0.0)
        number += tl.where(possible, 1.0, 0.0)
        if WALK.PROB:
            v = tl.where(rest, load_tile(labels, cols, mask, 0.0, WALK.UNIT, ACC), 0.0)
            v_rest += v
            v_cross += tl.where(possible, v * d, 0.0)
            v_blocked += tl.where(possible, 0.0, v)
    return (
        m, tl.sum(z, 1), tl.sum(linear, 1), tl.sum(number, 1), tl.sum(v_rest, 1), tl.sum(v_cross, 1),
        tl.sum(v_blocked, 1),
    )  # fmt: skip


@triton.jit
def _zipf(rank, best, power):
    """z = (best / rank)^power and z log z, of ranks from 1 on."""
    ratio = best / rank.to(best.dtype)
    log_z = power * tl.log2(ratio)
    z = tl.where(power == 1.0, ratio, tl.exp2(log_z))
    return z, -times(z, -log_z * LN2)


@triton.jit
def _load_votes(votes, ranks, row, start, positions, rows, VOTES: tl.constexpr):
    """The classes of a tile of votes, and their ranks, 1 where there is none; and whether there is one."""
    j = start + tl.arange(0, VOTES)[None, :]
    at = (row * positions)[:, None] + j
    mask = rows[:, None] & (j < positions)
    rank = tl.load(ranks + at, mask=mask, other=0)
    return tl.load(votes + at, mask=mask, other=0), tl.maximum(rank, 1), rank > 0


@triton.jit
def _load_kept(
    votes, ranks, view, targets, m, row, start, positions, rows, VOTES: tl.constexpr, UNIT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Of a tile of votes the ranks of their classes, whether one is no target and can occur, and s_j - m."""
    column, rank, takes = _load_votes(votes, ranks, row, start, positions, rows, VOTES)
    takes &= (column >= 0) & (column != targets[0][:, None]) & (column != targets[1][:, None])
    d = load_tile(view, column, takes, NEG_INF, UNIT, ACC) - m[:, None]
    return rank, takes & (d != NEG_INF), d


@kernel
def zipf_rows(
    student,
    target,
    votes,
    ranks,
    voted,
    gradient,
    loss,
    parts,
    norm,
    counts,
    factors,
    rows: tl.int64,
    positions: tl.int32,
    classes: tl.int32,
    student_row: tl.int64,
    student_col: tl.int64,
    target_row: tl.int64,
    target_col: tl.int64,
    count_items: tl.int32,
    ignore_index: tl.int64,
    weight: tl.float64,
    power: tl.float64,
    ce_weight: tl.float64,
    smoothing: tl.float64,
    scale: tl.float64,
    norm_value: tl.float64,
    ACC: tl.constexpr,
    WALK: tl.constexpr,
    VOTES: tl.constexpr,
    VEC: tl.constexpr,
    GRAD: tl.constexpr,
    COUNT: tl.constexpr,
    HALF: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """Parts and gradient of ROWS rows. The gradient is written as if no class had a vote, and then again where one
    has."""
    k = tl.full((), LOG2E, ACC)
    weight, power, ce_weight, smoothing = as_scalars((weight, power, ce_weight, smoothing), ACC)
    classes = classes // VEC * VEC
    row = tl.program_id(0).to(tl.int64) * WALK.ROWS + tl.arange(0, WALK.ROWS)
    inside = row < rows
    targets, counted, valid, labels = find_targets(
        target, row, inside, target_row, target_col, ignore_index, classes, WALK, VEC, ACC
    )
    if factors is not None:
        factor = load_factor(factors, 0, rows, row, inside, ACC)
        counted &= factor != 0.0
    view = (student + row * (student_row // VEC * VEC), student_col)
    m, z, linear, number, v_rest, v_cross, v_blocked = _row_sums(view, labels, targets, counted, classes, k, WALK, ACC)
    s_0 = load_at(view, targets[0], counted, NEG_INF, WALK.UNIT, ACC)
    s_1 = load_at(view, targets[1], counted, NEG_INF, WALK.UNIT, ACC)
    p = split_softmax(s_0, s_1, m, z, k)
    is_0, is_1 = (targets[0] >= 0).to(tl.int32), (targets[1] >= 0).to(tl.int32)
    all_linear = tl.where(number < (classes - is_0 - is_1).to(ACC), NEG_INF, linear)
    ce, ce_factor, ce_0, ce_1 = cross_entropy(
        (v_rest, v_cross, v_blocked), all_linear, targets, p, ce_weight, smoothing, classes, WALK
    )
    here = tl.load(voted + row, mask=counted, other=0)
    broken = (here == BROKEN) | (s_0 != s_0) | (s_1 != s_1) | (s_0 == float("inf")) | (s_1 == float("inf"))
    poison = tl.where(broken, float("nan"), 0.0 * (valid + z + targets[2] + targets[3] + v_rest))
    # An infinite logit of a target has no cross-entropy, which need not be wanted.
    wanted = ce_weight != 0.0
    ce = tl.where(wanted, ce, 0.0)
    ce_factor = tl.where(wanted, ce_factor, 0.0)
    ce_0 = tl.where(s_0 == NEG_INF, 0.0, tl.where(wanted, ce_0, 0.0))
    ce_1 = tl.where(s_1 == NEG_INF, 0.0, tl.where(wanted, ce_1, 0.0))

    last = tl.maximum(here, 0) + 1
    best = last
    for start in range(0, positions, VOTES):
        rank, takes, _ = _load_kept(
            votes, ranks, view, targets, m, row, start, positions, counted, VOTES, WALK.UNIT, ACC
        )  # fmt: skip
        best = tl.minimum(best, tl.min(tl.where(takes, rank, last[:, None]), 1))
    best = best.to(ACC)
    z_0, z_log_z_0 = _zipf(last, best, power)
    nothing = tl.full(WALK.COLUMN, 0.0, ACC)
    more, more_cross, more_entropy = nothing, nothing, nothing
    for start in range(0, positions, VOTES):
        rank, takes, d = _load_kept(
            votes, ranks, view, targets, m, row, start, positions, counted, VOTES, WALK.UNIT, ACC
        )  # fmt: skip
        z_j, z_log_z_j = _zipf(rank, best[:, None], power)
        beyond = tl.where(takes, z_j - z_0[:, None], 0.0)
        more += tl.sum(beyond, 1)
        more_cross += tl.sum(tl.where(takes, beyond * d, 0.0), 1)
        more_entropy += tl.sum(tl.where(takes, z_log_z_j - z_log_z_0[:, None], 0.0), 1)
    total = z_0 * number + more
    # One class is sure of itself, and none has nothing to say.
    some = (number > 1.0) & (total != 0.0)
    total = tl.where(some, total, 1.0)
    z = tl.where(some, z, 1.0)
    weight = tl.where(some, weight, 0.0)
    entropy = z_log_z_0 * number + more_entropy
    divergence = (entropy - z_0 * linear - more_cross) / total + tl.log2(z / total) * LN2
    divergence = tl.where(counted, times(weight, divergence) + poison, 0.0)
    ce = tl.where(counted, ce + poison, 0.0)
    if factors is not None:
        divergence *= factor
        ce *= factor
    store_fields(parts, (divergence, ce), rows, row, inside)
    if PER_ROW:
        tl.store(loss + row, divergence + ce, mask=inside)
        tl.store(norm + row * 0, tl.full(row.shape, norm_value, ACC), mask=row == 0)
    if GRAD:
        divisor = mean_divisor(counts, target_row, count_items, ignore_index, COUNT)
        by = gradient_scale(scale, divisor, ACC, HALF)
        if factors is not None:
            by *= load_factor(factors, 1, rows, row, inside, ACC)
        kept, uniform = ce_labels(ce_weight, smoothing, classes, WALK)
        of_row = (weight / z + ce_factor, ce_0, ce_1)
        terms = gradient_terms(of_row, -weight / total, kept, uniform, by, factors)
        for start in range(0, WALK.BLOCK if WALK.HELD else classes, WALK.BLOCK):
            cols, mask = tile_at(start, counted, classes, WALK)
            s = load_tile(view, cols, mask, NEG_INF, WALK.UNIT, ACC)
            g = class_gradient(
                s, s - m[:, None], z_0[:, None], labels, cols, mask, targets, terms, poison, k, WALK, ACC
            )
            store_tile(gradient, row, classes, cols, inside[:, None] & (cols < classes), g)
        tl.debug_barrier()  # what follows is written over it, by other threads
        for start in range(0, positions, VOTES):
            column, rank, takes = _load_votes(votes, ranks, row, start, positions, counted, VOTES)
            takes &= column >= 0
            s = load_tile(view, column, takes, NEG_INF, WALK.UNIT, ACC)
            z_j, _ = _zipf(rank, best[:, None], power)
            g = class_gradient(s, s - m[:, None], z_j, labels, column, takes, targets, terms, poison, k, WALK, ACC)
            store_tile(gradient, row, classes, column, takes, g)
