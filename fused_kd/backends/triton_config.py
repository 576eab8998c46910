"""The dispatch table: how a kernel is laid out, as a pure function of class count, bytes per logit and kind of target.

Nothing is tuned at run time. The rows were chosen by the compiler's report (registers, spills, width of loads) for sm_80,
sm_90 and sm_100, which the tests read again, and hold for all three, so the device's capability is no argument yet. None
has been timed on a GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class OnChip(NamedTuple):
    """``rows`` whole rows, of at most ``block`` classes, per program of ``warps`` warps."""

    rows: int
    block: int
    warps: int


class Looped(NamedTuple):
    """One row per program of ``lanes`` threads, each with ``width`` classes of a tile."""

    lanes: int
    width: int
    warps: int


class Flat(NamedTuple):
    """Tiles of ``block`` neighbours, each done by ``warps`` warps."""

    block: int
    warps: int


#: (largest tile of classes x rows, warps). A thread holds 8 logits of each input up to the last row: one 16-byte load of
#: half precision, two of float32, and registers for two programs per multiprocessor or more.
ON_CHIP = (
    (1024, 4),  # smaller rows share a program, so that 100 classes fill the warps that 1000 do
    (2048, 8),
    (4096, 16),
    # 16 logits a thread, 104 to 128 registers, one program per multiprocessor: the last size that no variant spills at.
    # 16384 fits for T = 1 and index targets only, and would leave one program alone with its latency.
    (8192, 16),
)
#: float64 takes twice the registers, and its exp2 some forty more: 4 logits a thread.
ON_CHIP_WIDE = ((512, 4), (1024, 8), (2048, 16))

#: Threads of a looped program: 16 warps at no more than 64 registers (index targets) put two rows on a multiprocessor.
LOOPED_WARPS = 16
#: Beyond this, two half-precision rows (student and teacher) on each of 132 multiprocessors, twice, outgrow 50 MB of L2,
#: and the second walk would go to memory for most of them: 32 warps leave one row per multiprocessor. Index targets only:
#: probabilities want more than the 64 registers that 32 warps leave a thread. float32 rows stay with 16 warps, because
#: the compiler spills them at 32.
LOOPED_LONG, LOOPED_LONG_WARPS = 49152, 32


@lru_cache(maxsize=1024)
def row_config(classes: int, narrow: int, wide: bool, probabilities: bool) -> OnChip | Looped:
    """Layout of the row kernels.

    Args:
        classes: Row length.
        narrow: Bytes of the narrowest logit or probability, whose vectors of 16 bytes set the looped tile's width.
        wide: Arithmetic is in float64.
        probabilities: The target holds probabilities, which are one more tile to keep.
    """
    table = ON_CHIP_WIDE if wide else ON_CHIP
    block = max(16, 1 << (classes - 1).bit_length())
    for tile, warps in table:
        if block <= tile:
            return OnChip(max(1, tile // block), block, warps)
    long = classes > LOOPED_LONG and narrow == 2 and not wide and not probabilities
    warps = LOOPED_LONG_WARPS if long else LOOPED_WARPS
    return Looped(32 * warps, 16 // narrow, warps)


@lru_cache(maxsize=1024)
def scale_config(width: int) -> Flat:
    """Layout of scale_rows: 16 elements a thread, two 16-byte vectors of half precision. Short tiles, because a long
    row's first and last are masked, and so scalar where it does not start aligned."""
    block = min(2048, max(128, 1 << (width - 1).bit_length()))
    return Flat(block, max(1, block // 512))
