"""docs/study.md and its plots, made of the results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.show.report import lines, replace_block, significant, size
from study.comparison import findings, paper, plots
from study.comparison.paper import IMAGENET
from study.comparison.plan import CONTROL, METHODS, TEACHER_FREE, TEACHER_SEED, WITH_TEACHER
from study.comparison.results import accuracies, cost_of, count, form_of, mean_and_deviation, signed, splits
from study.training import checkpoint
from study.training.errors import RunError

#: Where another page has the outcome.
BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"


def make(results: dict[str, Any], path: Path, update: Path | None = None) -> list[Path]:
    """Write the page and its plots, and the outcome into ``update``; returns what was written."""
    if not results.get("runs"):
        raise RunError(f"{path.with_suffix('.json')}: has no runs; make them first")
    pictures = plots.draw(results, path)
    text = markdown(results, path.stem)
    checkpoint.write(path, lambda file: file.write(text.encode()))
    if update:
        try:
            replace_block(update, BEGIN, END, findings.outcome(results))
        except (OSError, ValueError) as error:
            raise RunError(f"--update {update}: {error}") from None
    return [path, *pictures.values(), *([update] if update else [])]


def markdown(results: dict[str, Any], stem: str) -> str:
    """The page; its pictures' names begin with ``stem``."""
    parts = [
        "# The paper's comparison in small",
        f"<!-- `make study` writes this from {stem}.json; `python -m study --only page` writes it again. -->",
        *_beginning(results),
        findings.outcome(results),
        *_tables(results),
        f"![Accuracy of every run]({stem}-accuracy.png)",
        "## Where the paper's order shows, and where not",
        *findings.orders(results),
        "## The task",
        *_task(results),
        "## What a step costs",
        *findings.cost(results, f"![The loss's share of a step]({stem}-cost.png)"),
        "## Measured on",
        *_measured_on(results),
    ]
    return "\n\n".join(parts) + "\n"


def _beginning(results: dict[str, Any]) -> list[str]:
    setting, seeds = results["setting"], results["seeds"]
    losses = len({METHODS[name].loss for name in results["methods"]})
    first = splits(results)[0]
    parts = [
        f"The same small network, {setting['student']}, is trained with {losses} losses on {setting['classes']} "
        f"Chinese characters, each with {count(len(seeds), 'seed')}; the paper trains a ResNet-18 on ImageNet's 1000 "
        "classes. Accuracy is that of the last epoch in %, mean ± standard deviation over the seeds, on two sets: "
        f"{first} has further draws of the font families of the training images, the other a font family that no "
        "training image has. Seconds an epoch and memory (the most that a step allocates besides weights and "
        "momentum) are measured apart from these runs, as [a section below](#what-a-step-costs) says.",
    ]
    missing = _missing(results)
    if missing:
        parts.append(f"**Not complete:** these runs are missing: {', '.join(missing)}.")
    return parts


def _tables(results: dict[str, Any]) -> list[str]:
    setting, teacher, parts = results["setting"], results["teacher"], []
    first = splits(results)[0]
    for title, methods in (("With a teacher", WITH_TEACHER), ("Without a teacher", TEACHER_FREE)):
        chosen = [name for name in methods if name in accuracies(results, first)]
        if not chosen:
            continue
        parts.append(f"**{title}**")
        if title == "With a teacher" and teacher:
            own = ", ".join(f"{100 * value:.2f} on {name}" for name, value in teacher["accuracy"].items())
            parts.append(f"The teacher, {setting['teacher']} ({teacher['parameters']:,} parameters), has {own}.")
        parts.append(_accuracy_table(results, chosen))
    sources = "; ".join(
        f"{', '.join(METHODS[name].title for name in IMAGENET if IMAGENET[name][1] == source)}: {source}"
        for source in dict.fromkeys(source for _, source in IMAGENET.values())
    )
    parts.append(
        "ImageNet: published top-1 accuracy of a ResNet-18, with a ResNet-34 as the teacher where there is one; in "
        f"brackets the gain over the baseline, where one source has both. {sources}. The paper's figures for label "
        "smoothing, Tf-KD and Zipf's LS are not shown: no public source at hand has them."
    )
    peaks = [run["peak_memory"] / 2**20 for run in results["runs"]]
    text = f"The processes of the runs peaked at {min(peaks):.0f} to {max(peaks):.0f} MiB"
    if max(peaks) < 1.02 * min(peaks):
        text += ", whichever the method: scanning the installed fonts takes more memory than the training"
    parts.append(f"{text}.")
    return parts


