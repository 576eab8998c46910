"""Checks the compiled kernels without a GPU: `python -m tools.compile_matrix`.

Compiles every Triton kernel that dispatch can choose, and with nvcc every CUDA source, ahead of time for several GPUs.
Reads registers, shared memory, spills and the width of loads from the machine code, and checks them against the rules
of :mod:`tools.compile_matrix.rules`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.show.report import replace_block
from tools.compile_matrix import cases
from tools.compile_matrix.compiling import compile_all, compile_cuda, nvcc, part_of, tasks_of
from tools.compile_matrix.rules import Row, parsed_gpu, problems
from tools.compile_matrix.tables import markdown, markdown_summary, print_summary, print_table

ROOT = Path(__file__).parents[2]
#: Markers in a page: a row for each kernel of the selection, and a line for each function of the full matrix.
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
FULL_BEGIN, FULL_END = "<!-- kernels-full:begin -->", "<!-- kernels-full:end -->"


def read_rows(paths: Sequence[Path], parser: argparse.ArgumentParser) -> tuple[list[Row], int]:
    """Rows of earlier runs, and their number of problems."""
    rows: list[Row] = []
    broken = 0
    for path in paths:
        try:
            found: list[Row] = json.loads(path.read_text(encoding="utf-8"))
            for row in found:
                for name in ("loads", "stores"):
                    row[name] = {int(width): count for width, count in row[name].items()}
            broken += sum(len(problems(row)) for row in found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            parser.error(f"--read {path}: expected what --json wrote, got {type(error).__name__}: {error}")
        rows += found
    return rows, broken


def compile_rows(args: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[list[Row], int]:
    """Compile the kernels that the arguments select; return rows and the number of problems."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: Triton's interpreter compiles nothing")
    try:
        gpus = [parsed_gpu(text) for text in args.arch.split(",")]
    except ValueError:
        parser.error(f"--arch: expected numbers such as 90 or names such as gfx942, got {args.arch!r}")
    losses = list(cases.CASES) if args.loss == "all" else [] if args.loss == "none" else [args.loss]
    tasks = tasks_of(losses, args.full, gpus)
    errors = Console(stderr=True)
    if not args.no_cuda:
        if nvcc() is None:
            errors.print("nvcc not found: the CUDA sources are left out", highlight=False)
        else:
            sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
            wanted = args.sources.split(",") if args.sources else [source.name for source in sources]
            for name in wanted:
                if name not in [source.name for source in sources]:
                    parser.error(f"--sources: expected names among those in csrc/cuda, got {name!r}")
            cuda = [source for source in sources if source.name in wanted]
            tasks += [(compile_cuda, (source, gpu)) for source in cuda for gpu in gpus if isinstance(gpu, int)]
    try:
        tasks = part_of(tasks, args.part)
    except ValueError as error:
        parser.error(f"--part: {error}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # an empty cache, so that times are of a first call
        return compile_all(tasks, args.jobs, errors)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_matrix",
        description="Compiles the kernels for several GPUs without having them, and checks the machine code.",
    )
    parser.add_argument(
        "--full", action="store_true", help="every configuration that dispatch can choose; about nine hours of one core"
    )
    parser.add_argument("--part", metavar="K/N", default="1/1", help="the K-th of N parts, for N machines")
    parser.add_argument(
        "--loss", choices=[*cases.CASES, "all", "none"], default="all", help="Triton kernels to compile, default: all"
    )
    parser.add_argument("--arch", default="80,90,100", metavar="80,90,gfx942", help="compute capabilities and AMD GPUs")
    parser.add_argument("--no-cuda", action="store_true", help="leave out the CUDA sources")
    parser.add_argument("--sources", metavar="NAME,...", help="files of csrc/cuda; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument(
        "--read", type=Path, nargs="+", metavar="FILE", help="show the rows that --json wrote; compile nothing"
    )
    parser.add_argument(
        "--update", type=Path, metavar="FILE.md",
        help=f"write the table between {BEGIN} and {END}, with --full between {FULL_BEGIN} and {FULL_END}",
    )  # fmt: skip
    args = parser.parse_args(argv)
    start = time.monotonic()
    rows, broken = read_rows(args.read, parser) if args.read else compile_rows(args, parser)
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=150)
    (print_summary if args.full else print_table)(rows, console)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.update:
        if args.full:
            replace_block(args.update, FULL_BEGIN, FULL_END, markdown_summary(rows))
        else:
            replace_block(args.update, BEGIN, END, markdown(rows))
    console.print(f"{len(rows)} kernels, {broken} problems, {time.monotonic() - start:.0f} s")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
