"""Counts the accesses and instructions of compiled Triton kernels by running them: ``python -m tools.ptx report``.

Counts are of one launch, per element of an N×C matrix or per row. Bytes are in units of e, the bytes of a logit, and
are shown next to the numbers stated in docs/kernels.md. *Requested* counts 32-byte sectors for each instruction of a
warp, as the first-level cache sees them; *touched* counts each sector of memory once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch

from tools.ptx.counters import KINDS

#: Rows of each call: few, but enough to make the fixed part of a launch negligible.
ROWS = 16
ON_CHIP, LONG, LONG_ODD = 1000, 9000, 9001


class Call(NamedTuple):
    loss: str
    classes: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.loss} {ROWS}×{self.classes} {str(self.dtype).removeprefix('torch.')}"


def stated(kernel: str, call: Call) -> tuple[float, float] | None:
    """Reads and writes in units of e per element, as stated in docs/kernels.md; None for kernels stated per row."""
    float32 = 4 / call.dtype.itemsize  # one float32 per element: a key, or a number of a column
    long = call.classes > 2048  # USKD and Zipf's label smoothing read such rows once more
    one_matrix, three_walks = call.loss == "tf_kd", call.loss in ("js", "dist")
    of_columns = 4 * float32 if call.loss == "dist" else 0
    return {
        "rows_on_chip": ((1 if one_matrix else 2) + of_columns, 1),
        "rows_looped": ((2 if one_matrix else 6 if three_walks else 4) + 2 * of_columns, 1),
        "scale_rows": (1, 1),
        "normalize_rows": (2, 0),
        "column_moments": (2, 0),
        "target_probabilities": (2 if long else 1, 0),
        "ranked_on_chip": (3, 2),
        "write_keys": (6, 1 + float32),
        "write_zipf": (2 * float32, float32),
        "combine_ranked": (2 + 2 * float32, 1),
        "find_votes": (4, 0),  # at 4 positions here
        "zipf_rows": (2 if long else 1, 1),
    }.get(kernel)


class Reading(NamedTuple):
    """Counts of one kernel in one call. ``loads`` and ``stores``: (requested, touched) in units of e per element.
    ``instructions`` and ``special``: of threads, per element. ``shuffles`` and ``barriers``: per row."""

    kernel: str
    call: str
    loads: tuple[float, float]
    stores: tuple[float, float]
    stated: tuple[float, float] | None
    instructions: float
    special: float
    shuffles: float
    barriers: float

    @property
    def more(self) -> bool:
        """Whether the requested bytes exceed the stated ones by more than 5 %."""
        asked = self.loads[0], self.stores[0]
        return self.stated is not None and any(a > 1.05 * b for a, b in zip(asked, self.stated, strict=True) if b)


def calls(losses: list[str], quick: bool = False) -> Iterator[Call]:
    for loss in losses:
        for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
            for classes in (ON_CHIP, LONG_ODD) if quick else (ON_CHIP, LONG, LONG_ODD):
                yield Call(loss, classes, dtype)


def read(call: Call) -> list[Reading]:
    """Run a call, forward and backward, on the driver of :mod:`tools.ptx.triton`, which must be installed."""
    from fused_kd import check
    from tools.ptx.triton.driver import session

    tensors = check.Case(call.dtype, ROWS, call.classes, check.OPTIONS[call.loss][0], loss=call.loss).inputs("cpu")
    before = len(session.launches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check.evaluate("triton", *tensors, check.OPTIONS[call.loss][0], torch.tensor(2.0), call.loss)
    elements, readings = ROWS * call.classes, []
    for launched in session.launches[before:]:
        counts = launched.result.counts
        per = call.dtype.itemsize * elements

        def bytes_of(how: str, counts: dict[str, int] = counts, per: int = per) -> tuple[float, float]:
            return 32 * counts[f"{how} sectors"] / per, counts[f"{how} bytes of memory"] / per

        readings.append(
            Reading(
                launched.kernel,
                str(call),
                bytes_of("load"),
                bytes_of("store"),
                stated(launched.kernel, call),
                32 * sum(counts[f"{kind} instructions"] for kind in KINDS) / elements,
                32 * counts["special instructions"] / elements,
                counts["shuffles"] / ROWS,
                counts["barriers"] / ROWS,
            )
        )
    return readings


HEADER = (
    "kernel", "call", "reads, stated", "requested", "touched", "writes, stated", "requested", "touched",
    "instructions", "special", "shuffles per row", "barriers per row",
)  # fmt: skip


def cells(reading: Reading) -> list[str]:
    page = ("–", "–") if reading.stated is None else tuple(f"{each:g} e" for each in reading.stated)

    def amount(value: float) -> str:
        return f"{value:.2f} e"

    return [
        reading.kernel, reading.call, page[0], *map(amount, reading.loads), page[1], *map(amount, reading.stores),
        f"{reading.instructions:.0f}", f"{reading.special:.1f}", f"{reading.shuffles:.0f}", f"{reading.barriers:.1f}",
    ]  # fmt: skip


def markdown(readings: list[Reading], capability: int) -> str:
    """Markdown table of the kernels with stated numbers; the others move a few numbers per row."""
    rows = [cells(reading) for reading in readings if reading.stated is not None]
    table = [list(HEADER), ["---", "---", *["---:"] * (len(HEADER) - 2)], *rows]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([*lines, "", f"Compiled for sm_{capability} and executed by tools/ptx."])
