"""Makes docs/study.md and its plots from the records alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.show.report import lines, replace_block
from study.comparison import cost_page, findings, paper, plots
from study.comparison.plan import METHODS, TASKS, TEACHER_FREE, TEACHER_SEED, WITH_TEACHER
from study.comparison.records import Record, Records
from study.comparison.results import (
    View,
    accuracies,
    count,
    listed,
    mean_and_deviation,
    of_seeds,
    perplexities,
    seeds_of,
)
from study.training import checkpoint
from study.training.errors import RunError

#: Markers of the outcome in another page.
BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"


def views_of(records: Records) -> list[View]:
    """Views of the tasks with runs at the shared rate.

    Raises:
        RunError: There are none.
    """
    views = [View(task, records) for name, task in records.tasks.items() if records.runs[name]]
    views = [view for view in views if view.main]
    if not views:
        raise RunError(f"{records.folder}: has no runs of the methods; make them first")
    return views


def make(records: Records, path: Path, command: str, update: Sequence[Path] = ()) -> list[Path]:
    """Write the page and its plots, and the outcome into the pages ``update``; return the written paths."""
    views = views_of(records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--page: {path.parent} cannot be made ({error.strerror})") from None
    pictures = plots.draw(views, records.cost, path)
    text = markdown(views, records.cost, path.stem, command)
    checkpoint.write(path, lambda file: file.write(text.encode()))
    for other in update:
        _update(other, block(views, path, other))
    return [path, *pictures, *update]


def _update(other: Path, text: str) -> None:
    try:
        replace_block(other, BEGIN, END, text)
    except (OSError, ValueError) as error:
        raise RunError(f"--update {other}: {error}") from None


def block(views: Sequence[View], page: Path, other: Path) -> str:
    """The study's block in another page: the outcome and a link."""
    link = Path(os.path.relpath(page, other.parent)).as_posix()
    return (
        f"Small students on {count(len(views), 'task')}, {seeds_of(views)} each:\n\n"
        f"{findings.outcome(views)}\n\n"
        f"[The study]({link}) has all pairs, the ablations and how it was done."
    )


def markdown(views: Sequence[View], cost: dict[str, Any] | None, stem: str, command: str) -> str:
    """The page; names of its plots begin with ``stem``, and ``command`` writes it."""
    of_study = any(view.task.name in TASKS for view in views)
    picture = f"![The loss's share of a step]({stem}-cost.png)"
    parts = [
        "# The paper's comparison at small scale" if of_study else "# Losses compared",
        f"<!-- `{command}` writes this from the records of its runs. -->",
        *_beginning(views, of_study),
        findings.outcome(views),
        *(["\n".join(cost_page.sentences(cost))] if cost else []),
        f"![Differences that the paper ranks, with their intervals]({stem}-differences.png)",
        "## Accuracy",
        *_tables(views),
        "## Where the paper's order shows, and where not",
        *findings.orders(views),
        *_published(),
        "## Learning rates and convergence",
        *findings.convergence(views),
        f"![The baseline's accuracy by learning rate and by epoch]({stem}-convergence.png)",
        *(["## The paper's ablations", *findings.ablations(views)] if of_study else []),
        "## How it was done",
        *_how(views, command),
        *(["## What a step costs", *cost_page.section(cost, picture)] if of_study else []),
        "## Measured on",
        *_measured_on(views, cost),
    ]
    return "\n\n".join(parts) + "\n"


def _beginning(views: Sequence[View], of_study: bool) -> list[str]:
    losses = len({METHODS[name].loss for view in views for name in view.main})
    tasks = [f"- **{view.task.title}**: {view.task.what}" for view in views]
    here = "Here small students are" if of_study else "Here a student is"
    parts = [
        f"The paper trains a ResNet-18 on ImageNet's 1000 classes. {here} trained with {losses} losses, each with "
        f"{seeds_of(views)}, on{' tasks small enough for two CPU cores' if of_study else ''}:",
        "\n".join(tasks),
        "Accuracies are those of the last epoch in %, as mean ± standard deviation over the seeds. Differences are in "
        "points, with their 95 % intervals.",
    ]
    missing = [f"{view.task.title}: {', '.join(view.missing())}" for view in views if view.missing()]
    if missing:
        parts.append(f"**Not complete:** these runs are missing: {'; '.join(missing)}.")
    return parts


def _tables(views: Sequence[View]) -> list[str]:
    parts = []
    for view in views:
        task, teacher = view.task, view.teacher
        parts.append(f"**{task.title}**")
        if teacher:
            own = ", ".join(f"{100 * value:.2f} on {name}" for name, value in teacher["accuracy"].items())
            student = next(iter(view.main["ce"].values())) if "ce" in view.main else None
            size = f" to the student's {student['parameters']:,}" if student else ""
            model, number = task.teacher.model, teacher["parameters"]
            parts.append(f"The teacher, {model}, has {number:,} parameters{size}. Its accuracy in %: {own}.")
        parts.append(_accuracy_table(view))
    return parts


