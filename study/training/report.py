"""Reports of a run: progress, CSV and TensorBoard logs, and curves."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from study.training.errors import RunError

#: Curves with fewer rows also have markers.
FEW = 10


class Bar:
    """Progress bars on a terminal; hidden elsewhere and with ``quiet``."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console = console
        self.shown = console.is_terminal and not quiet

    @contextmanager
    def task(self, title: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
        """Show a bar from ``done`` to ``total``; yields a function that takes the steps made and an optional text."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self.console, disable=not self.shown, transient=True) as progress:
            task = progress.add_task(title, total=total, completed=done, text="")

            def advance(steps: int, text: str | None = None) -> None:
                if text is not None:
                    progress.update(task, text=text)
                progress.advance(task, steps)

            yield advance


class Table:
    """A CSV file with named columns, to which a run adds rows."""

    def __init__(self, path: Path, columns: Sequence[str], key: str, resume_at: int) -> None:
        """Keep rows with a ``key`` up to ``resume_at``: a resumed run computes rows after its checkpoint again."""
        self.path, self.columns = path, list(columns)
        kept = [row for row in read_table(path) if int(row[key]) <= resume_at]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)

    def add(self, row: dict[str, Any]) -> None:
        """Write one row; missing columns stay empty."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none if it does not exist. A truncated last line is left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and None not in row]


class TensorBoard:
    """Scalars for TensorBoard, which must be installed."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RunError("--tensorboard: TensorBoard is not installed; pip install tensorboard") from None
        self.writer: Any = SummaryWriter(str(folder), purge_step=purge_step)

    def add(self, group: str, values: dict[str, float], step: int) -> None:
        """Write one value per name."""
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


def plot_curves(folder: Path, title: str) -> Path | None:
    """Draw ``curves.png`` from a run's tables: loss by step, accuracy by epoch. None without matplotlib or rows."""
    steps, epochs = read_table(folder / "steps.csv"), read_table(folder / "epochs.csv")
    if not steps or not epochs:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    x = [int(row["step"]) for row in steps]
    parts = [name for name in steps[0] if name.startswith("loss_")]
    for name in ("loss", *(parts if len(parts) > 1 else ())):
        width = 1.8 if name == "loss" else 1.0
        y = [float(row[name]) for row in steps]
        # A line through one point is invisible.
        losses.plot(
            x, y, linewidth=width, marker="o" if len(x) < FEW else "", markersize=3, label=name.removeprefix("loss_")
        )
    losses.set(xlabel="step", title="training loss and its parts" if len(parts) > 1 else "training loss")
    for name in epochs[0]:
        if name.startswith("accuracy_"):
            y = [100 * float(row[name]) for row in epochs]
            label = name.removeprefix("accuracy_")
            accuracies.plot([int(row["epoch"]) for row in epochs], y, marker="o", markersize=3, label=label)
    accuracies.set(xlabel="epoch", ylabel="%", title="accuracy")
    accuracies.set_xlim(0.5, max(int(row["epoch"]) for row in epochs) + 0.5)
    losses.set_xlim(0, x[-1] * 1.05)
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    path = folder / "curves.png"
    figure.savefig(path, dpi=120)
    return path
