"""Shared by ``python -m study`` and ``python -m study.compare``: common options, runs and the page."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from rich.console import Console

from study.comparison import page, runs, stages
from study.comparison.plan import RATE_SEEDS, Spec, Task, unique
from study.comparison.records import Records
from study.datasets.arrays import DataError, cache_root
from study.training.errors import RunError

#: Names in the folder of --out, for a comparison other than the study.
RECORDS, PAGE = "records", "comparison.md"


def add_options(
    parser: argparse.ArgumentParser, parts: Sequence[str], out: Path, records: Path | None, page: Path | None
) -> None:
    """Add the options for paths, parts and processes; paths that are None are in the folder of --out."""
    parser.add_argument("--part", choices=tuple(parts), nargs="+", default=tuple(parts), metavar="PART",
                        help=f"parts among {', '.join(parts)} (all)")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N",
                        help="seeds of the students (the task's, from 0 on)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="folder for the runs (%(default)s)")
    parser.add_argument(
        "--records", type=Path, default=records, metavar="DIR",
        help=f"a small file per finished run, which is then not repeated ({records or f'{RECORDS} in --out'})",
    )  # fmt: skip
    parser.add_argument("--page", type=Path, default=page, metavar="FILE",
                        help=f"the page, with its plots next to it ({page or f'{PAGE} in --out'})")  # fmt: skip
    parser.add_argument("--update", type=Path, nargs="+", default=(), metavar="FILE",
                        help="also write the outcome into these pages")  # fmt: skip
    parser.add_argument("--cache", type=Path, default=cache_root(), metavar="DIR",
                        help="folder for data (%(default)s)")  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at a time (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads per run (%(default)s)")


def check(args: argparse.Namespace, positive: Sequence[str]) -> None:
    """Check the options, and fill in the paths in the folder of ``--out``.

    Raises:
        RunError: An option is out of range.
    """
    args.records = args.records or args.out / RECORDS
    args.page = args.page or args.out / PAGE
    for name in ("jobs", "threads", *positive):
        if getattr(args, name) < 1:
            raise RunError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    seeds = args.seeds or ()
    if any(seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds) or set(seeds) & set(RATE_SEEDS):
        reserved = " and ".join(map(str, RATE_SEEDS))
        raise RunError(
            f"--seeds: expected distinct seeds from 0 on, without {reserved}, which choose the learning rates; got "
            f"{' '.join(map(str, seeds))}"
        )


def make_runs(args: argparse.Namespace, tasks: Mapping[str, Task], records: Records, console: Console) -> None:
    """Train the runs of the selected parts that have no record.

    Raises:
        RunError: The folder cannot be written, or a run failed.
    """
    parts = [stage for stage in stages.STAGES if stage in args.part]
    if not parts:
        return
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {args.out}: cannot be written ({error.strerror})") from None

    def wanted() -> list[Spec]:
        # Tasks in turn, so that an interrupted study has equally many seeds of each.
        by_part = [
            [stages.wanted(task, part, records, args.seeds or task.seeds) for task in tasks.values()] for part in parts
        ]
        return unique([spec for own in by_part for turn in zip_longest(*own) for spec in turn if spec is not None])

    study = runs.Study(tasks, records, args.out, args.cache, wanted)
    if not study.missing():
        console.print(
            f"all runs of {', '.join(parts)} have a record in {records.folder}", highlight=False, soft_wrap=True
        )
    runs.run(study, args.jobs, args.threads, console)


def make_page(args: argparse.Namespace, records: Records, command: str, console: Console) -> None:
    if "page" in args.part:
        written = page.make(records, args.page, command, args.update)
        console.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


def main(name: str, program: Callable[[], None]) -> int:
    """Run a program; return 0, or 2 after one line on stderr."""
    try:
        program()
    except (RunError, DataError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def leave_no_runs() -> None:
    """Make SIGTERM end the program's runs first; else a later call would start them a second time."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