def _accuracy_table(view: View) -> str:
    first, text = view.splits[0], view.task.unit == "token"
    own = bool(view.own)
    header = ["method", *(f"{name}, %" for name in view.splits)]
    header += [*(["perplexity"] if text else []), "over the baseline", *(["own rate", "with it, %"] if own else [])]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    by_split = {name: accuracies(view.main, name) for name in view.splits}
    for method in [name for name in (*WITH_TEACHER, *TEACHER_FREE[2:]) if name in view.main]:
        over = paper.compare(method, "ce", by_split[first]) if method != "ce" else None
        row = [METHODS[method].title, *(mean_and_deviation(by_split[name][method].values()) for name in view.splits)]
        row += [mean_and_deviation(perplexities(view.main[method], first))] if text else []
        row.append(over.text if over else "")
        if own:
            rate = view.own_rates.get(method)
            row.append(f"{rate:g}" if rate else "–")
            row.append(mean_and_deviation(of_seeds(view.own[method], first).values()) if method in view.own else "–")
        rows.append(row)
    return lines(rows)


def _published() -> list[str]:
    base, base_source = paper.IMAGENET["ce"]
    rows = [["published, ImageNet", "top-1, %", "source"], ["---", "---:", "---"]]
    for method, (value, source) in paper.IMAGENET.items():
        gain = f" ({value - base:+.2f})" if method != "ce" and source == base_source else ""
        rows.append([METHODS[method].title, f"{value:.2f}{gain}", source])
    return [
        "The published figures are for a ResNet-18, with a ResNet-34 as the teacher where there is one. In brackets is "
        "the gain over the baseline of the same source. Figures for label smoothing, Tf-KD and Zipf's LS are not "
        "shown: no public source at hand has them.",
        lines(rows),
    ]


def _how(views: Sequence[View], command: str) -> list[str]:
    used = [name for name in METHODS if any(name in view.main for view in views)]
    hyper = [
        ["method", "hyper-parameters"],
        ["---", "---"],
        *([METHODS[name].title, METHODS[name].note] for name in used),
    ]
    rows = [
        ["task", "options of `study/train.py`", "student", "teacher", "epochs", "batch", "seconds a run"],
        ["---", "---", "---", "---", "---:", "---:", "---:"],
    ]
    for view in views:
        task, teacher = view.task, view.task.teacher
        seconds = [record["seconds"] for by_seed in view.main.values() for record in by_seed.values()]
        rows.append(
            [
                task.title, f"`{' '.join(task.data)}`", task.student,
                f"{teacher.model}, {count(teacher.epochs, 'epoch')} at a rate of {teacher.lr:g}", str(task.epochs),
                f"{task.batch_size} {'windows' if task.unit == 'token' else 'images'}",
                f"{min(seconds):.0f} to {max(seconds):.0f}",
            ]
        )  # fmt: skip
    parts = [
        f"`{command}` makes all of it. Runs that have a record are not repeated, so it goes on where it was "
        "interrupted.",
        lines(rows),
        "All methods of a task share its schedule: a linear warm-up over a tenth of the steps, then a cosine to zero. "
        "CNNs use SGD with Nesterov momentum and a weight decay of 0.0005; transformers and language models use AdamW "
        "with 0.05, unless the options say otherwise. A seed sets the weights and the order of the batches. A "
        f"teacher is trained once, with cross-entropy on the same data and with seed {TEACHER_SEED}; its logits are "
        "computed once. "
        "The hyper-parameters of the losses are published values or defaults; none was tuned:",
        lines(hyper),
    ]
    prints = {
        view.task.title: {record["data"] for own in view.main.values() for record in own.values()} for view in views
    }
    if mixed := [title for title, found in prints.items() if len(found) > 1]:
        parts.append(
            f"**Caveat:** runs of {listed(mixed)} were made with different data, from other fonts or another Python."
        )
    return parts


def _measured_on(views: Sequence[View], cost: dict[str, Any] | None) -> list[str]:
    made = [record["made_with"] for view in views for own in view.main.values() for record in own.values()]
    parts = [f"Accuracy: {'; '.join(dict.fromkeys(_made_with(record) for record in made))}."]
    if cost:
        about, load = cost["about"], cost["about"]["machine"]["load_average_before"]
        parts.append(f"Cost: {_machine(about)}.")
        if load is not None and load > 0.5:
            parts.append(f"Caveat: the machine was busy, with a load average of {load} when the cost was measured.")
    return parts


def _made_with(made: Record) -> str:
    return (
        f"{made['cpu']} ({made['cpu_capability']}), torch {made['torch']}, Python {made['python']}, fused_kd "
        f"{made['fused_kd']} at {made['commit']}"
    )


def _machine(about: dict[str, Any]) -> str:
    machine, software = about["machine"], about["software"]
    commit = (software["git_commit"] or "no commit")[:10] + (" with local changes" if software["git_dirty"] else "")
    return (
        f"{machine['cpu']} ({machine['cpu_capability']}), {count(machine['cores'], 'core')}, "
        f"{machine['memory_gib']} GiB; torch {software['torch']}, Python {software['python']}; fused_kd "
        f"{software['fused_kd']} at {commit}, {about['date'][:10]}"
    )
