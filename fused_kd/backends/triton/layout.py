"""The dispatch table: the layout of each kernel, a pure function of the class count, the dtypes and the kind of call.

Nothing is tuned at run time. The compiler's reports (registers, spills, width of loads) for sm_80, sm_90 and sm_100
decided the entries, and the tests check these reports again. The entries serve all three: the device's capability is no
argument yet. The row losses' entries were chosen among several on an NVIDIA H200 (docs/kernels.md). The others have not
been timed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple


class Gpu(NamedTuple):
    """The properties of a GPU that launches depend on. ``lanes`` is the number of threads of a warp; ``register_limit``
    says that the compiler takes the option ``maxnreg``."""

    lanes: int
    register_limit: bool


#: The GPUs that this table is made for: it assumes warps of 32 threads, and their registers.
NVIDIA = Gpu(32, True)


def fitted(options: dict[str, Any], gpu: Gpu) -> dict[str, Any]:
    """Return a launch's options for a GPU: the same number of threads, in warps of its size."""
    if gpu == NVIDIA:
        return options
    kept = {name: value for name, value in options.items() if gpu.register_limit or name != "maxnreg"}
    return {**kept, "num_warps": max(1, options["num_warps"] * NVIDIA.lanes // gpu.lanes)}


def options_of(config: Any) -> dict[str, int]:
    """Return a layout of this table as options of a launch."""
    names = {"warps": "num_warps", "registers": "maxnreg"}
    return {names.get(name, name.upper()): value for name, value in config._asdict().items()}


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
    """Tiles of ``block`` neighbours, each for ``warps`` warps."""

    block: int
    warps: int


#: Ordinary calls: class indices, neighbours in memory, no z-scores, no smoothed labels. (Most classes, rounded up to a
#: power of two; tile of classes x rows; warps; registers of a thread for NKD at T = 1.) Each thread has 16 logits of
#: each input. With 8, its work per row, some 500 instructions, takes half of the time, and 8192 rows of 1000 classes
#: took an H200 36 us instead of 30.
ON_CHIP = (
    (256, 512, 4, 64),  # several rows per program; one warp per row took as long
    (512, 512, 1, 120),
    (1024, 1024, 2, 128),
    (2048, 2048, 4, 96),
    (4096, 4096, 8, 128),  # if vectors cannot be loaded
)
#: With vectors, longer rows than this are faster walked twice than held on chip, where too few are in flight at once:
#: NKD of 8192 rows of 8192 classes took an H200 164 us instead of 299, of 4096 classes 93 instead of 100.
ON_CHIP_MOST = 2048
#: Registers of other losses, and of NKD at other temperatures. 168 are the most that leave room for 12 warps on a
#: multiprocessor.
ON_CHIP_REGISTERS, ON_CHIP_DIST_REGISTERS = 168, 200
#: Registers if one exponential serves all softmaxes. On sm_90 the compiler gives WSLD 123 at a limit of 136, and 16
#: warps fit, but 139 at 144. KD and DKD take more than 128 at either, and at 136 KD spilled a word on sm_100.
ON_CHIP_SINGLE_REGISTERS = {"kd": 144, "dkd": 144, "wsld": 136, "tf_kd": 136}
#: All other calls, which would spill with the table above: (tile, warps, registers), 8 logits of each input per thread
#: except in the last row. Without a limit the compiler aims at round occupancies and spills a few words to get there.
#: These are the smallest limits without spills in any dtype. At 8192, probabilities as targets spill, and losses other
#: than NKD; at 4096 both together.
ON_CHIP_MORE = (
    (1024, 4, 64),  # smaller rows share a program
    (2048, 8, 80),
    (4096, 16, 64),
    (8192, 16, 128),
)
#: float64 takes twice the registers, and its exp2 some forty more: 4 logits per thread, and all available registers.
ON_CHIP_WIDE = (
    (512, 4, 255),  # half the tile of float32 with as many warps
    (1024, 8, 255),  # twice that
    (2048, 16, 128),  # the limit for 16 warps; NKD takes nearly all
)
#: More rows than this in a program of tiny rows cost registers for their coefficients and spill.
ON_CHIP_ROWS = 16

#: Registers of NKD with probabilities, by whether T = 1: with one row per program, and with several. Then each thread
#: has the statistics and coefficients of all of them.
PROBABILITIES_REGISTERS = {True: (96, 112), False: (112, 128)}

#: Warps of a looped program. 8 warps at 64 registers put four rows on a multiprocessor, and their walks overlap: 8192
#: rows of 128256 classes took an H200 2.8 ms with 32 warps, 2.6 with 16 and 2.5 with 8. At 72 registers, which leave
#: room for one row less, 8 took as long as 16. Rows of up to LOOPED_SHORT classes have too few tiles for 8: 4096
#: classes took 124 us with 8 and 93 with 4.
LOOPED_WARPS, LOOPED_REGISTERS = 8, 64
LOOPED_SHORT = 16384
#: Registers for float32; at another temperature; and there for logits of two dtypes, which spill a word at less on some
#: GPUs.
LOOPED_FLOAT32_REGISTERS, LOOPED_SHARP_REGISTERS, LOOPED_MIXED_REGISTERS = 72, 80, 104
#: Registers of NKD in half precision at another temperature. With a limit of 80 the compiler still takes 72 for most
#: calls, but for some on sm_100 all 80, and then spills a word.
LOOPED_SHARP_HALF_REGISTERS = 72
#: Jensen–Shannon spills at 80, the limit for three programs of 8 warps. With 4 warps five fit on a multiprocessor.
LOOPED_JS_REGISTERS, LOOPED_DIST_REGISTERS = 104, 128
#: Registers with z-scores, probabilities or smoothed labels, so that two programs fit on a multiprocessor. Without it
#: some take 130 to 160. z-scores with probabilities, and float64 of losses other than NKD, would spill.
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
    """Return the layout of the row kernels.

    Args:
        classes: Row length.
        narrow: Bytes of the narrowest logit or probability. Its vectors of 16 bytes set the looped tile's width.
        wide: Arithmetic is in float64.
        probabilities: The target holds probabilities, which are one more tile to keep.
        unit_temperature: One exponential of each logit serves all softmaxes, as at temperature 1.
        neighbours: Every column stride is 1. Other strides need a pointer for each logit.
        vectors: The looped kernel can walk rows of every tensor in full vectors from the same column on.
        mixed: Student's and teacher's logits differ in dtype.
        loss: The name of the row loss.
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
        # In float64 KD with all options spills if a program holds as many rows as NKD's.
        kept = len(tiles) - (not plain) - (probabilities and not wide)
        for tile, warps, registers in tiles[: max(kept, 0)]:
            if block <= tile:
                shared = tile // 2 if wide and not plain else tile
                rows = min(ON_CHIP_ROWS, max(1, shared // block))
                if scores and not wide:
                    # In the longest rows JS and WSLD spill two words at 128 registers, the limit for 16 warps.
                    warps = min(warps, 8)
                if not neighbours or not plain or wide:
                    registers = min(255, 2048 // warps)  # all available ones
                else:
                    registers = PROBABILITIES_REGISTERS[unit_temperature][rows > 1] if tile <= 2048 else 128
                return OnChip(rows, block, warps, registers)
    warps = LOOPED_WARPS
    everything = min(255, 2048 // warps)
    if not vectors:
        # Single loads, each with a pointer if columns are strided. Threads exchange them: with 4 per thread DIST took
        # 2.5 times as long on an H200 as with 2.
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
        registers = LOOPED_MOST_REGISTERS if plain or not (wide or (probabilities and scores)) else everything
    return Looped(32 * warps, 16 // narrow, warps, registers)


@lru_cache(maxsize=1024)
def piece_config(columns: int, vector: int, *, wide: bool) -> Looped:
    """Return the layout of the staged kernels, with a program for each row's piece. It has not been timed. ``vector``
    is the number of neighbours in one load."""
    width = max(vector, 2)
    warps = LOOPED_WARPS // (2 if wide else 1)
    while warps > 1 and 32 * warps * width >= 2 * columns:
        warps //= 2
    return Looped(32 * warps, width, warps, 255)


@lru_cache(maxsize=1024)
def scale_config(width: int) -> Flat:
    """Return the layout of scale_rows: 16 elements per thread, two 16-byte vectors of half precision. Tiles are short,
    because a long row's first and last tiles are masked, and so scalar if the row does not start aligned."""
    block = min(2048, max(128, 1 << (width - 1).bit_length()))
    return Flat(block, max(1, block // 512))


class Normalized(NamedTuple):
    """``rows`` rows per program, with ``lanes`` threads each, and ``width`` classes of a tile per thread."""

    rows: int
    lanes: int
    width: int
    warps: int


class Columns(NamedTuple):
    """Tiles of ``rows`` x ``block`` classes. A program of ``warps`` warps walks down ``chunk`` rows."""

    rows: int
    block: int
    chunk: int
    warps: int
    registers: int


#: Warps of a program that normalises rows. Rows with more classes than NORMALIZE_LONG have a program each, so that few
#: long rows fill a GPU.
NORMALIZE_LONG, NORMALIZE_WARPS, NORMALIZE_LONG_WARPS = 4096, 4, 16
#: Programs that share the columns: 8 on each multiprocessor, to hide the latency of loads.
COLUMN_PROGRAMS = 1024
#: Classes of a tile, a line of 128 bytes in half precision, and elements of a thread of 4 warps: its moments and
#: probabilities take some 110 registers. In float64 it is half as many, and without vectors, where a thread has parts
#: of more rows.
COLUMN_BLOCK, COLUMN_ELEMENTS = 64, 8
#: Neighbours that cannot be loaded in vectors: (least number of tiles, at COLUMN_CHUNK rows each; rows and classes of a
#: tile; registers). Here a thread has one row, and one set of its statistics: 4096 rows of 21841 classes of bfloat16
#: took an H200 836 us in tiles of 8 x 64, and 213 us in these. Few rows of few classes are too few tiles.
COLUMN_SINGLES = ((1024, 1, 512, 64), (128, 2, 256, 80))
COLUMN_SINGLES_PROGRAMS = 2048
#: The least rows of a chunk: then its five moments are a sixth of the half-precision logits that are read for them.
COLUMN_CHUNK = 64
#: (chunks, classes) of a tile for merging chunks: columns first, so that a thousand classes are 8 programs.
FINISH_TILE = (8, 128)


@lru_cache(maxsize=1024)
def normalize_config(classes: int, narrow: int) -> Normalized:
    """Return the layout of normalize_rows: a row gets whole warps once it has a vector for each thread."""
    width = max(2, 16 // narrow)
    warps = NORMALIZE_LONG_WARPS if classes > NORMALIZE_LONG else NORMALIZE_WARPS
    lanes = 32 * warps if classes > NORMALIZE_LONG else min(32, 1 << (-(-classes // width) - 1).bit_length())
    return Normalized(32 * warps // lanes, lanes, width, warps)


@lru_cache(maxsize=1024)
def column_config(rows: int, classes: int, *, wide: bool, neighbours: bool, vectors: bool) -> Columns:
    """Return the layout of column_moments. ``neighbours`` says that every column stride is 1, and ``vectors`` that one
    load has at least two neighbours."""
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
    """Tiles of ``positions`` x ``classes`` dense logits. A program of ``warps`` warps walks along the classes."""

    positions: int
    classes: int
    warps: int


#: Logits of a tile of find_votes, 16 per thread of 8 warps. With a program for each row and 49 positions, 256 rows give
#: a multiprocessor two programs, which then have 16 kilobytes of half precision in flight.
VOTE_TILE = 4096
#: Positions of a tile. If positions are neighbours, a row of the tile is a line of memory. Else one position is a line,
#: and few positions per tile give a row several programs.
VOTE_POSITIONS, VOTE_FEW_POSITIONS = 64, 4
#: Votes of a tile, compared with as many others: a program of 4 warps compares all of 49 at once.
VOTES = 64


#: Rows of a float64 program. Each takes registers for its coefficients and its votes: 4 rows spill.
ZIPF_WIDE_ROWS = 2
#: Longer rows than this have a program each, if they fit a tile, with 16 classes per thread, as the row losses on chip.
#: Then the work per row of a thread is a third, not three quarters, of all.
ZIPF_SHORT, ZIPF_ELEMENTS = 256, 16


@lru_cache(maxsize=1024)
def zipf_config(classes: int, *, wide: bool, neighbours: bool) -> Streamed:
    """Return the layout of zipf_rows: as USKD's kernels around a sort, but with all available registers."""
    config = streamed_config(classes, wide=wide, neighbours=neighbours)
    rows, warps = min(ZIPF_WIDE_ROWS, config.rows) if wide else config.rows, config.warps
    block = 1 << (classes - 1).bit_length()
    if ZIPF_SHORT < block <= STREAMED[False, True][0] and neighbours and not wide:
        rows, warps = 1, block // (32 * ZIPF_ELEMENTS)
    return config._replace(rows=rows, warps=warps, registers=min(255, 2048 // warps))


@lru_cache(maxsize=1024)
def vote_config(positions: int, classes: int, *, by_position: bool) -> Votes:
    """Return the layout of find_votes. ``by_position`` says that positions are neighbours in memory."""
    most = VOTE_POSITIONS if by_position else VOTE_FEW_POSITIONS
    tile_positions = min(most, 1 << (positions - 1).bit_length())
    tile_classes = min(VOTE_TILE // tile_positions, max(16, 1 << (classes - 1).bit_length()))
    return Votes(tile_positions, tile_classes, max(1, tile_positions * tile_classes // 512))


#: USKD, float32: (largest tile of classes x rows that is sorted on chip, warps, registers of a thread), with 8 words of
#: 64 bits per thread. The sorting network and its compilation time grow with the square of the tile's logarithm: the
#: last row takes seconds.
RANKED = (
    (1024, 4, 128),  # smaller rows share a program
    (2048, 8, 128),  # 16 KB of shared memory, for words that move between warps
    (4096, 16, 128),  # 32 KB; the register limit for 16 warps. 8192 fits with indices, but takes 11 s to compile
)
#: Registers if a program sorts several rows with probabilities as targets: it has the coefficients of each.
RANKED_ROWS_REGISTERS = 168
#: Tiles of the kernels around PyTorch's sort, by (float64, neighbours): strided columns need a pointer for each logit.
STREAMED = {
    (False, True): (2048, 8, 128),  # 8 elements per thread, a vector of half precision; probabilities take all 128
    (False, False): (1024, 8, 128),  # 4 elements, each with its pointer
    (True, True): (512, 4, 255),  # 4 elements, in 165 registers
    (True, False): (512, 4, 255),  # the same, pointers included
}

#: Registers for float32 with probabilities as targets and smoothed labels.
STREAMED_SMOOTHED_REGISTERS = 168


@lru_cache(maxsize=1024)
def uskd_config(
    classes: int, *, wide: bool, probabilities: bool, neighbours: bool, smoothed: bool = False
) -> OnChip | Streamed:
    """Return the layout of USKD: rows sorted on chip, or streamed around PyTorch's sort. Float64 is always streamed,
    because its keys leave no room for the class in a word. :func:`row_config` has the arguments; ``smoothed`` says that
    the cross-entropy's labels are smoothed."""
    block = max(16, 1 << (classes - 1).bit_length())
    for tile, warps, registers in () if wide else RANKED:
        if block <= tile:
            rows = min(ON_CHIP_ROWS, max(1, tile // block))
            return OnChip(rows, block, warps, RANKED_ROWS_REGISTERS if rows > 1 and probabilities else registers)
    config = streamed_config(classes, wide=wide, neighbours=neighbours)
    if smoothed and probabilities and not wide:  # at 128 registers this spills two words on sm_100
        config = config._replace(registers=STREAMED_SMOOTHED_REGISTERS)
    return config


@lru_cache(maxsize=1024)
def streamed_config(classes: int, *, wide: bool, neighbours: bool) -> Streamed:
    """Return the layout of the kernels around PyTorch's sort, and of the kernel of USKD's batch sums."""
    tile, warps, registers = STREAMED[wide, neighbours]
    block = min(tile, max(16, 1 << (classes - 1).bit_length()))
    return Streamed(min(ON_CHIP_ROWS, tile // block), block, warps, registers)
