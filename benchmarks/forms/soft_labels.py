"""USKD's labels for real logits: the target's label P and the other classes' Zipf labels, as a table and a PNG.

Like Figure 3 of the paper, on the shipped logits. The teacher's logits serve as the weak logits, as in the benchmark.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measure.cases import load_shipped_logits
from benchmarks.show.plot import GRID, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES_FILE = Path(__file__).parents[1] / "data" / "imagenet_classes.txt"
PHOTOS = ("chelsea", "coffee", "camera", "stereo_motorcycle", "rocket")  # each shows a class of ImageNet
STUDENT_COLOR, WEAK_COLOR, LABEL_COLOR = "#d1495b", "#e0a030", "#7ba3cc"
LABEL_TEXT = "#4a7299"  # LABEL_COLOR, dark enough to read
NOTE = (
    "Zipf label: 1 / rank without the target, scaled to sum 1. The rank is by the sum of p and v, each renormalised "
    "over the classes other than the target. P = p² + 1 − mean of p² over the {rows} shipped crops. Each photo is "
    "shown by the crop with the median p of the target. The weak logits come from a second network, {teacher}; the "
    "student is {student}. Probabilities of targets are p; those of other classes are renormalised without the target."
)


@dataclass(frozen=True)
class OtherClass:
    name: str
    label: float  # the Zipf label
    student: float  # the student's probability, renormalised without the target
    weak: float  # the same of the weak logits


@dataclass(frozen=True)
class Photo:
    name: str
    target: str
    label: float  # P
    probability: float  # the student's, of the target
    others: tuple[OtherClass, ...]  # by descending label
    note: str  # the same for all photos


def class_names() -> list[str]:
    return NAMES_FILE.read_text(encoding="utf-8").splitlines()


def collect(photos: Sequence[str], top: int) -> list[Photo]:
    """One crop per photo; raises ValueError for a photo that is not shipped."""
    import json

    import fused_kd

    names, shipped = class_names(), load_shipped_logits()
    if not 1 <= top < len(names):
        raise ValueError(f"expected 1 to {len(names) - 1} classes other than the target, got {top}")
    labels = fused_kd.uskd_soft_labels(shipped.student_logits, shipped.teacher_logits, shipped.target)
    column = shipped.target.unsqueeze(1)
    p = shipped.student_logits.softmax(1)
    shares = [
        logits.scatter(1, column, float("-inf")).softmax(1)
        for logits in (shipped.student_logits, shipped.teacher_logits)
    ]
    about = json.loads(shipped.meta)
    note = NOTE.format(rows=len(column), **{key: about[key] for key in ("student", "teacher")})
    found = []
    for name in photos:
        if name.strip() not in shipped.photo_names:
            raise ValueError(f"expected photos among {', '.join(shipped.photo_names)}, got {name.strip()!r}")
        crops = (shipped.photo == shipped.photo_names.index(name.strip())).nonzero().squeeze(1)
        probabilities = p[crops, shipped.target[crops]]
        row = int(crops[probabilities.median(0).indices])
        target = int(shipped.target[row])
        zipf = labels[row].index_fill(0, torch.tensor(target), float("-inf"))
        others = zipf.topk(top).indices.tolist()
        found.append(
            Photo(
                name.strip(),
                names[target],
                float(labels[row, target]),
                float(p[row, target]),
                tuple(OtherClass(names[j], *(float(x[row, j]) for x in (labels, *shares))) for j in others),
                note,
            )
        )
    return found


def print_table(photos: Sequence[Photo], console: Console) -> None:
    table = Table(title="USKD's labels for real logits", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("photo", no_wrap=True)
    table.add_column("class", no_wrap=True)
    for column in ("label", "student", "weak"):
        table.add_column(column, justify="right", no_wrap=True)
    for photo in photos:
        table.add_row(
            photo.name, f"target: {photo.target}", f"{photo.label:.3f}", f"{photo.probability:.3f}", style="bold"
        )
        for other in photo.others:
            table.add_row("", other.name, *(f"{x:.3f}" for x in (other.label, other.student, other.weak)))
        table.add_section()
    console.print(table)
    console.print(
        photos[0].note,
        style="dim",
        markup=False,
    )


def plot(photos: Sequence[Photo], path: Path) -> None:
    """Write the PNG: the targets' labels in the first panel, then a panel of other classes for each photo."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2 if len(photos) == 1 else 3
    lines = -(-(len(photos) + 1) // columns)
    height = 1.0 + 0.27 * max(len(photo.others) for photo in photos)
    with plt.rc_context({"font.size": 9, "text.color": INK, "axes.labelcolor": INK}):
        figure, grid = plt.subplots(
            lines, columns, figsize=(4.1 * columns, height * lines + 0.9), layout="constrained", squeeze=False
        )
        panels = list(grid.flat)
        _draw_targets(photos, panels[0])
        limits = _limits(photos)
        for photo, axes in zip(photos, panels[1:], strict=False):
            _draw_others(photo, axes, limits)
        for axes in panels[len(photos) + 1 :]:
            axes.set_visible(False)
        handles, texts = panels[1].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside upper right", ncols=len(texts), frameon=False)
        figure.suptitle("USKD's labels for real logits", x=0.01, ha="left", fontsize=12, fontweight="bold")
        note = "\n".join(textwrap.wrap(photos[0].note, 70 * columns))
        figure.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color=MUTED)
        figure.savefig(path, dpi=160, facecolor="white")
        plt.close(figure)


