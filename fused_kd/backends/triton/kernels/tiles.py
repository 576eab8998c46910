"""Tiles of a long row, for :mod:`.looped`: load them, add them to statistics, compute their gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.constants import NEG_INF, NO_CLASS
from fused_kd.backends.triton.kernels.pointwise import add_slopes, add_sums, load_columns
from fused_kd.backends.triton.kernels.rows import POINTWISE, TEACHER, accumulate, at, combine, zero_if_empty
from fused_kd.backends.triton.kernels.values import Moments


@triton.jit
def lane_columns(lane, LANES: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr):
    """Return the first column of each lane, (lanes,), and the offsets of its further columns, (1, WIDTH), in a tile of
    LANES x WIDTH columns. Neighbours that form a vector go to one lane, else to neighbouring lanes."""
    LANE_STEP: tl.constexpr = WIDTH if VEC > 1 else 1
    WIDTH_STEP: tl.constexpr = 1 if VEC > 1 else LANES
    return lane * LANE_STEP, tl.arange(0, WIDTH)[None, :] * WIDTH_STEP


@triton.jit
def load_part(
    base, offsets, stride, mask, MASKED: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr
):
    """Load a part of a row. LAST says that it is not read again. Everything else should stay in L2, where much of it
    only just fits."""
    pointers = at(base, offsets, stride, UNIT)
    if MASKED:
        return tl.load(pointers, mask=mask, other=NEG_INF).to(ACC)
    elif LAST:
        return tl.load(pointers, eviction_policy="evict_first").to(ACC)
    else:
        return tl.load(pointers, eviction_policy="evict_last").to(ACC)


@triton.jit
def _load_tiles(inputs, tile, VARIANT: tl.constexpr, MASKED: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr):
    """Load tiles of s, t and v."""
    bases, strides, offsets, inside = inputs.bases, inputs.strides, tile.offsets, tile.inside
    s = load_part(bases[0], offsets, strides[0], inside, MASKED, VARIANT.UNIT, LAST, ACC)
    t = s
    if TEACHER & VARIANT.LOSS:
        t = load_part(bases[1], offsets, strides[1], inside, MASKED, VARIANT.UNIT, LAST, ACC)
    v = s
    if VARIANT.PROB:
        v = load_part(bases[2], offsets, strides[2], inside, MASKED, VARIANT.UNIT, LAST, ACC)
        if MASKED:
            v = tl.where(inside, v, 0.0)
    return s, t, v


@triton.jit
def _without_target(s, t, v, is_target, PROB: tl.constexpr):
    s = tl.where(is_target, NEG_INF, s)
    t = tl.where(is_target, NEG_INF, t)
    if PROB:
        v = tl.where(is_target, 0.0, v)
    return s, t, v


@triton.jit
def accumulate_tile(stats, inputs, tile, scales, VARIANT: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr):
    """Accumulate the classes of a tile other than the target. Of the tiles inside the row, only the one with the target
    compares its classes with it, except with label smoothing, which must know which classes count."""
    s, t, v = _load_tiles(inputs, tile, VARIANT, MASKED, False, ACC)
    present = tile.inside
    if MASKED or VARIANT.LINEAR:
        s, t, v = _without_target(s, t, v, tile.is_target, VARIANT.PROB)
        present = present & (tile.is_target == 0)
    else:
        if tile.target_here:
            s, t, v = _without_target(s, t, v, tile.is_target, VARIANT.PROB)
    return accumulate(stats, s, t, v, present, scales, VARIANT, True)


@triton.jit
def sum_tile(sums, inputs, tile, softmaxes, VARIANT: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr):
    """Add a tile to the sums of a pointwise loss."""
    s, t, _v = _load_tiles(inputs, tile, VARIANT, MASKED, False, ACC)
    of_columns = load_columns(inputs.columns, tile.offsets, tile.inside, inputs.classes, MASKED, VARIANT.COLUMNS)
    return add_sums(sums, s, t, of_columns, tile.is_target, tile.inside, softmaxes, VARIANT)


@triton.jit
def gradient_tile(
    inputs, tile, softmaxes, scaled, more, VARIANT: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr
):
    s, t, v = _load_tiles(inputs, tile, VARIANT, MASKED, True, ACC)
    g = combine(s, t, v, softmaxes.stats, scaled, softmaxes.scales, VARIANT)
    if tile.target_here:
        g = tl.where(tile.is_target, scaled.target[:, None], g)
    if POINTWISE & VARIANT.LOSS:
        of_columns = load_columns(inputs.columns, tile.offsets, tile.inside, inputs.classes, MASKED, VARIANT.COLUMNS)
        g = add_slopes(g, s, t, of_columns, tile.is_target, softmaxes, more, VARIANT)
    return g


@triton.jit
def row_moments(
    base, stride, before, at_edge, in_edge, lane, end,
    LANES: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, EDGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute :class:`.values.Moments` of a row, in two separate walks."""
    # Relative to some logit, so that the deviation of a constant row is exactly 0.
    first = tl.load(base - before * stride, mask=end > 0, other=0.0)  # a piece may have no columns
    about = zero_if_empty(first.to(ACC)) + tl.zeros([1], ACC)
    total = tl.zeros([LANES], ACC)
    count = tl.zeros([LANES], ACC)
    if EDGES:
        x_edge = load_part(base, at_edge, stride, in_edge, True, UNIT, False, ACC)
        total += tl.sum(tl.where(x_edge == NEG_INF, 0.0, x_edge - about), 1)
        count += tl.sum(tl.where(x_edge == NEG_INF, 0.0, 1.0), 1)
    for start in range(0, end, LANES * WIDTH):
        x = load_part(base, start + lane, stride, start + lane < end, True, UNIT, False, ACC)
        total += tl.sum(tl.where(x == NEG_INF, 0.0, x - about), 1)
        count += tl.sum(tl.where(x == NEG_INF, 0.0, 1.0), 1)
    number = tl.sum(count, 0, keep_dims=True)
    mean = about + tl.sum(total, 0, keep_dims=True) / tl.maximum(number, 1.0)
    square = tl.zeros([LANES], ACC)
    total = tl.zeros([LANES], ACC)
    if EDGES:
        centred_edge = tl.where(x_edge == NEG_INF, 0.0, x_edge - mean)
        total += tl.sum(centred_edge, 1)
        square += tl.sum(centred_edge * centred_edge, 1)
    for start in range(0, end, LANES * WIDTH):
        x = load_part(base, start + lane, stride, start + lane < end, True, UNIT, False, ACC)
        centred = tl.where(x == NEG_INF, 0.0, x - mean)
        total += tl.sum(centred, 1)
        square += tl.sum(centred * centred, 1)
    deviation = tl.sqrt(tl.sum(square, 0, keep_dims=True) / tl.maximum(number - 1.0, 1.0))
    return Moments(mean, deviation, number, tl.sum(total, 0, keep_dims=True) / tl.maximum(number, 1.0))


@triton.jit
def keep_largest(best, index, v, cols):
    """Update, per lane, the largest probability so far and the lowest class that has it."""
    tile_best = tl.max(v, 1)
    tile_index = tl.min(tl.where(v == tile_best[:, None], cols, NO_CLASS), 1)
    lower = (tile_best > best) | ((tile_best == best) & (tile_index < index))
    return tl.where(lower, tile_best, best), tl.where(lower, tile_index, index)
