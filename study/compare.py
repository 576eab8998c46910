"""Does NKD or USKD help on your own data? The study's comparison on other data, with a page of the same kind.

    python -m study.compare --data imagefolder PATH --student resnet-18 --teacher resnet-34 --epochs 30

It searches the baseline's learning rate, trains every method with several seeds at this rate and at the method's own
best rate, and reports differences with intervals. Options not listed here go to study/train.py, such as
--image-size 64, --flip or --amp bf16. The same command continues an interrupted comparison.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    import study

    study.require("study.compare")

import torch
from rich.console import Console

from study.comparison import program
from study.comparison.plan import METHODS, Task, Teacher
from study.comparison.records import Records
from study.datasets import registry
from study.training import options, processes
from study.training.errors import RunError
from study.training.text_networks import TEXT_NETWORKS

COMMAND = "python -m study.compare"
PARTS = ("rates", "main", "longer", "own", "page")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND, formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--data", nargs="+", required=True, metavar=("NAME", "PATH"), help="as for study/train.py")
    parser.add_argument("--student", default="cnn-small", metavar="MODEL", help="(%(default)s)")
    parser.add_argument("--teacher", default="cnn-large", metavar="MODEL", help="(%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="of a student (%(default)s)")
    parser.add_argument("--teacher-epochs", type=int, metavar="N", help="(the student's)")
    parser.add_argument("--teacher-lr", type=float, metavar="RATE", help="(train.py's default for the batch size)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="(%(default)s)")
    parser.add_argument("--lr", type=float, metavar="RATE",
                        help="start of the search for the baseline's rate (train.py's default)")  # fmt: skip
    parser.add_argument("--methods", choices=tuple(METHODS), nargs="+", default=tuple(METHODS), metavar="NAME",
                        help=f"methods to compare with ce, among {', '.join(METHODS)} (all)")  # fmt: skip
    parser.add_argument("--device", choices=processes.DEVICES, default="auto", help="(auto)")
    program.add_options(parser, PARTS, Path("runs/compare"), None, None)
    return parser


def make_task(args: argparse.Namespace, others: Sequence[str]) -> Task:
    """The comparison as a task of the study.

    Raises:
        RunError: train.py would reject the options.
    """
    text = args.student in TEXT_NETWORKS
    # No shift by default, so that the student sees the images of the teacher's cached logits.
    data = ("--data", *args.data, *(() if "--shift" in others else ("--shift", "0")), *others)
    fixed = ("--batch-size", str(args.batch_size), "--out", str(args.out))
    usual, teachers = (options.parse([*data, *fixed, "--model", model]).lr for model in (args.student, args.teacher))
    rate = args.lr or usual
    methods = tuple(name for name in METHODS if name in ("ce", *args.methods) and not (text and name == "zipf-ls"))
    return Task(
        "own", args.data[0], f"`--data {args.data[0]}`", data, args.student,
        Teacher("own", args.teacher, args.teacher_epochs or args.epochs, args.teacher_lr or teachers),
        args.epochs, args.batch_size, (rate / 2, rate, rate * 2), methods, "token" if text else "image", args.device,
    )  # fmt: skip


def compare(args: argparse.Namespace, others: Sequence[str], console: Console) -> None:
    """Make the comparison.

    Raises:
        RunError: With a one-line message for the user.
    """
    program.check(args, ("epochs", "batch_size"))
    registry.check(args.data)
    for name in ("lr", "teacher_lr"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise RunError(f"--{name.replace('_', '-')}: expected a positive number, got {getattr(args, name)}")
    tasks = {"own": make_task(args, others)}
    records = Records(args.records, tasks)
    program.make_runs(args, tasks, records, console)
    program.make_page(args, records, COMMAND, console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return 0, or 2 after one line on stderr."""
    args, others = make_parser().parse_known_args(arguments)
    if torch.cuda.is_available() and args.device != "cpu" and "--jobs" not in (arguments or sys.argv):
        args.jobs = 1  # one run at a time uses the GPU
    return program.main("study.compare", lambda: compare(args, others, Console(stderr=True)))


if __name__ == "__main__":
    program.leave_no_runs()
    sys.exit(main())
