"""Command line of ``python -m benchmarks --source``: measures a source and writes a JSON file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks.forms.providers import only_reference
from benchmarks.measure import agreement, machine
from benchmarks.measure.cases import Shapes, parse_dtypes, parse_shapes
from benchmarks.measure.run import busy
from benchmarks.show import report
from benchmarks.sources import heads, shards, show, topk
from benchmarks.sources.case import Case
from benchmarks.sources.forms import LOSSES, OURS

SCHEMA = "source-1"

Progress = Callable[[str, float], None]


class Sizes(NamedTuple):
    shapes: Shapes
    width: int = 0  # of a head's hidden states, or the number of kept classes
    losses: tuple[str, ...] = ("nkd", "kd")


SIZES = {
    "head": Sizes(((2048, 128256), (256, 1_000_000)), 512, ("nkd", "kd", "js")),
    "topk": Sizes(((32, 128256),), 64, ("kd", "nkd")),
    "shard": Sizes(((128, 21841),)),
}
QUICK = {
    "head": Sizes(((64, 4096),), 32, ("nkd",)),
    "topk": Sizes(((8, 2048),), 16, ("kd",)),
    "shard": Sizes(((16, 1000),)),
}
MILLION_WIDTH, MILLION_LOSSES = 128, ["nkd"]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks --source",
        description="Measures time, memory and errors of alternatives to logits: a head that is not applied yet, a "
        "teacher with a few kept classes, sharded classes.",
    )
    made.add_argument("--source", choices=list(SIZES), required=True)
    made.add_argument("--loss", choices=list(LOSSES), action="append", help="may be repeated; default: the source's")
    made.add_argument("--quick", action="store_true", help="small sizes, a minute or two")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    made.add_argument("--dtype", type=parse_dtypes, metavar="DTYPE,...", help="default: float32,bfloat16")
    made.add_argument("--cases", type=parse_shapes, metavar="ROWSxCLASSES,...", help="default: the source's")
    made.add_argument(
        "--width", type=int, help="head: width of hidden states, the teacher's is half of it; topk: kept classes"
    )
    made.add_argument("--rounds", type=int, help="rounds of a head's forms in turn, default 3, with --quick 2")
    made.add_argument("--seconds", type=float, help="timing per form and round of a head, else per case")
    made.add_argument("--threads", type=int, help="CPU threads, default: PyTorch's choice")
    made.add_argument("--seed", type=int, default=0, help="seed of the inputs, default %(default)s")
    made.add_argument(
        "--output", type=Path, default=Path(__file__).parents[1] / "results", metavar="DIR",
        help="default: benchmarks/results",
    )  # fmt: skip
    return made


def run(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Measure all cases of a source; return the content of the JSON file."""
    sizes = (QUICK if args.quick else SIZES)[args.source]
    shapes, losses = args.cases or sizes.shapes, args.loss or [*sizes.losses]
    dtypes = args.dtype or ("float32", "bfloat16")
    plan = [(rows, classes, dtype) for dtype in dtypes for rows, classes in shapes]
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "source": args.source,
        "date": machine.now(),
        "options": {"quick": args.quick, "seed": args.seed, "rounds": args.rounds, "seconds": args.seconds},
        "machine": machine.machine(),
        "software": machine.software(),
        "cases": [],
    }
    for at, (rows, classes, dtype) in enumerate(plan):

        def step(text: str, share: float, at: int = at, name: str = f"{rows}×{classes} {dtype}") -> None:
            progress(f"{args.source} {name}: {text}", (at + share) / len(plan))

        result["cases"].append(_case(args, sizes, (rows, classes, dtype), losses, step))
    result["machine"]["load_average_after"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    # At small sizes fixed costs dominate time and memory.
    bars = {} if args.quick else {"head": heads.missed, "topk": topk.missed}
    result["missed"] = bars[args.source](result) if args.source in bars else []
    result["warnings"] = busy(result["machine"])
    progress("done", 1.0)
    return result


def _case(
    args: argparse.Namespace, sizes: Sizes, what: tuple[int, int, str], losses: list[str], step: Progress
) -> dict[str, Any]:
    rows, classes, dtype = what
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    seconds = args.seconds or (0.2 if args.quick else 5.0)
    width = args.width or sizes.width
    if args.source == "head":
        if classes >= heads.MILLION:
            width, losses = args.width or MILLION_WIDTH, args.loss or MILLION_LOSSES
        case = Case(rows, classes, width, max(1, width // 2), dtype, device, args.seed)
        effort = heads.Effort(args.rounds or (2 if args.quick else 3), args.seconds or (0.1 if args.quick else 1.0))
        return heads.measure(case, losses, effort, step)
    if args.source == "topk":
        kept = topk.Case(rows, classes, width, dtype, device, args.seed)
        return topk.measure(kept, losses, seconds, 5, step)
    return shards.measure(shards.Case(rows, classes, 2, dtype, device, args.seed), seconds, step)


def failures(result: dict[str, Any]) -> list[str]:
    """Reasons why the run failed: a form that failed, or wrong values of fused_kd."""
    found = []
    for case in result["cases"]:
        for entry in case.get("forms", [case]):
            name = " ".join(str(entry[key]) for key in ("name", "loss", "rest") if entry.get(key))
            own = "rest" in entry or "processes" in entry or entry.get("name") == OURS
            errors = entry.get("relative_errors")
            if entry["status"] == "failed":
                found.append(f"{name} at {case['name']}: {entry['reason']}")
            elif own and errors and not _right(errors, case["dtype"]):
                found.append(f"{name} at {case['name']}: wrong by {errors}")
    return found


def _right(errors: dict[str, Any], dtype: str) -> bool:
    if "within" in errors:
        return bool(errors["within"])
    return all(errors[name] <= agreement.TOLERANCE[dtype] for name in ("loss", "gradient"))  # NaN is not


def main(argv: Sequence[str], bar: Callable[[Console], Any]) -> int:
    made = parser()
    args = made.parse_args(argv)
    for name in ("width", "rounds", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            made.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: this PyTorch finds no GPU")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for loss in args.loss or SIZES[args.source].losses:
        if reason := only_reference(loss, device):
            made.error(f"fused_kd's {loss} would run in eager PyTorch here: {reason}")
    if args.output.exists() and not args.output.is_dir():
        made.error(f"--output: expected a folder, got the file {args.output}")
    if args.threads:
        torch.set_num_threads(args.threads)
    with bar(Console(stderr=True)) as progress:
        result = run(args, progress)
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=100)
    show.print_result(result, console)
    console.print(f"\n{report.save(result, result['source'], args.output)}", soft_wrap=True)
    problems = failures(result)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0
