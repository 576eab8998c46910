"""The dispatch table: how a kernel is laid out, as a pure function of the class count, the dtypes and the kind of call.

Nothing is tuned at run time. The rows were chosen by the compiler's report (registers, spills, width of loads) for
sm_80, sm_90 and sm_100, which the tests read again, and hold for all three: the device's capability is no argument yet.
Those of the row losses were chosen among several on an NVIDIA H200 (docs/kernels.md); none other has been timed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple


class Gpu(NamedTuple):
    """What a launch must know of a GPU: ``lanes`` are the threads of a warp, and ``register_limit`` says that its
    compiler takes the option ``maxnreg``."""

    lanes: int
    register_limit: bool


#: What the rest of this table is made for: it counts threads in warps of 32, and registers as these GPUs have them.
NVIDIA = Gpu(32, True)


def fitted(options: dict[str, Any], gpu: Gpu) -> dict[str, Any]:
    """A launch's options as a GPU takes them: as many threads in warps of its own."""
    if gpu == NVIDIA:
        return options
    kept = {name: value for name, value in options.items() if gpu.register_limit or name != "maxnreg"}
    return {**kept, "num_warps": max(1, options["num_warps"] * NVIDIA.lanes // gpu.lanes)}


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


#: Ordinary calls: class indices, neighbours in memory, no z-scores, no smoothed labels. (Most classes, rounded up to a
#: power of two; tile of classes x rows; warps; registers of a thread for NKD at T = 1.) 16 logits of each input a
#: thread: what a thread does once for its row, some 500 instructions, is half of the time with 8, and 8192 rows of
#: 1000 classes took an H200 36 us instead of 30.
ON_CHIP = (
    (256, 512, 4, 64),  # a program of several rows; of one warp a row it took as long
    (512, 512, 1, 120),
    (1024, 1024, 2, 128),
    (2048, 2048, 4, 96),
    (4096, 4096, 8, 128),  # where vectors cannot be loaded
)
#: Rows of more classes than this take less time walked twice than held, of which too few are under way at once: NKD of
#: 8192 rows of 8192 classes took an H200 164 us for 299, of 4096 classes 93 for 100. If they can be loaded in vectors.
ON_CHIP_MOST = 2048
#: What other losses take, and NKD at other temperatures; 168 are the most that leave room for 12 warps on a
#: multiprocessor.
ON_CHIP_REGISTERS, ON_CHIP_DIST_REGISTERS = 168, 200
#: Where one exponential serves all softmaxes. On sm_90 the compiler gives WSLD 123 at 136, and 16 warps fit, but 139 at
#: 144. KD and DKD take more than 128 at either, and at 136 KD spilled a word on sm_100.
ON_CHIP_SINGLE_REGISTERS = {"kd": 144, "dkd": 144, "wsld": 136, "tf_kd": 136}
#: All other calls, which would spill so: (tile, warps, registers), 8 logits of each input a thread up to the last row.
#: The compiler left alone aims at round occupancies and spills a few words to get there; these are the least that no
#: dtype spills at. At 8192 probabilities as targets spill, and losses other than NKD, at 4096 both together.
ON_CHIP_MORE = (
    (1024, 4, 64),  # smaller rows share a program
    (2048, 8, 80),
    (4096, 16, 64),
    (8192, 16, 128),
)
#: float64 takes twice the registers, and its exp2 some forty more: 4 logits a thread, and all the registers there are.
ON_CHIP_WIDE = (
    (512, 4, 255),  # half the tile of float32 in as many warps
    (1024, 8, 255),  # twice that
    (2048, 16, 128),  # 16 warps can have no more, and NKD takes nearly all
)
#: More rows than this in a program of tiny rows cost registers for their coefficients and spill.
ON_CHIP_ROWS = 16

#: Of NKD with probabilities, by T = 1, where a program holds one row and where it holds several, whose statistics and
#: coefficients each thread has of each of them.
PROBABILITIES_REGISTERS = {True: (96, 112), False: (112, 128)}

#: Warps of a looped program. 8 at 64 registers put four rows on a multiprocessor, whose walks overlap: 8192 rows of
#: 128256 classes took an H200 2.8 ms by 32 warps, 2.6 by 16 and 2.5 by 8; at 72 registers, which leave room for a row
#: less, 8 took as long as 16. Rows of up to LOOPED_SHORT classes have too few tiles for 8: 4096 classes took 124 us by
#: 8 and 93 by 4.
LOOPED_WARPS, LOOPED_REGISTERS = 8, 64
LOOPED_SHORT = 16384
#: Of float32, at another temperature, and there with logits of two dtypes, which spill a word at less on some GPU.
LOOPED_FLOAT32_REGISTERS, LOOPED_SHARP_REGISTERS, LOOPED_MIXED_REGISTERS = 72, 80, 104
#: Of NKD in half precision at another temperature. Left 80, the compiler takes 72 for most calls all the same, but for
#: some on sm_100 all 80, and then spills a word.
LOOPED_SHARP_HALF_REGISTERS = 72
#: Jensen–Shannon spills at the 80 that three programs of 8 warps can have; 4 warps put five on a multiprocessor.
LOOPED_JS_REGISTERS, LOOPED_DIST_REGISTERS = 104, 128
#: With z-scores or smoothed labels; probabilities and float64 of losses other than NKD take more.
LOOPED_MOST_REGISTERS = 128


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
    mixed: bool = False,
    loss: str = "nkd",
    scores: bool = False,
    smoothed: bool = False,
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
        mixed: Student's and teacher's logits differ in dtype.
        loss: Which of the row losses.
        scores: With logit standardization.
        smoothed: With label smoothing.
    """
    block = max(16, 1 << (classes - 1).bit_length())
    plain = loss == "nkd" and not (scores or smoothed)
    ordinary = neighbours and not (wide or probabilities or scores or smoothed)
    if ordinary and not (vectors and block > ON_CHIP_MOST):
        for most, tile, warps, registers in ON_CHIP:
            if block <= most:
                if loss == "dist":
                    registers = ON_CHIP_DIST_REGISTERS
                elif not plain or not unit_temperature:
                    single = ON_CHIP_SINGLE_REGISTERS if unit_temperature else {}
                    registers = single.get(loss, ON_CHIP_REGISTERS)
                return OnChip(min(ON_CHIP_ROWS, tile // block), block, warps, registers)
    elif not ordinary:
        tiles = ON_CHIP_WIDE if wide else ON_CHIP_MORE
        # In float64 KD with everything else spills where a program holds as many rows as NKD's.
        kept = len(tiles) - (not plain) - (probabilities and not wide)
        for tile, warps, registers in tiles[: max(kept, 0)]:
            if block <= tile:
                shared = tile // 2 if wide and not plain else tile
                rows = min(ON_CHIP_ROWS, max(1, shared // block))
                if scores and not wide:
                    # In the longest rows JS and WSLD spill two words at the 128 registers that 16 warps can have.
                    warps = min(warps, 8)
                if not neighbours or not plain or wide:
                    registers = min(255, 2048 // warps)  # all there are
                else:
                    registers = PROBABILITIES_REGISTERS[unit_temperature][rows > 1] if tile <= 2048 else 128
                return OnChip(rows, block, warps, registers)
    warps = LOOPED_WARPS
    everything = min(255, 2048 // warps)
    if not vectors:
        # Single loads, each with a pointer where columns are strided. They are exchanged between threads: with 4 a
        # thread DIST took 2.5 times as long on an H200 as with 2.
        return Looped(32 * warps, min(2, 16 // narrow), warps, everything)
    if ordinary:
        warps = max(1, warps // 2) if loss == "js" or classes <= LOOPED_SHORT else warps
        registers = LOOPED_REGISTERS if narrow == 2 else LOOPED_FLOAT32_REGISTERS
        if loss in ("js", "dist"):
            registers = LOOPED_JS_REGISTERS if loss == "js" else LOOPED_DIST_REGISTERS
        elif not unit_temperature:
            half = plain and narrow == 2
            registers = LOOPED_SHARP_HALF_REGISTERS if half else LOOPED_SHARP_REGISTERS
            registers = LOOPED_MIXED_REGISTERS if mixed else registers
    else:
        registers = LOOPED_MOST_REGISTERS if plain or not (wide or probabilities) else everything
    return Looped(32 * warps, 16 // narrow, warps, registers)


@lru_cache(maxsize=1024)
def piece_config(columns: int, vector: int, *, wide: bool) -> Looped:
    """Layout of the staged kernels, of a program for each row's piece; none has been timed. ``vector`` is how many
    neighbours are loaded as one."""
    width = max(vector, 2)
    warps = LOOPED_WARPS // (2 if wide else 1)
    while warps > 1 and 32 * warps * width >= 2 * columns:
        warps //= 2
    return Looped(32 * warps, width, warps, 255)


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
#: Neighbours that cannot be loaded in vectors: (least number of tiles, at COLUMN_CHUNK rows each; rows and classes of a
#: tile; registers). A thread has one row there, and its statistics once: 4096 rows of 21841 classes of bfloat16 took an
#: H200 836 us in tiles of 8 x 64, and 213 so. Few rows of few classes are too few tiles.
COLUMN_SINGLES = ((1024, 1, 512, 64), (128, 2, 256, 80))
COLUMN_SINGLES_PROGRAMS = 2048
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
def column_config(rows: int, classes: int, *, wide: bool, neighbours: bool, vectors: bool) -> Columns:
    """Layout of column_moments; ``neighbours`` says that every column stride is 1, and ``vectors`` that at least two of
    them are loaded as one."""
    block = min(COLUMN_BLOCK, max(16, 1 << (classes - 1).bit_length()))
    tile_rows = 128 * (COLUMN_ELEMENTS // (2 if wide or not vectors else 1)) // block
    programs, registers = COLUMN_PROGRAMS, 255
    if neighbours and not (vectors or wide):
        for least, *tile in COLUMN_SINGLES:
            if rows // COLUMN_CHUNK * (classes // tile[1]) >= least:
                tile_rows, block, registers = tile
                programs = COLUMN_SINGLES_PROGRAMS
                break
    chunks = max(1, min(-(-rows // COLUMN_CHUNK), programs // -(-classes // block)))
    chunk = -(-rows // chunks)
    return Columns(tile_rows, block, -(-chunk // tile_rows) * tile_rows, 4, registers)


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
#: Rows of more classes than this, as far as a tile holds them, have a program each whose threads have 16 of a row, as
#: those of the row losses on chip: what a thread does once for its row is then a third, not three quarters, of all.
ZIPF_SHORT, ZIPF_ELEMENTS = 256, 16


@lru_cache(maxsize=1024)
def zipf_config(classes: int, *, wide: bool, neighbours: bool) -> Streamed:
    """Layout of zipf_rows: as USKD's kernels around a sort, but with all the registers that there are."""
    config = streamed_config(classes, wide=wide, neighbours=neighbours)
    rows, warps = min(ZIPF_WIDE_ROWS, config.rows) if wide else config.rows, config.warps
    block = 1 << (classes - 1).bit_length()
    if ZIPF_SHORT < block <= STREAMED[False, True][0] and neighbours and not wide:
        rows, warps = 1, block // (32 * ZIPF_ELEMENTS)
    return config._replace(rows=rows, warps=warps, registers=min(255, 2048 // warps))


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
    config = streamed_config(classes, wide=wide, neighbours=neighbours)
    if smoothed and probabilities and not wide:  # they spill two words at 128, on sm_100
        config = config._replace(registers=STREAMED_SMOOTHED_REGISTERS)
    return config


@lru_cache(maxsize=1024)
def streamed_config(classes: int, *, wide: bool, neighbours: bool) -> Streamed:
    """Layout of the kernels around PyTorch's sort, and of the one that makes USKD's batch sums."""
    tile, warps, registers = STREAMED[wide, neighbours]
    block = min(tile, max(16, 1 << (classes - 1).bit_length()))
    return Streamed(min(ON_CHIP_ROWS, tile // block), block, warps, registers)
