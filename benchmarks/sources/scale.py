"""docs/scale.md: bytes stored, moved and exchanged from a thousand to a million classes, on 1 to 64 processes.

Bytes follow from the sizes. Times are a model: a head's products and the row kernel run at measured rates, the same for
all sizes; an exchange has an assumed bandwidth and latency.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.show.report import lines, percent, provenance, replace_block, significant, size
from benchmarks.sources.case import Case
from benchmarks.sources.forms import PRODUCTS, ROW_KERNEL, chunk_rows
from benchmarks.sources.heads import MATRICES
from fused_kd.backends.native.staged import exchanged_places
from fused_kd.backends.staged import stages_of
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES
from fused_kd.core.options import HyperParameters, Options

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEGIN, END = "<!-- scale:begin -->", "<!-- scale:end -->"
CLASSES = (1_000, 10_000, 128_256, 1_000_000)
PROCESSES = (1, 2, 4, 8, 16, 32, 64)
NUMBER = 8  # bytes per exchanged number, on a CPU
BANDWIDTH, LATENCY = 10e9, 50e-6  # of an exchange, assumed: bytes per second that a process receives, and seconds
SHARDED = [name for name in ROW_LOSSES if "ClassShard" in LOSSES[name].sources]


@dataclass(frozen=True)
class Measured:
    """Constants of the model, from a result."""

    case: Case
    flops: float  # of the products, per second
    bytes: float  # logits and gradient that NKD's row kernel moves, per second
    peak: int | None = None  # bytes of NKD with two heads beyond the inputs and the gradients


def measured(result: dict[str, Any]) -> Measured:
    """Constants from the largest float32 case with both parts timed; raises ValueError without one."""
    found = []
    for case in result.get("cases", []) if result.get("source") == "head" else []:
        ms = {entry["name"] + entry["loss"]: entry.get("milliseconds") for entry in case["forms"]}
        products, kernel = ms.get(PRODUCTS), ms.get(f"{ROW_KERNEL}nkd")
        if case["dtype"] == "float32" and products and kernel:
            own = Case(**{name: case[name] for name in Case.__dataclass_fields__ if name != "chunk_rows"})
            found.append(
                Measured(
                    own,
                    _flops(own) / products["median"] * 1e3,
                    MATRICES * own.logits_bytes / kernel["median"] * 1e3,
                    case.get("ratios", {}).get("nkd", {}).get("peak_bytes"),
                )
            )
    if not found:
        raise ValueError("expected a result of --source head with a float32 case, its products and NKD's row kernel")
    return max(found, key=lambda each: each.case.logits_bytes)


def _flops(case: Case) -> float:
    """Operations of three products with the student's weight and one with the teacher's, 2 per term."""
    return 2.0 * case.rows * case.classes * (3 * case.width + case.teacher_width)


def _chunk(case: Case, device: str) -> tuple[int, int]:
    """Rows of a chunk, and the bytes of its logits in float32, on a GPU with a gradient."""
    where = "cpu" if device == "cpu" else "meta"  # fused_kd treats any other device like a GPU
    rows = chunk_rows(replace(case, device=where))
    return rows, (MATRICES - (device == "cpu")) * rows * case.classes * 4


def numbers(loss: str, standardize: bool = False) -> dict[str, int]:
    """Numbers per row that each stage of a loss exchanges, for class indices and without CE."""
    options = Options(HyperParameters(), -100, "mean", (True,), (1.0,), loss, standardize)
    *stages, _ = stages_of(options)
    return {stage: len(exchanged_places(stage, options, labels=False)) for stage in stages}


def exchanged(loss: str, standardize: bool = False) -> int:
    """Bytes per row that a process sends to all others."""
    return NUMBER * sum(numbers(loss, standardize).values())


@dataclass(frozen=True)
class Times:
    """The model's seconds of forward and backward."""

    products: float
    kernel: float
    exchange: float

    @property
    def all(self) -> float:
        return self.products + self.kernel + self.exchange


