"""The study's two pictures: the accuracy of every run, and the loss's share of a step."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.show.plot import GRID, INK, MUTED
from study.comparison.plan import METHODS, TEACHER_FREE, WITH_TEACHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCENT = "#d1495b"
#: Forms of a loss, from the slowest, with the colours that the benchmark's plots have for them.
FORMS = {
    "published": ("published eager form", "#9aa5b1"),
    "eager": ("mask-free eager form", "#c3b59b"),
    "fused": ("fused_kd", ACCENT),
    "PyTorch": ("F.cross_entropy", "#d5d9de"),
}


def draw(results: dict[str, Any], page: Path) -> dict[str, Path]:
    """Write the pictures of the results beside the page; returns those there are, by name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = {"accuracy": page.with_name(f"{page.stem}-accuracy.png")}
    # A number of the largest font would be as wide as a panel, so both pictures have the same small one.
    with plt.rc_context({"font.size": 9, "text.color": INK, "axes.labelcolor": INK}):
        groups = [("With a teacher", WITH_TEACHER), ("Without one", TEACHER_FREE)]
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        for axes, (title, methods) in zip(panels, groups, strict=True):
            _accuracies(results, axes, title, [name for name in methods if name in results["methods"]])
        low = min(axes.get_xlim()[0] for axes in panels)
        high = max(axes.get_xlim()[1] for axes in panels)
        for axes in panels:
            axes.set_xlim(low, high)
        split = next(iter(results["runs"][0]["accuracy"]))
        text = f"accuracy on {split}, %: a dot for each seed, their mean; dashed: the baseline's mean"
        figure.supxlabel(text, fontsize=9, color=INK)
        figure.savefig(paths["accuracy"], dpi=120, facecolor="white")
        plt.close(figure)
        rows = results.get("cost", {}).get("rows", [])
        classes = sorted({row["classes"] for row in rows})
        if classes:
            paths["cost"] = page.with_name(f"{page.stem}-cost.png")
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
            figure.savefig(paths["cost"], dpi=120, facecolor="white")
            plt.close(figure)
    return paths


def _accuracies(results: dict[str, Any], axes: Axes, title: str, methods: list[str]) -> None:
    """A line for each method: a dot for each seed, a bar at their mean."""
    split = next(iter(results["runs"][0]["accuracy"]))
    for y, name in enumerate(reversed(methods)):
        values = [100 * run["accuracy"][split] for run in results["runs"] if run["method"] == name]
        if not values:
            continue
        mean = statistics.fmean(values)
        if name == "ce":
            axes.axvline(mean, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.plot(values, [y] * len(values), "o", color=ACCENT, ms=5, alpha=0.75, mew=0, zorder=3)
        axes.plot([mean, mean], [y - 0.28, y + 0.28], color=INK, lw=2, zorder=2)
        axes.annotate(f"{mean:.1f}", (mean, y + 0.3), ha="center", va="bottom", fontsize=8, color=INK)
    axes.set_yticks(range(len(methods)), [METHODS[name].title for name in reversed(methods)])
    axes.set_ylim(-0.6, len(methods) - 0.3)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
    _plain(axes, "x")


def _shares(axes: Axes, classes: int, rows: list[dict[str, Any]]) -> None:
    """Bars of the loss's share of a step, a group for each method."""
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
