"""What the compilers make of the kernels, without a GPU: `python -m tools.compile_matrix`.

Every Triton kernel that dispatch can choose is compiled ahead of time, and every CUDA source by nvcc, for GPUs that
need not be there; registers, shared memory, spills and the width of loads are read out of the machine code, and held
against the rules of :mod:`tools.compile_matrix.rules`.
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
#: Blocks of a document: a row for each kernel of the selection, and a line for each function of the whole matrix.
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
FULL_BEGIN, FULL_END = "<!-- kernels-full:begin -->", "<!-- kernels-full:end -->"


def read_rows(paths: Sequence[Path], parser: argparse.ArgumentParser) -> tuple[list[Row], int]:
    """The rows of earlier runs, and how many problems they have."""
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
    """Compile what the arguments ask for."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: under its interpreter Triton compiles nothing")
    try:
        gpus = [parsed_gpu(text) for text in args.arch.split(",")]
    except ValueError:
        parser.error(f"--arch: expected numbers such as 90 or names such as gfx942, got {args.arch!r}")
    losses = list(cases.CASES) if args.loss == "all" else [] if args.loss == "none" else [args.loss]
    tasks = tasks_of(losses, args.full, gpus)
    errors = Console(stderr=True)
    if not args.no_cuda:
        if nvcc() is None:
            errors.print("no nvcc: the CUDA sources are left out", highlight=False)
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
        os.environ["TRITON_CACHE_DIR"] = folder  # so that times are those of a first call
        return compile_all(tasks, args.jobs, errors)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_matrix",
        description="Compiles the kernels for GPUs that need not be there, and shows what the compiler made of them.",
    )
    parser.add_argument(
        "--full", action="store_true", help="every configuration that dispatch can choose; some nine hours of a core"
    )
    parser.add_argument("--part", metavar="K/N", default="1/1", help="the K-th of N parts, for N machines")
    parser.add_argument("--loss", choices=[*cases.CASES, "all", "none"], default="all", help="of Triton's kernels")
    parser.add_argument(
        "--arch", default="80,90,100", metavar="80,90,gfx942", help="compute capabilities, and AMD GPUs"
    )
    parser.add_argument("--no-cuda", action="store_true", help="leave the CUDA sources out")
    parser.add_argument("--sources", metavar="NAME,...", help="of csrc/cuda; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument(
        "--read", type=Path, nargs="+", metavar="FILE", help="show the rows that --json wrote; compile nothing"
    )
    parser.add_argument(
        "--update", type=Path, metavar="FILE.md",
        help=f"write a table between {BEGIN} and {END}, of --full kernels-full",
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
