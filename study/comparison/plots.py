"""The study's plots: differences with intervals, rates and convergence, and the loss's share of a step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.show.plot import GRID, INK, MUTED
from study.comparison import findings, paper
from study.comparison.plan import METHODS
from study.comparison.records import Record
from study.comparison.results import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCENT, AGREED = "#d1495b", "#00798c"
#: Colours of the intervals, by verdict.
COLORS = {paper.AGREES: AGREED, paper.DISAGREES: ACCENT, paper.UNDECIDED: MUTED}
#: Forms of a loss from the slowest: titles, and the colours of the benchmark's plots.
FORMS = {
    "published": ("published eager form", "#9aa5b1"),
    "eager": ("mask-free eager form", "#c3b59b"),
    "fused": ("fused_kd", ACCENT),
    "PyTorch": ("F.cross_entropy", "#d5d9de"),
}


def draw(views: Sequence[View], cost: dict[str, Any] | None, page: Path) -> list[Path]:
    """Write the plots next to the page; return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    makers: dict[str, Callable[[], Any]] = {
        "differences": lambda: _differences(plt, views),
        "convergence": lambda: _convergence(plt, views),
    }
    if cost:
        makers["cost"] = lambda: _cost(plt, cost["rows"])
    paths = []
    # One small font for all plots: larger numbers would be as wide as a panel.
    with plt.rc_context({"font.size": 9, "text.color": INK, "axes.labelcolor": INK}):
        for name, maker in makers.items():
            path = page.with_name(f"{page.stem}-{name}.png")
            figure = maker()
            figure.savefig(path, dpi=120, facecolor="white")
            plt.close(figure)
            paths.append(path)
    return paths


def _differences(plt: Any, views: Sequence[View]) -> Any:
    """A panel per task, a line per pair: the mean difference and its interval."""
    pairs = [pair for _, both in findings.ORDERS for pair in both]
    figure, panels = plt.subplots(
        1, len(views), figsize=(2.6 + 2.6 * len(views), 4.6), layout="constrained", squeeze=False, sharey=True
    )
    figure.get_layout_engine().set(wspace=0.06)
    for axes, view in zip(panels[0], views, strict=True):
        axes.axvline(0, color=INK, lw=1, zorder=1)
        for comparison in findings.comparisons(view, view.main):
            y = len(pairs) - 1 - pairs.index((comparison.better, comparison.worse))
            color, half = COLORS[comparison.verdict], comparison.half_width or 0.0
            axes.plot(
                [comparison.difference - half, comparison.difference + half], [y, y], color=color, lw=2.5, zorder=2
            )
            axes.plot([comparison.difference], [y], "o", color=color, ms=5, mew=0, zorder=3)
        axes.set_title(view.task.title, loc="left", fontweight="bold", fontsize=10)
        axes.set_ylim(-0.6, len(pairs) - 0.4)
        axes.locator_params(axis="x", nbins=6)
        _plain(axes, "x")
    names = [f"{METHODS[better].title} over {METHODS[worse].title}" for better, worse in pairs]
    panels[0][0].set_yticks(range(len(pairs)), names[::-1])
    handles = [plt.Line2D([], [], color=color, marker="o", lw=2.5, ms=5) for color in COLORS.values()]
    figure.legend(
        handles, ["agrees with the paper", "disagrees", "undecided"], loc="outside upper right", ncols=3, frameon=False
    )
    figure.supxlabel("difference in accuracy, points, and its 95 % interval over the seeds", fontsize=9, color=INK)
    return figure


