"""The paper's comparison on a task that two cores can do, and what a step costs.

    python -m study                                      # all of it, in runs/study; docs/study.md and .json
    python -m study --only cost                          # measures the cost again, at a quiet moment
    python -m study --out runs/long --page runs/long/study.md --seeds 0 1 2 3 4 --epochs 60 --draws 6

A study that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import study

    study.require("study")

from rich.console import Console

from benchmarks.measure import machine
from study.comparison import page, runs
from study.comparison import results as store
from study.comparison.plan import CONTROL, METHODS, Setting, jobs, run_folder
from study.datasets import glyphs
from study.datasets.arrays import DataError, cache_root
from study.datasets.fonts import INSTALL, find_families
from study.training import checkpoint
from study.training.errors import RunError
from study.training.report import Bar, read_table

#: The program that measures a step, and the draws of the data set that it does so on.
COST: tuple[str, ...] = (sys.executable, "-m", "study.comparison.cost")
COST_DRAWS = 1
STAGES = ("runs", "collect", "cost", "page")


def make_parser() -> argparse.ArgumentParser:
    usual = Setting()
    parser = argparse.ArgumentParser(
        prog="python -m study",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), metavar="DIR", help="runs (%(default)s)")
    parser.add_argument(
        "--page", type=Path, default=Path("docs/study.md"), metavar="FILE",
        help="the page; its results are beside it as JSON, its plots as PNG (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--update", type=Path, metavar="FILE", help="write the outcome into this page, too")
    parser.add_argument("--only", choices=STAGES, nargs="+", default=STAGES, metavar="STAGE",
                        help=f"of {', '.join(STAGES)} (all)")  # fmt: skip
    parser.add_argument("--methods", choices=tuple(METHODS), nargs="+", default=tuple(METHODS), metavar="NAME",
                        help=f"of {', '.join(METHODS)} (all)")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="N", help="of the students (0 1 2)")
    numbers = {
        "epochs": "of every run",
        "draws": "training images of a class in a font family",
        "classes": "of the task",
        "batch-size": "of every run",
    }
    for name, text in numbers.items():
        default = getattr(usual, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--lr", type=float, help="peak learning rate (train.py's own)")
    parser.add_argument("--student", default=usual.student, metavar="MODEL", help="(%(default)s)")
    parser.add_argument("--teacher", default=usual.teacher, metavar="MODEL", help="(%(default)s)")
    parser.add_argument("--cache", type=Path, default=cache_root(), metavar="DIR", help="for arrays (%(default)s)")
    cores = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cores, metavar="N", help="runs at a time (the cores: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each run (%(default)s)")
    parser.add_argument("--cost-steps", type=int, default=48, metavar="N", help="that are measured (%(default)s)")
    parser.add_argument(
        "--cost-classes", type=int, nargs="+", metavar="N", help="(those of the task, and as many as the fonts allow)"
    )
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options.

    Raises:
        RunError: One is out of range.
    """
    args = make_parser().parse_args(arguments)
    for name in ("epochs", "draws", "classes", "batch_size", "jobs", "threads", "cost_steps"):
        if getattr(args, name) < 1:
            raise RunError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise RunError(f"--seeds: expected different ones from 0 on, got {' '.join(map(str, args.seeds))}")
    args.methods = tuple(name for name in METHODS if name in args.methods)
    args.setting = Setting(args.classes, args.draws, args.student, args.teacher, args.epochs, args.batch_size, args.lr)
    return args


def claim(args: argparse.Namespace) -> None:
    """Make the study's folder, which is of one setting.

    Raises:
        RunError: It has runs of another setting, or cannot be written.
    """
    path = args.out / "setting.json"
    here = asdict(args.setting)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except OSError as error:
        raise RunError(f"--out {args.out}: cannot be written ({error.strerror})") from None
    if there is None:
        checkpoint.write(path, lambda file: file.write(json.dumps(here, indent=1).encode()))
        return
    for name, value in here.items():
        if there.get(name) != value:
            raise RunError(
                f"--out {args.out}: has a study with another --{name.replace('_', '-')} ({there.get(name)}, not "
                f"{value}); name another folder"
            )


