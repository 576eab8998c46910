"""The small Triton kernels around the row kernels: counting rows, reducing their parts, scaling the stored gradient.

Only the shapes decide the order of every sum, and there are no atomics: same input, same bits.
"""

from __future__ import annotations

import triton.language as tl

from fused_kd.backends.triton.kernels.rows import count_rows, kernel, narrowed, power_of_two_below, sum_items

_BLOCK = tl.constexpr(1024)


@kernel
def count_chunks(target, partial, stride: tl.int64, rows: tl.int64, chunk: tl.int64, ignore_index: tl.int64):
    """partial[i]: the number of rows of chunk i that count."""
    start = tl.program_id(0).to(tl.int64) * chunk
    items = tl.minimum(rows - start, chunk).to(tl.int32)
    count = count_rows(target + start * stride, stride, items, ignore_index, False, _BLOCK)
    tl.store(partial + tl.program_id(0), count)


@kernel
def reduce_parts(
    row_parts,
    parts,
    loss,
    norm,
    other_norm,
    counts,
    rows: tl.int64,
    chunk: tl.int64,
    count_stride: tl.int64,
    count_items: tl.int32,
    ignore_index: tl.int64,
    norm_value: tl.float64,
    other_norm_value: tl.float64,
    ACC: tl.constexpr,
    PARTS: tl.constexpr,
    FINAL: tl.constexpr,
    MEAN: tl.constexpr,
    COUNT: tl.constexpr,
    HALF: tl.constexpr,
    OTHER_HALF: tl.constexpr,
):
    """Sum chunks of the row parts (PARTS, rows) into parts (PARTS, programs). With FINAL, one program computes the
    whole result.

    MEAN divides by the number of rows that count. COUNT is as for the row kernels; 0 means that all rows count. HALF
    leaves the power of two next to that divisor to ``norm``, for a gradient stored in float16 (see fused_kd/ops.py),
    and OTHER_HALF to ``other_norm``. A loss with one gradient passes one norm twice.
    """
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    start = program * chunk
    items = tl.minimum(rows - start, chunk).to(tl.int32)
    count = count_items
    if FINAL and MEAN and COUNT > 0:
        count = count_rows(counts, count_stride, count_items, ignore_index, COUNT == 2, _BLOCK)
    count = tl.maximum(count, 1)
    total = tl.zeros([], ACC)
    for part in tl.static_range(PARTS):
        value = sum_items(row_parts + part * rows + start, items, _BLOCK, ACC)
        if FINAL and MEAN:
            # Rounded once: a plain float32 quotient may be two units off, so the mean of equal rows would differ.
            value = tl.div_rn(value, count.to(ACC)) if ACC == tl.float32 else value / count.to(ACC)
        tl.store(parts + part * programs + program, value)
        total += value
    if FINAL:
        norm_here = tl.full((), norm_value, ACC)
        other_here = tl.full((), other_norm_value, ACC)
        if MEAN and HALF:
            norm_here /= power_of_two_below(count).to(ACC)
        if MEAN and OTHER_HALF:
            other_here /= power_of_two_below(count).to(ACC)
        tl.store(loss, total)
        tl.store(norm, norm_here)
        tl.store(other_norm, other_here)


@kernel
def scale_rows(
    gradient,
    out,
    grad_output,
    norm,
    rows: tl.int64,
    width: tl.int64,
    stride: tl.int64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """out = gradient * grad_output * norm, by a fixed number of programs that share tiles of BLOCK neighbours.

    A row's first tile starts at the multiple of VEC elements at or before the row, so that the tiles inside it are
    whole vectors wherever the row starts. In place, a factor of 1 leaves its tile untouched, so a mean's gradient costs
    no second pass. A stored 0 stays 0, even if the factor is infinite or NaN.
    """
    tiles = (width + (VEC - 1) + (BLOCK - 1)) // BLOCK
    multiplier = tl.load(norm).to(ACC)
    end = rows * tiles
    if IN_PLACE:  # with one factor of 1 for all, skip the walk over tiles, of which a program may have hundreds
        untouched = (rows == 1) & (tl.load(grad_output).to(ACC) * multiplier == 1.0)
        end = tl.where(untouched, 0, end)
    for tile in range(tl.program_id(0), end, tl.num_programs(0)):
        row = tile // tiles
        factor = tl.load(grad_output + row * stride).to(ACC) * multiplier
        touch = True
        if IN_PLACE:
            touch = factor != 1.0
        if touch:
            first = row * width
            start = first // VEC * VEC + (tile - row * tiles) * BLOCK
            offsets = start + tl.arange(0, BLOCK)
            if (start >= first) & (start + BLOCK <= first + width):
                x = tl.load(gradient + offsets).to(ACC)
                tl.store(out + offsets, narrowed(x * tl.where(x == 0.0, 0.0, factor), out.dtype.element_ty))
            else:
                inside = (offsets >= first) & (offsets < first + width)
                x = tl.load(gradient + offsets, mask=inside, other=0.0).to(ACC)
                scaled = x * tl.where(x == 0.0, 0.0, factor)
                tl.store(out + offsets, narrowed(scaled, out.dtype.element_ty), mask=inside)