def _convergence(plt: Any, views: Sequence[View]) -> Any:
    """The baseline's accuracy: above by learning rate, below by epoch, also in longer training."""
    figure, grid = plt.subplots(2, len(views), figsize=(3.1 * len(views), 5.2), layout="constrained", squeeze=False)
    figure.get_layout_engine().set(wspace=0.06)
    for (upper, lower), view in zip(grid.T, views, strict=True):
        searched = view.searched("ce")
        upper.plot(list(searched), list(searched.values()), "o-", color=MUTED, ms=5, mew=0, zorder=2)
        if view.rate in searched:
            upper.plot([view.rate], [searched[view.rate]], "o", color=ACCENT, ms=8, mew=0, zorder=3)
        upper.set_xscale("log", base=2)
        upper.set_xticks(list(searched), [f"{rate:g}" for rate in searched])
        upper.minorticks_off()
        upper.set_title(view.task.title, loc="left", fontweight="bold", fontsize=10)
        upper.set_xlabel("baseline's learning rate")
        _plain(upper, "y")
        split = view.splits[0]
        for factor in (1, *(length.factor for length in view.task.lengths)):
            if by_seed := view.longer(factor):
                label = "as compared" if factor == 1 else "longer" if factor == 2 else ""
                _curve(lower, label, list(by_seed.values()), split, ACCENT if factor == 1 else MUTED)
        if view.teacher:
            value = 100 * view.teacher["accuracy"][split]
            lower.axhline(value, color=INK, lw=1, ls=(0, (4, 3)), label="the teacher")
        lower.set_xlabel("epoch")
        lower.locator_params(axis="x", integer=True)
        _plain(lower, "y")
    for row in grid:
        row[0].set_ylabel("accuracy, %")
    grid[1][0].legend(frameon=False, loc="lower right", fontsize=8)
    return figure


def _curve(axes: Axes, label: str, records: Sequence[Record], split: str, color: str) -> None:
    curves = [record["curve"]["accuracy"][split] for record in records]
    means = [100 * statistics.fmean(values) for values in zip(*curves, strict=True)]
    axes.plot(range(1, len(means) + 1), means, "o-" if len(means) < 12 else "-", color=color, ms=4, mew=0, label=label)


def _cost(plt: Any, rows: list[dict[str, Any]]) -> Any:
    classes = sorted({row["classes"] for row in rows})
    figure, grid = plt.subplots(
        1, len(classes), figsize=(4.5 * len(classes), 4.2), layout="constrained", squeeze=False, sharey=True
    )
    for axes, count in zip(grid[0], classes, strict=True):
        _shares(axes, count, [row for row in rows if row["classes"] == count])
    right = max(axes.get_xlim()[1] for axes in grid[0])
    for axes in grid[0]:
        axes.set_xlim(0, right)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False)
    return figure


def _shares(axes: Axes, classes: int, rows: list[dict[str, Any]]) -> None:
    """Bars of the loss's share of a step, a group per method."""
    names = [row["method"] for row in rows]
    shown: set[str] = set()
    for y, row in enumerate(reversed(rows)):
        forms = [name for name in FORMS if name in row["forms"]]
        for number, form in enumerate(forms):
            title, color = FORMS[form]
            times = row["forms"][form]
            share = 100 * times["loss"] / times["step"]
            height = 0.84 / 3
            position = y + ((len(forms) - 1) / 2 - number) * height
            axes.barh(position, share, height * 0.9, color=color, label=None if title in shown else title, zorder=3)
            shown.add(title)
            axes.annotate(
                f"{share:.1f}" if share < 9.95 else f"{share:.0f}", (share, position), xytext=(3, 0),
                textcoords="offset points", va="center", fontsize=7, color=INK,
                fontweight="bold" if form == "fused" else "normal",
            )  # fmt: skip
    axes.set_yticks(range(len(names)), [METHODS[name].title for name in reversed(names)])
    axes.set_title(f"{classes} classes", loc="left", fontweight="bold", fontsize=10)
    axes.set_xlabel("share of a step that is the loss, %")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
    _plain(axes, "x")


def _plain(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, color=GRID, lw=0.8, zorder=0)  # type: ignore[arg-type]
    axes.tick_params(length=0, colors=INK)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
