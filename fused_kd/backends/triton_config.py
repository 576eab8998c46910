"""The dispatch table: how a kernel is laid out, as a pure function of the class count, the dtypes and the kind of call.

Nothing is tuned at run time. The rows were chosen by the compiler's report (registers, spills, width of loads) for
sm_80, sm_90 and sm_100, which the tests read again, and hold for all three: the device's capability is no argument yet.
None has been timed on a GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class OnChip(NamedTuple):
    """``rows`` whole rows, of at most ``block`` classes, per program of ``warps`` warps."""

    rows: int
    block: int
    warps: int
    registers: int


class Looped(NamedTuple):
    """One row per program of ``lanes`` threads, each with ``width`` classes of a tile."""

    lanes: int
    width: int
    warps: int
    registers: int


class Streamed(NamedTuple):
    """``rows`` rows per program of ``warps`` warps, walked in tiles of ``block`` classes."""

    rows: int
    block: int
    warps: int
    registers: int


class Flat(NamedTuple):
    """Tiles of ``block`` neighbours, each done by ``warps`` warps."""

    block: int
    warps: int


#: (largest tile of classes x rows, warps, registers of a thread for one row, T = 1 and index targets). A thread holds 8
#: logits of each input up to the last row: one 16-byte load of half precision, two of float32. The compiler left alone
#: aims at round occupancies and spills a few words to get there; these are the least that no dtype spills at.
ON_CHIP = (
    (1024, 4, 64),  # smaller rows share a program, so that 100 classes fill the warps that 1000 do
    (2048, 8, 80),  # sm_100 spills two words at 72, which leave no more programs to a multiprocessor
    (4096, 16, 64),  # two programs per multiprocessor
    # 16 logits a thread, one program per multiprocessor. The last size that does not spill; 16384 fits for T = 1 only,
    # and would leave one program alone with its latency.
    (8192, 16, 128),
)
#: Probabilities are a third tile to hold: at 8192 classes and T other than 1 they spill on sm_100.
ON_CHIP_PROBABILITIES = ON_CHIP[:-1]
#: float64 takes twice the registers, and its exp2 some forty more: 4 logits a thread, and all the registers there are.
ON_CHIP_WIDE = (
    (512, 4, 255),  # half the tile of float32 in as many warps
    (1024, 8, 255),  # twice that
    (2048, 16, 128),  # 16 warps can have no more, and NKD takes nearly all
)
#: More rows than this in a program of tiny rows cost registers for their coefficients and spill.
ON_CHIP_ROWS = 16

#: The same for the other calls, by (T = 1, probabilities), where a program holds one row and where it holds several,
#: whose statistics and coefficients each thread has of each of them.
ON_CHIP_REGISTERS = {
    (True, False): (64, 96),  # the table above; here for several rows
    (False, False): (80, 112),  # two exponentials of each logit at a time
    (True, True): (96, 112),  # a third tile
    (False, True): (112, 128),  # both
}

#: Warps of a looped program: 16 at no more than 64 registers put two rows on a multiprocessor.
LOOPED_WARPS, LOOPED_REGISTERS = 16, 64
#: What probabilities need, and float64: one row per multiprocessor, as any number above 64 leaves. At T = 1
#: probabilities spill two words at 64, on sm_80 and sm_100.
LOOPED_MOST_REGISTERS = 128
#: Beyond this many classes, two half-precision rows of 132 multiprocessors, student's and teacher's, outgrow 50 MB of
#: L2, and the second walk would go to memory for most of them: 32 warps leave one row per multiprocessor. Index targets
#: only: probabilities want more than the 64 registers that 32 warps leave a thread. So does float32 in some variants.
LOOPED_LONG, LOOPED_LONG_WARPS = 49152, 32


@lru_cache(maxsize=1024)
def row_config(
    classes: int,
    narrow: int,
    *,
    wide: bool,
    probabilities: bool,
    unit_temperature: bool,
    neighbours: bool,
    vectors: bool,
    plain: bool = True,
    scores: bool = False,
) -> OnChip | Looped:
    """Layout of the row kernels.

    Args:
        classes: Row length.
        narrow: Bytes of the narrowest logit or probability, whose vectors of 16 bytes set the looped tile's width.
        wide: Arithmetic is in float64.
        probabilities: The target holds probabilities, which are one more tile to keep.
        unit_temperature: One exponential of each logit serves all softmaxes, as at temperature 1.
        neighbours: Every column stride is 1. Other strides need a pointer for each logit.
        vectors: In the looped kernel, rows start alike and can be walked in full vectors of every tensor.
        plain: NKD without label smoothing and logit standardization, which the registers were chosen for. What else
            there is gets all that its warps can have.
        scores: With logit standardization.
    """
    block = max(16, 1 << (classes - 1).bit_length())
    tiles: tuple[tuple[int, int, int], ...] = ON_CHIP_PROBABILITIES if probabilities else ON_CHIP
    if wide:
        tiles = ON_CHIP_WIDE
    if not plain:
        # Of the last, KD spills with indices, and z-scores with probabilities; in float64 KD does with either.
        tiles = tiles[:-1]
    for tile, warps, registers in tiles:
        if block <= tile:
            # In float64 KD with everything else spills where a program holds as many rows as NKD's.
            shared = tile // 2 if wide and not plain else tile
            rows = min(ON_CHIP_ROWS, max(1, shared // block))
            if scores and not wide:
                # In the longest rows JS and WSLD spill two words at the 128 registers that 16 warps can have.
                warps = min(warps, 8)
            if not neighbours or not plain:
                registers = min(255, 2048 // warps)  # all there are
            elif not wide and (rows > 1 or probabilities or not unit_temperature):
                registers = ON_CHIP_REGISTERS[unit_temperature, probabilities][rows > 1] if tile <= 2048 else 128
            return OnChip(rows, block, warps, registers)
    few = max(1, LOOPED_WARPS // 2)
    if not vectors:
        # Single loads, each with a pointer where columns are strided: 4 a thread, or they spill; in float64 2, also
        # beside labels that are narrower, and 8 warps, as DIST with all its options takes over 128 registers.
        warps = few if wide or not plain else LOOPED_WARPS
        return Looped(32 * warps, min(2 if wide else 4, 16 // narrow), warps, min(255, 2048 // warps))
    if not plain:
        # float64 of WSLD takes over 128 registers, and so do WSLD and JS with probabilities.
        warps = few if wide or probabilities else LOOPED_WARPS
        return Looped(32 * warps, 16 // narrow, warps, min(255, 2048 // warps))
    long = classes > LOOPED_LONG and narrow == 2 and not wide and not probabilities
    warps = LOOPED_LONG_WARPS if long else LOOPED_WARPS
    most = wide or probabilities
    return Looped(32 * warps, 16 // narrow, warps, LOOPED_MOST_REGISTERS if most else LOOPED_REGISTERS)


@lru_cache(maxsize=1024)
def scale_config(width: int) -> Flat:
    """Layout of scale_rows: 16 elements a thread, two 16-byte vectors of half precision. Short tiles, because a long
    row's first and last are masked, and so scalar where it does not start aligned."""
    block = min(2048, max(128, 1 << (width - 1).bit_length()))
    return Flat(block, max(1, block // 512))


class Normalized(NamedTuple):
    """``rows`` rows per program, ``lanes`` threads each, with ``width`` classes of a tile."""

    rows: int
    lanes: int
    width: int
    warps: int


class Columns(NamedTuple):
    """Tiles of ``rows`` x ``block`` classes, walked down ``chunk`` rows by a program of ``warps`` warps."""

    rows: int
    block: int
    chunk: int
    warps: int
    registers: int


#: Threads of a program that normalises rows; of one row where it is longer than this many classes, so that few long
#: rows fill a GPU.
NORMALIZE_LONG, NORMALIZE_WARPS, NORMALIZE_LONG_WARPS = 4096, 4, 16
#: Programs that the columns are shared out to: 8 on each multiprocessor, whose loads hide each other's latency.
COLUMN_PROGRAMS = 1024
#: Classes of a tile, a line of 128 bytes in half precision, and elements of a thread of 4 warps, whose moments and
#: probabilities take some 110 registers. In float64, or where vectors cannot be loaded and a thread has parts of more
#: rows, half as many.
COLUMN_BLOCK, COLUMN_ELEMENTS = 64, 8
#: Rows of a chunk at the least: its five moments are then a sixth of what is read for them in half precision.
COLUMN_CHUNK = 64
#: (chunks, classes) of a tile where the chunks are merged: columns first, so that a thousand classes are 8 programs.
FINISH_TILE = (8, 128)


@lru_cache(maxsize=1024)
def normalize_config(classes: int, narrow: int) -> Normalized:
    """Layout of normalize_rows: whole warps for a row as soon as it gives each thread a vector."""
    width = max(2, 16 // narrow)
    warps = NORMALIZE_LONG_WARPS if classes > NORMALIZE_LONG else NORMALIZE_WARPS
    lanes = 32 * warps if classes > NORMALIZE_LONG else min(32, 1 << (-(-classes // width) - 1).bit_length())
    return Normalized(32 * warps // lanes, lanes, width, warps)


@lru_cache(maxsize=1024)
def column_config(rows: int, classes: int, *, wide: bool, vectors: bool) -> Columns:
    """Layout of column_moments; ``vectors`` says that at least two neighbours are loaded as one."""
    block = min(COLUMN_BLOCK, max(16, 1 << (classes - 1).bit_length()))
    tile_rows = 128 * (COLUMN_ELEMENTS // (2 if wide or not vectors else 1)) // block
    chunks = max(1, min(-(-rows // COLUMN_CHUNK), COLUMN_PROGRAMS // -(-classes // block)))
    chunk = -(-rows // chunks)
    return Columns(tile_rows, block, -(-chunk // tile_rows) * tile_rows, 4, 255)


class Votes(NamedTuple):
    """Tiles of ``positions`` x ``classes`` dense logits, walked along the classes by ``warps`` warps."""

    positions: int
    classes: int
    warps: int


#: Logits of a tile where votes are found, 16 a thread of 8 warps: with a program for each row and 49 positions, 256
#: rows leave two programs to a multiprocessor, which then have 16 kilobytes of half precision under way.
VOTE_TILE = 4096
#: Positions of a tile: a row of a tile is a line of memory where positions are neighbours, else a position is one and
#: a few give a row several programs.
VOTE_POSITIONS, VOTE_FEW_POSITIONS = 64, 4
#: Votes of a tile that are compared with as many: a program of 4 warps does all of 49 at once.
VOTES = 64


#: Rows of a program of float64, each of which takes registers for its coefficients and its votes: 4 spill.
ZIPF_WIDE_ROWS = 2


@lru_cache(maxsize=1024)
def zipf_config(classes: int, *, wide: bool, probabilities: bool, neighbours: bool) -> Streamed:
    """Layout of zipf_rows: as USKD's kernels around a sort, but with all the registers that there are."""
    config = streamed_config(classes, wide=wide, probabilities=probabilities, neighbours=neighbours)
    rows = min(ZIPF_WIDE_ROWS, config.rows) if wide else config.rows
    return config._replace(rows=rows, registers=min(255, 2048 // config.warps))


@lru_cache(maxsize=1024)
def vote_config(positions: int, classes: int, *, by_position: bool) -> Votes:
    """Layout of find_votes; ``by_position`` says that positions are neighbours in memory."""
    most = VOTE_POSITIONS if by_position else VOTE_FEW_POSITIONS
    tile_positions = min(most, 1 << (positions - 1).bit_length())
    tile_classes = min(VOTE_TILE // tile_positions, max(16, 1 << (classes - 1).bit_length()))
    return Votes(tile_positions, tile_classes, max(1, tile_positions * tile_classes // 512))


#: USKD, float32: (largest tile of classes x rows that is sorted on chip, warps, registers of a thread): 8 words of 64
#: bits a thread. The sort's network grows with the square of the tile's logarithm, and so does the time that it takes
#: to compile: seconds for the last row.
RANKED = (
    (1024, 4, 128),  # smaller rows share a program
    (2048, 8, 128),  # 16 KB of shared memory, for the words that change warps
    (4096, 16, 128),  # 32 KB; 16 warps can have no more registers. 8192 fits with indices, in 11 s of compiling
)
#: Where a program sorts several rows with probabilities as targets, whose coefficients add up.
RANKED_ROWS_REGISTERS = 168
#: Tiles of the kernels around PyTorch's sort, by (float64, neighbours): strided columns need a pointer for each logit.
STREAMED = {
    (False, True): (2048, 8, 128),  # 8 elements a thread, a vector of half precision; probabilities take all 128
    (False, False): (1024, 8, 128),  # 4, each with its pointer
    (True, True): (512, 4, 255),  # 4, in 165 registers
    (True, False): (512, 4, 255),  # the same, pointers included
}

#: Of float32 with probabilities as targets and smoothed labels.
STREAMED_SMOOTHED_REGISTERS = 168


@lru_cache(maxsize=1024)
def uskd_config(
    classes: int, *, wide: bool, probabilities: bool, neighbours: bool, smoothed: bool = False
) -> OnChip | Streamed:
    """Layout of USKD: rows sorted on chip, or streamed around a sort by PyTorch, as all of float64 are, whose keys
    leave no room for the class in a word. For the arguments see :func:`row_config`; ``smoothed`` says that the
    cross-entropy's labels are."""
    block = max(16, 1 << (classes - 1).bit_length())
    for tile, warps, registers in () if wide else RANKED:
        if block <= tile:
            rows = min(ON_CHIP_ROWS, max(1, tile // block))
            return OnChip(rows, block, warps, RANKED_ROWS_REGISTERS if rows > 1 and probabilities else registers)
    config = streamed_config(classes, wide=wide, probabilities=probabilities, neighbours=neighbours)
    if smoothed and probabilities and not wide:  # they spill two words at 128, on sm_100
        config = config._replace(registers=STREAMED_SMOOTHED_REGISTERS)
    return config


@lru_cache(maxsize=1024)
def streamed_config(classes: int, *, wide: bool, probabilities: bool, neighbours: bool) -> Streamed:
    """Layout of the kernels around PyTorch's sort, and of the one that makes USKD's batch sums."""
    tile, warps, registers = STREAMED[wide, neighbours]
    block = min(tile, max(16, 1 << (classes - 1).bit_length()))
    return Streamed(min(ON_CHIP_ROWS, tile // block), block, warps, registers)