def collect(args: argparse.Namespace, earlier: dict[str, Any]) -> dict[str, Any]:
    """The results of the runs that are complete."""
    rows, teacher = [], _result(args.out / "teacher")
    for name in args.methods:
        for seed in args.seeds:
            result = _result(run_folder(args.out, name, seed))
            if result is not None:
                rows.append({"method": name, "seed": seed, **result})
    if not rows:
        raise RunError(f"--out {args.out}: no run is complete")
    about = {"date": _now(), "machine": machine.machine(), "software": machine.software()}
    # Of the moment when the last run ended; collecting the same runs again changes nothing.
    same = earlier.get("runs") == rows and "about" in earlier
    return {
        "setting": asdict(args.setting),
        "methods": list(args.methods),
        "seeds": list(args.seeds),
        "parallel": {"runs": args.jobs, "threads": args.threads},
        "about": earlier["about"] if same else about,
        "teacher": teacher,
        "runs": rows,
    }


def _result(folder: Path) -> dict[str, Any] | None:
    path = folder / "result.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    last = read_table(folder / "epochs.csv")[-1]
    return {
        "accuracy": result["accuracy"],
        "training_loss": float(last["loss"]),
        "test_loss": {name: float(last[f"test_loss_{name}"]) for name in result["accuracy"]},
        "peak_memory": result["peak_memory"],
        "parameters": result["parameters"],
    }


def most_classes() -> int:
    """The largest number of classes for which there are two font families, one of them to be held out.

    Raises:
        DataError: There are no two families.
    """
    families = sorted(find_families(glyphs.characters(), 2), key=lambda family: -len(family.covered))
    if len(families) < 2:
        raise DataError(f"--cost-classes: the fonts that are installed do not give any; {INSTALL}")
    return len(families[0].covered & families[1].covered)


def measure_cost(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """One method after the other, each in a process of its own, with all threads.

    Raises:
        RunError: One of them failed.
    """
    setting = args.setting
    most = most_classes()
    wanted = args.cost_classes or sorted({setting.classes, most})
    about = {"date": _now(), "machine": machine.machine(), "software": machine.software()}
    cells = [(classes, name) for classes in wanted for name in args.methods if name != CONTROL]
    rows = []
    with Bar(console).task("cost", len(cells)) as advance:
        for classes, name in cells:
            advance(0, f"{name}, {classes} classes")
            method = METHODS[name]
            options = [
                "--steps", args.cost_steps, "--classes", classes, "--model", setting.student, "--loss", method.loss,
                *method.options, "--batch-size", setting.batch_size, "--cache", args.cache, "--device", "cpu",
                "--draws", setting.draws if classes == setting.classes else COST_DRAWS,
                *(("--teacher-model", setting.teacher) if method.teacher else ()),
            ]  # fmt: skip
            process = subprocess.run(
                [*COST, *map(str, options)],
                capture_output=True, text=True, env=runs.environment(os.cpu_count() or 1), check=False,
            )  # fmt: skip
            if process.returncode:
                lines = [line for line in process.stderr.splitlines() if line.strip()] or ["nothing was said"]
                raise RunError(f"cost of {name}: {lines[-1].removeprefix('study.comparison.cost: ')}")
            rows.append({"method": name, **json.loads(process.stdout.splitlines()[-1])})
            console.print(f"cost of {name} at {classes} classes measured", highlight=False)
            advance(1)
    return {"about": about, "most_classes": most, "rows": rows}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def run_study(args: argparse.Namespace, console: Console) -> None:
    """Make the stages that are asked for, and write the results after each.

    Raises:
        RunError: With one line that says what to mend.
    """
    path = args.page.with_suffix(".json")
    results = store.read(path) if path.exists() else {}
    if "runs" in args.only:
        claim(args)
        todo = jobs(args.setting, args.methods, args.seeds, args.cache, args.out)
        runs.run(todo, args.jobs, args.threads, console)
    if "collect" in args.only:
        results |= collect(args, results)
        store.write(path, results)
    if "cost" in args.only:
        results["cost"] = measure_cost(args, console)
        store.write(path, results)
    if "page" in args.only:
        written = page.make(store.read(path), args.page, args.update)
        console.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program: 0, or 2 after one line on stderr."""
    try:
        run_study(parse(arguments), Console(stderr=True))
    except (RunError, DataError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # Its runs must not go on without it: a later call would start them once more.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