def _draw_targets(photos: Sequence[Photo], axes: Axes) -> None:
    y = range(len(photos))
    axes.barh(y, [photo.label for photo in photos], 0.62, color=LABEL_COLOR, zorder=2)
    axes.scatter([photo.probability for photo in photos], y, 26, color=STUDENT_COLOR, zorder=3)
    largest = max(max(photo.label, 1.0) for photo in photos)
    for number, photo in enumerate(photos):
        at = photo.label + 0.02 * largest
        axes.text(at, number, f"{photo.label:.2f}", va="center", fontsize=8, color=LABEL_TEXT)
    axes.set_title("Label P of the targets", loc="left", fontsize=10, fontweight="bold")
    axes.axvline(1, color=MUTED, lw=0.8, zorder=1)  # the label of a plain cross-entropy
    _style(axes, [photo.target for photo in photos], (0, 1.2 * largest))


def _draw_others(photo: Photo, axes: Axes, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import NullLocator

    y = range(len(photo.others))
    series = (
        ("Zipf label", LABEL_COLOR, "s", 60, [x.label for x in photo.others]),
        ("weak probability", WEAK_COLOR, "D", 26, [x.weak for x in photo.others]),
        ("student's probability", STUDENT_COLOR, "o", 26, [x.student for x in photo.others]),
    )
    axes.set_xscale("log")
    at_right_edge = axes.get_yaxis_transform()
    for number, other in enumerate(photo.others):
        values = [max(figures[number], limits[0]) for *_, figures in series]
        axes.plot([min(values), max(values)], [number, number], color=GRID, lw=3, solid_capstyle="round", zorder=2)
        text = f"{other.label:.3f}"
        options: dict[str, Any] = {"va": "center", "ha": "right", "fontsize": 8, "color": LABEL_TEXT}
        axes.text(1.0, number, text, transform=at_right_edge, **options)
    for name, color, marker, size, figures in series:
        x = [max(figure, limits[0]) for figure in figures]
        axes.scatter(x, y, size, color=color, marker=marker, label=name, clip_on=False, zorder=3)
    axes.set_title(f"{photo.name}: other than {photo.target}", loc="left", fontsize=10, fontweight="bold")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    _style(axes, [x.name for x in photo.others], limits)


def _limits(photos: Sequence[Photo]) -> tuple[float, float]:
    """Limits of a common axis. A probability below the least label by more than a factor of 20 lies on its edge."""
    others = [other for photo in photos for other in photo.others]
    largest = max(max(other.label, other.student, other.weak) for other in others)
    return min(other.label for other in others) / 20, largest * 4


def _style(axes: Axes, names: Sequence[str], limits: tuple[float, float]) -> None:
    axes.set_yticks(range(len(names)), [textwrap.shorten(name, 26, placeholder="…") for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(*limits)
    axes.grid(axis="x", color=GRID, lw=0.8, zorder=0)
    axes.tick_params(length=0, colors=INK, pad=5)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(GRID)
