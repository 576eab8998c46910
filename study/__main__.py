"""The paper's comparison on tasks small enough for two cores, and the cost of a training step.

    python -m study                                      # runs without a record, then docs/study.md
    python -m study --part page                          # the page alone, from the records
    python -m study --part rates main --task text-gru    # one task
    python -m study --part cost page                     # measure the cost again, on an idle machine
    python -m study --records runs/mine --page runs/study.md   # everything anew, about six hours on two cores

The same command continues an interrupted study.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import study

    study.require("study")

from rich.console import Console

from benchmarks.measure import machine
from study.comparison import program, runs, stages
from study.comparison.plan import METHODS, TASKS
from study.comparison.records import Records
from study.datasets import glyphs
from study.datasets.arrays import DataError
from study.datasets.fonts import INSTALL, find_families
from study.training.errors import RunError
from study.training.report import Bar

COMMAND = "make study"
PARTS = (*stages.STAGES, "cost", "page")
#: The program that measures a step, and its settings.
COST: tuple[str, ...] = (sys.executable, "-m", "study.comparison.cost")
COST_STUDENT, COST_TEACHER = "cnn-small", "cnn-medium"
COST_CLASSES, COST_BATCH, COST_DRAWS = 1000, 128, 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m study", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    program.add_options(parser, PARTS, Path("runs/study"), Path("study/records"), Path("docs/study.md"))
    parser.add_argument("--task", choices=tuple(TASKS), nargs="+", default=tuple(TASKS), metavar="TASK",
                        help=f"tasks among {', '.join(TASKS)} (all)")  # fmt: skip
    parser.add_argument("--cost-steps", type=int, default=48, metavar="N", help="measured steps (%(default)s)")
    parser.add_argument("--cost-classes", type=int, nargs="+", metavar="N",
                        help=f"numbers of classes ({COST_CLASSES}, and as many as the fonts allow)")  # fmt: skip
    return parser


def most_classes() -> int:
    """The largest number of classes that two font families cover; one of them is held out.

    Raises:
        DataError: There are fewer than two families.
    """
    families = sorted(find_families(glyphs.characters(), 2), key=lambda family: -len(family.covered))
    if len(families) < 2:
        raise DataError(f"--cost-classes: the installed fonts are not enough; {INSTALL}")
    return len(families[0].covered & families[1].covered)


def measure_cost(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure one method after the other, each in a process of its own, with all threads.

    Raises:
        RunError: A measurement failed.
    """
    most = most_classes()
    wanted = args.cost_classes or sorted({COST_CLASSES, most})
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = {"date": date, "machine": machine.machine(), "software": machine.software()}
    cells = [(classes, name) for classes in wanted for name in METHODS]
    rows = []
    with Bar(console).task("cost", len(cells)) as advance:
        for classes, name in cells:
            advance(0, f"{name}, {classes} classes")
            method = METHODS[name]
            options = [
                "--steps", args.cost_steps, "--classes", classes, "--model", COST_STUDENT, "--loss", method.loss,
                *(part for setting in method.settings for part in ("--set", setting)), "--batch-size", COST_BATCH,
                "--cache", args.cache, "--device", "cpu", "--draws", COST_DRAWS,
                *(("--teacher-model", COST_TEACHER) if method.teacher else ()),
            ]  # fmt: skip
            process = subprocess.run(
                [*COST, *map(str, options)],
                capture_output=True, text=True, env=runs.environment(os.cpu_count() or 1), check=False,
            )  # fmt: skip
            if process.returncode:
                lines = [line for line in process.stderr.splitlines() if line.strip()] or ["no output"]
                raise RunError(f"cost of {name}: {lines[-1].removeprefix('study.comparison.cost: ')}")
            rows.append({"method": name, **json.loads(process.stdout.splitlines()[-1])})
            console.print(f"cost of {name} at {classes} classes measured", highlight=False)
            advance(1)
    return {"about": about, "student": COST_STUDENT, "teacher": COST_TEACHER, "most_classes": most, "rows": rows}


def run_study(args: argparse.Namespace, console: Console) -> None:
    """Make the selected parts.

    Raises:
        RunError: With a one-line message for the user.
    """
    program.check(args, ("cost_steps",))
    records = Records(args.records, TASKS)
    program.make_runs(args, {name: TASKS[name] for name in args.task}, records, console)
    # The cost is measured after all runs, and only on request or if it has no record.
    if "cost" in args.part and (records.cost is None or tuple(args.part) != PARTS):
        records.add_cost(measure_cost(args, console))
    program.make_page(args, records, COMMAND, console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return 0, or 2 after one line on stderr."""
    return program.main("study", lambda: run_study(make_parser().parse_args(arguments), Console(stderr=True)))


if __name__ == "__main__":
    program.leave_no_runs()
    sys.exit(main())
