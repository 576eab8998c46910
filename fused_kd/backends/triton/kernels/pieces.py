"""Merges the results of a row's pieces, (pieces, fields, rows), for :mod:`.staged`."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.constants import LOG2E, NEG_INF
from fused_kd.backends.triton.kernels.rows import make_scales, merge_lanes, store_fields, total_of, zero_if_empty
from fused_kd.backends.triton.kernels.values import Moments, PointwiseSums, Statistics

#: Numbers of fields of a row. The teacher's moments begin at OF_TEACHER. The target's two logits and its probability
#: follow the statistics, from OF_TARGET on.
MOMENTS = tl.constexpr(2 * len(Moments._fields))
OF_TEACHER = tl.constexpr(len(Moments._fields))
STATISTICS = tl.constexpr(len(Statistics._fields) + 3)
OF_TARGET = tl.constexpr(len(Statistics._fields))
SUMS = tl.constexpr(len(PointwiseSums._fields))


@triton.jit
def _field(found, which, fields, pieces, rows, row, other, PIECES: tl.constexpr):
    """Load a field of all pieces, (PIECES,)."""
    piece = tl.arange(0, PIECES)
    return tl.load(found + (piece * fields + which) * rows + row, mask=piece < pieces, other=other)


@triton.jit
def store_moments(out, first, rows, row, moments):
    """Store number, mean, the sum of squares about it, and the mean's rounding error, for :func:`_merged_moments`."""
    square = moments.deviation * moments.deviation * tl.maximum(moments.number - 1.0, 1.0)
    store_fields(out + rows * first, (moments.number, moments.mean, square, moments.low), rows, row, None)


@triton.jit
def _merged_moments(found, first, pieces, rows, row, PIECES: tl.constexpr):
    """Merge the moments of the student's logits (first = 0) or the teacher's, by Chan's formula."""
    number = _field(found, first, MOMENTS, pieces, rows, row, 0.0, PIECES)
    mean = _field(found, first + 1, MOMENTS, pieces, rows, row, 0.0, PIECES)
    square = _field(found, first + 2, MOMENTS, pieces, rows, row, 0.0, PIECES)
    low = _field(found, first + 3, MOMENTS, pieces, rows, row, 0.0, PIECES)
    # Relative to one of the means, so that the deviation of a constant row is exactly 0.
    about = zero_if_empty(tl.max(tl.where(number > 0.0, mean, NEG_INF), 0, keep_dims=True))
    total = total_of(number)
    merged = about + total_of(tl.where(number > 0.0, number * (mean - about), 0.0)) / tl.maximum(total, 1.0)
    shift = tl.where(number > 0.0, mean - merged + low, 0.0)
    deviation = tl.sqrt(total_of(square + number * shift * shift) / tl.maximum(total - 1.0, 1.0))
    return Moments(merged, deviation, total, total_of(number * shift) / tl.maximum(total, 1.0))


@triton.jit
def merged_scales(
    moments, pieces, rows, row, temperature, VARIANT: tl.constexpr, PIECES: tl.constexpr, ACC: tl.constexpr
):
    """Return the scales, and the moments of the student's row."""
    k = tl.full((), LOG2E, ACC)
    if VARIANT.STD:
        s_moments = _merged_moments(moments, 0, pieces, rows, row, PIECES)
        t_moments = _merged_moments(moments, OF_TEACHER, pieces, rows, row, PIECES)
    else:
        zero = tl.zeros([1], ACC)
        s_moments = Moments(zero, zero, zero, zero)
        t_moments = s_moments
    return make_scales(temperature, s_moments, t_moments, k, VARIANT), s_moments


@triton.jit
def merged_statistics(found, pieces, rows, row, scales, VARIANT: tl.constexpr, PIECES: tl.constexpr):
    """Return the row's statistics, and the target's logits and probability, which one of the pieces has."""
    of_pieces = ()
    for which in tl.static_range(OF_TARGET):
        other = NEG_INF if which == 0 or which == 3 else 0.0  # the largest logits
        of_pieces += (_field(found, which, STATISTICS, pieces, rows, row, other, PIECES),)
    stats = Statistics(*of_pieces)
    s_y = total_of(_field(found, OF_TARGET, STATISTICS, pieces, rows, row, 0.0, PIECES))
    t_y = total_of(_field(found, OF_TARGET + 1, STATISTICS, pieces, rows, row, 0.0, PIECES))
    v_y = total_of(_field(found, OF_TARGET + 2, STATISTICS, pieces, rows, row, 0.0, PIECES))
    return merge_lanes(stats, scales, VARIANT), s_y, t_y, v_y


@triton.jit
def merged_piece_sums(found, pieces, rows, row, PIECES: tl.constexpr):
    sums = ()
    for which in tl.static_range(SUMS):
        sums += (total_of(_field(found, which, SUMS, pieces, rows, row, 0.0, PIECES)),)
    return PointwiseSums(*sums)