def times(about: Measured, classes: int, processes: int) -> Times:
    """Times of NKD on one of the processes.

    Several processes exchange the statistics of the rows, chunk by chunk, and add up the hidden states' gradient.
    """
    own = replace(about.case, classes=-(-classes // processes))
    chunks = -(-own.rows // _chunk(own, "cpu")[0])
    exchange = 0.0
    if processes > 1:
        statistics = own.rows * (processes - 1) * exchanged("nkd")
        hidden = 2 * own.rows * own.width * 4 * (processes - 1) / processes
        exchange = (statistics + hidden) / BANDWIDTH + (chunks + 1) * LATENCY
    return Times(_flops(own) / about.flops, MATRICES * own.logits_bytes / about.bytes, exchange)


def markdown(result: dict[str, Any], source: str) -> str:
    """The generated block of the page."""
    about = measured(result)
    case = about.case
    sizes = f"{case.rows} rows, hidden states {case.width} wide and the teacher's {case.teacher_width}"
    return "\n\n".join(
        [
            f"### Stored by one process: {sizes}",
            _stored(case),
            *_measured_peak(about),
            "### Exchanged of a row by each process, however many classes, for class indices without CE, in float64",
            _exchanged(),
            f"### A million classes on several processes: {sizes}",
            _shared(about),
            "### A model of the time of NKD's forward + backward, in seconds",
            "This is a model, not a measurement. Products at "
            f"{about.flops / 1e9:.3g} GFLOP/s and the row kernel at {about.bytes / 1e9:.3g} GB/s, as they were "
            f"measured at {case.name}; an exchange at {BANDWIDTH / 1e9:g} GB/s and {LATENCY * 1e6:g} µs, which are "
            "assumed. Each process has as many cores as that one had.",
            _model(about),
            f"The two constants are from `benchmarks/results/{source}`.",
            *provenance(result),
        ]
    )


def _measured_peak(about: Measured) -> list[str]:
    if about.peak is None:
        return []
    share = percent(about.peak / (MATRICES * about.case.logits_bytes))
    return [
        f"Measured at {about.case.name}: {size(about.peak)} beyond the inputs and the gradients, {share} of the three "
        "matrices. Beside a chunk it has what products and kernels need, and what the allocator keeps."
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return lines([header, ["---", *("---:" for _ in header[1:])], *rows])


def _stored(case: Case) -> str:
    rows = []
    for classes in CLASSES:
        own = replace(case, classes=classes)
        half = MATRICES * own.logits_bytes // 2
        cells = [f"{classes:,}", size(MATRICES * own.logits_bytes), size(half)]
        for device in ("cpu", "cuda"):
            rows_of_chunk, stored = _chunk(own, device)
            cells.append(f"{size(stored)} ({rows_of_chunk} rows)")
        cells.append(size(classes * own.width * 4))
        rows.append(cells)
    header = ("classes", "three N×C matrices, float32", "bfloat16", "chunk of a Head, CPU", "GPU", "weight, float32")
    return _table(header, rows)


def _exchanged() -> str:
    rows = []
    for loss in SHARDED:
        given = exchanged(loss)
        words = ", ".join(f"{stage} {count}" for stage, count in numbers(loss).items())
        scores = f"{exchanged(loss, True)} B" if "teacher" in ROW_LOSSES[loss].needs else "—"
        got = (size((count - 1) * given) for count in (2, 8, 64))
        rows.append([LOSSES[loss].title, words, f"{given} B", scores, *got])
    gathered = (_gathered(count) for count in (2, 8, 64))
    rows.append(["both rows of logits instead", "10⁶ classes, float32", "", "", *gathered])
    header = ("loss", "numbers", "gives", "with z-scores", "gets, of 2", "of 8", "of 64")
    return _table(header, rows)


def _gathered(processes: int) -> str:
    return size(2 * 4 * CLASSES[-1] * (processes - 1) // processes)


def _shared(about: Measured) -> str:
    rows = []
    for processes in PROCESSES:
        own = replace(about.case, classes=-(-CLASSES[-1] // processes))
        rows_of_chunk, stored = _chunk(own, "cpu")
        got = (processes - 1) * exchanged("nkd")
        rows.append(
            [
                str(processes),
                f"{own.classes:,}",
                size(2 * own.classes * own.width * 4),
                size(MATRICES * own.logits_bytes),
                f"{size(stored)} ({rows_of_chunk} rows)",
                size(got * own.rows),
            ]
        )
    header = (
        "processes",
        "classes of one",
        "weight and gradient",
        "three N×C matrices",
        "chunk, CPU",
        "gets in a step of NKD",
    )
    return _table(header, rows)


def _model(about: Measured) -> str:
    rows = []
    for processes in PROCESSES:
        row = [str(processes)]
        for classes in CLASSES[1:]:
            found = times(about, classes, processes)
            row += [significant(found.all), percent(found.exchange / found.all)]
        rows.append(row)
    header = ["processes"]
    for classes in CLASSES[1:]:
        header += [f"{classes:,} classes", "of it exchange"]
    return _table(header, rows)


def plot(result: dict[str, Any], path: Path) -> None:
    """Write the PNG: bytes over the classes, and the model's time over the processes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from benchmarks.show.plot import INK, MUTED
    from benchmarks.show.report import note

    about = measured(result)
    with plt.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.6), layout="constrained")
        _draw_bytes(about, left)
        _draw_times(about, right)
        figure.supxlabel(note(result, 150), x=0.01, ha="left", fontsize=7, color=MUTED)
        figure.savefig(path, dpi=160, facecolor="white")
        plt.close(figure)


def _finish(axes: Axes, title: str, ncols: int = 1) -> None:
    from benchmarks.show.plot import GRID, INK

    axes.grid(color=GRID, lw=0.8, zorder=0)
    axes.tick_params(length=0, colors=INK)
    axes.tick_params(which="minor", length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_title(title, x=0, ha="left", fontsize=11, fontweight="bold", pad=10)
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=ncols)


def _draw_bytes(about: Measured, axes: Axes) -> None:
    classes = [round(10 ** (3 + step / 20)) for step in range(61)]
    cases = [replace(about.case, classes=each) for each in classes]
    curves: tuple[tuple[str, list[int], dict[str, Any]], ...] = (
        ("three matrices of logits", [MATRICES * case.logits_bytes for case in cases], {"color": "#9aa5b1", "lw": 2.5}),
        ("weight", [case.classes * case.width * 4 for case in cases], {"color": "#616e7c", "lw": 1.2, "ls": "--"}),
        ("chunk of a Head", [_chunk(case, "cpu")[1] for case in cases], {"color": "#d1495b", "lw": 2.5}),
    )
    for label, values, style in curves:
        axes.loglog(classes, values, label=label, zorder=3, **style)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1e9:g} GB" if value >= 1e9 else f"{value / 1e6:g} MB")
    axes.set_xlabel("classes")
    _finish(axes, f"Stored by a CPU process, {about.case.rows} rows, float32")


def _draw_times(about: Measured, axes: Axes) -> None:
    """Draw times for many and for few classes: the products and kernel that processes share, the exchange they add."""
    parts = {"products": "#7ba3cc", "kernel": "#d1495b", "exchange": "#edae49"}
    for classes, style in ((CLASSES[-1], "-"), (CLASSES[1], "--")):
        found = [times(about, classes, processes) for processes in PROCESSES]
        for part, color in parts.items():
            points = [(count, getattr(each, part)) for count, each in zip(PROCESSES, found, strict=True)]
            points = [(count, value) for count, value in points if value]
            name = {"kernel": "row kernel"}.get(part, part)
            axes.loglog(*zip(*points, strict=True), style, color=color, lw=2, label=f"{name}, {classes:,}", zorder=3)
    axes.set_xticks(PROCESSES, [str(each) for each in PROCESSES])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms")
    axes.set_xlabel("processes that share the classes")
    axes.set_ylim(top=axes.get_ylim()[1] * 30)  # room for the legend
    _finish(axes, "A model of NKD's time, by classes", ncols=2)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks scale",
        description="Prints the bytes stored, moved and exchanged without whole logits, with a model of the time.",
    )
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="a result of --source head")
    parser.add_argument(
        "--update",
        type=Path,
        metavar="PAGE.md",
        help=f"write the tables between {BEGIN} and {END}, and the plot next to the page",
    )
    args = parser.parse_args(argv)
    try:
        result = json.loads(args.result.read_text(encoding="utf-8"))
        block = markdown(result, args.result.name)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.update is None:
        print(block)
        return 0
    picture = args.update.with_suffix(".png")
    try:
        changed = replace_block(args.update, BEGIN, END, block)
    except (OSError, ValueError) as error:
        parser.error(f"--update: {error}")
    plot(result, picture)
    print(f"{args.update}: {'updated' if changed else 'up to date'}; {picture}")
    return 0
