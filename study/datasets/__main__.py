"""`python -m study.datasets --sheet FILE` describes a data set and draws some of its training images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    import study

    study.require("study.datasets")

from rich.console import Console

from study.datasets.arrays import DataError
from study.datasets.registry import about, add_arguments, load, sheet
from study.training.report import Bar


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m study.datasets", description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write a picture of some training images")
    args = parser.parse_args(arguments)
    try:
        dataset = load(args, Bar(Console(stderr=True)))
    except DataError as error:
        print(f"study.datasets: {error}", file=sys.stderr)
        return 2
    tests = ", ".join(f"{name} {len(split):,}" for name, split in dataset.tests.items())
    print(f"{dataset.name}: {dataset.classes} classes, {len(dataset.train):,} images; tests: {tests}")
    for line in about(dataset):
        print(line)
    if args.sheet:
        sheet(dataset, args.sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
