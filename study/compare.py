"""Whether NKD or USKD pays on your own data: the study's comparison, with the same care, and a page of the same kind.

    python -m study.compare --data imagefolder PATH --student resnet-18 --teacher resnet-34 --epochs 30

The baseline's learning rate is searched, every method is trained with several seeds at it and at its own best rate, and
differences come with their intervals. Options that are not listed go to study/train.py, such as --image-size 64, --flip
or --amp bf16. A comparison that was interrupted goes on where it was.
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
    parser.add_argument("--data", nargs="+", required=True, metavar=("NAME", "PATH"), help="as study/train.py has it")
    parser.add_argument("--student", default="cnn-small", metavar="MODEL", help="(%(default)s)")
    parser.add_argument("--teacher", default="cnn-large", metavar="MODEL", help="(%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="of a student (%(default)s)")
    parser.add_argument("--teacher-epochs", type=int, metavar="N", help="(the student's)")
    parser.add_argument("--teacher-lr", type=float, metavar="RATE", help="(train.py's own for its batch size)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="(%(default)s)")
    parser.add_argument("--lr", type=float, metavar="RATE",
                        help="where the search of the baseline's begins (train.py's own)")  # fmt: skip
    parser.add_argument("--methods", choices=tuple(METHODS), nargs="+", default=tuple(METHODS), metavar="NAME",
                        help=f"beside ce, of {', '.join(METHODS)} (all)")  # fmt: skip
    parser.add_argument("--device", choices=processes.DEVICES, default="auto", help="(auto)")
    program.add_options(parser, PARTS, Path("runs/compare"), None, None)
    return parser


def make_task(args: argparse.Namespace, others: Sequence[str]) -> Task:
    """The comparison as a task of the study.

    Raises:
        RunError: train.py would refuse the options.
    """
    text = args.student in TEXT_NETWORKS
    # The student sees what the teacher's cached logits are of.
    data = ("--data", *args.data, *(() if "--shift" in others else ("--shift", "0")), *others)
    fixed = ("--batch-size", str(args.batch_size), "--out", str(args.out))
    usual, of_teacher = (options.parse([*data, *fixed, "--model", model]).lr for model in (args.student, args.teacher))
    rate = args.lr or usual
    methods = tuple(name for name in METHODS if name in ("ce", *args.methods) and not (text and name == "zipf-ls"))
    return Task(
        "own", args.data[0], f"`--data {args.data[0]}`", data, args.student,
        Teacher("own", args.teacher, args.teacher_epochs or args.epochs, args.teacher_lr or of_teacher),
        args.epochs, args.batch_size, (rate / 2, rate, rate * 2), methods, "token" if text else "image", args.device,
    )  # fmt: skip


def compare(args: argparse.Namespace, others: Sequence[str], console: Console) -> None:
    """Make the comparison.

    Raises:
        RunError: With one line that says what to mend.
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
    """The program: 0, or 2 after one line on stderr."""
    args, others = make_parser().parse_known_args(arguments)
    if torch.cuda.is_available() and args.device != "cpu" and "--jobs" not in (arguments or sys.argv):
        args.jobs = 1  # one run has the whole device
    return program.main("study.compare", lambda: compare(args, others, Console(stderr=True)))


if __name__ == "__main__":
    program.leave_no_runs()
    sys.exit(main())