def _accuracy_table(results: dict[str, Any], methods: Sequence[str]) -> str:
    names = splits(results)
    rows = [
        [
            "method",
            *(f"{name}, %" for name in names),
            f"over the baseline on {names[0]}",
            "s an epoch",
            "memory",
            "ImageNet",
        ],
        ["---", *["---:"] * (len(names) + 4)],
    ]
    for method in methods:
        by_split = [accuracies(results, name) for name in names]
        over = paper.compare(method, "ce", by_split[0]) if method != "ce" else None
        row = cost_of(results, method, results["setting"]["classes"])
        rows.append(
            [
                METHODS[method].title,
                *(mean_and_deviation(list(found[method].values())) for found in by_split),
                signed(over.difference) if over else "",
                significant(form_of(row)["step"] * (row["images"] // row["batch_size"])) if row else "–",
                size(int(form_of(row)["memory"])) if row else "–",
                _imagenet(method),
            ]
        )
    return lines(rows)


def _imagenet(method: str) -> str:
    if method not in IMAGENET:
        return "" if method == CONTROL else "not shown"
    value, source = IMAGENET[method]
    base, base_source = IMAGENET["ce"]
    return f"{value:.2f}" + (f" ({signed(value - base)})" if method != "ce" and source == base_source else "")


def _task(results: dict[str, Any]) -> list[str]:
    setting, run = results["setting"], results["runs"][0]
    hyper = lines(
        [["method", "hyper-parameters"], ["---", "---"]]
        + [[METHODS[name].title, METHODS[name].note] for name in results["methods"]]
    )
    given = {name.replace("_", "-"): value for name, value in setting.items() if value is not None}
    options = " ".join(f"--{name} {value}" for name, value in given.items())
    seeds = " ".join(map(str, results["seeds"]))
    images = count(setting["draws"], "training image")
    return [
        f"`python -m study {options} --seeds {seeds}`: {setting['student']} has "
        f"{run['parameters']:,} parameters and is trained for {setting['epochs']} epochs on the 32 × 32 images that "
        f"`study/datasets/glyphs.py` draws, {images} of a character in each font family; SGD with Nesterov momentum, "
        f"batches of {setting['batch_size']}, a linear warm-up and a cosine to zero, random shifts of up to two "
        "pixels. All methods share that; the seed sets weights, order and shifts. The teacher is trained once, with "
        f"cross-entropy, for as many epochs and with seed {TEACHER_SEED}; it sees the images as they are "
        "shifted for the student.",
        "The setting was chosen by the accuracy of the baseline, with a seed that is not among these, before any "
        "other method was run. At the usual size of `make train` the baseline leaves no room for improvement, so the "
        "number of training images was reduced until it ended between 60 and 85 %. The hyper-parameters are published "
        "values or defaults, and none was tuned:",
        hyper,
        "For a longer study give more `--seeds`, `--epochs` or `--draws`, or larger networks (`resnet-18`, "
        "`resnet-34`), and folders of its own in `--out` and `--page`.",
    ]


def _measured_on(results: dict[str, Any]) -> list[str]:
    parallel = results["parallel"]
    parts = [
        f"Accuracy: {_machine(results['about'])}; {count(parallel['runs'], 'run')} at a time, "
        f"{count(parallel['threads'], 'thread')} each."
    ]
    if "cost" in results:
        about = results["cost"]["about"]
        parts.append(f"Cost: {_machine(about)}.")
        load = about["machine"]["load_average_before"]
        if load is not None and load > 0.5:
            parts.append(f"Caveat: the machine was busy, with a load average of {load} when the cost was measured.")
    return parts


def _machine(about: dict[str, Any]) -> str:
    machine, software = about["machine"], about["software"]
    commit = (software["git_commit"] or "no commit")[:10] + (" with local changes" if software["git_dirty"] else "")
    return (
        f"{machine['cpu']} ({machine['cpu_capability']}), {count(machine['cores'], 'core')}, "
        f"{machine['memory_gib']} GiB; torch {software['torch']}, Python {software['python']}; fused_kd "
        f"{software['fused_kd']} at {commit}, {about['date'][:10]}"
    )


def _missing(results: dict[str, Any]) -> list[str]:
    there = {(run["method"], run["seed"]) for run in results["runs"]}
    wanted = [(method, seed) for method in results["methods"] for seed in results["seeds"]]
    return [f"{METHODS[method].title} with seed {seed}" for method, seed in wanted if (method, seed) not in there]
