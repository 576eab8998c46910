"""What the compilers make of the kernels, without a GPU: `python -m tools.compile_matrix`.

Every Triton kernel that dispatch can choose is compiled ahead of time, and every CUDA source by nvcc, for GPUs that
need not be there; registers, shared memory, spills and the width of loads are read out of the machine code, and held
against the rules of :mod:`tools.compile_matrix.rules`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.show.report import lines, replace_block
from fused_kd.backends.triton.launch import Launch
from tools.compile_matrix import cases
from tools.compile_matrix.rules import ONE_INPUT, RANKED_SHARED, SHARED_LIMIT, Row, problems

ROOT = Path(__file__).parents[2]
#: Blocks of a document: a row for each kernel of the selection, a line for each function of the whole matrix, and of
#: that part of it which has weights per row.
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
FULL_BEGIN, FULL_END = "<!-- kernels-full:begin -->", "<!-- kernels-full:end -->"
WEIGHTED_BEGIN, WEIGHTED_END = "<!-- kernels-weighted:begin -->", "<!-- kernels-weighted:end -->"


def compile_triton(case: cases.Call, number: int, capability: int, loss: str) -> Row:
    """One launch of a call; run in processes of its own."""
    from fused_kd.backends.triton.compile import compile_launch

    launch = case.launches()[number]
    report = compile_launch(launch, capability)
    elements = _elements(launch)
    # VEC is of a row, of which a thread may have less.
    most = min(launch.options.get("VEC", 1), elements or math.inf)
    # A call's first tensors are its logits, and no vector divides an address that is offset.
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in launch.arguments[:2])
    return {
        "source": "triton",
        "loss": loss,
        "case": str(case),
        "kernel": launch.kernel,
        "capability": capability,
        "registers": report.registers,
        "threads": 32 * launch.options["num_warps"],
        "shared": report.shared,
        "shared_limit": RANKED_SHARED if loss == "uskd" else SHARED_LIMIT[capability],
        "stack": report.stack,
        "local": report.local,
        "spilled": 0,
        "loads": report.loads,
        "stores": report.stores,
        "vector": 2 * most if aligned else 2,
        "element_bytes": case.element_bytes,
        # Tf-KD reads the student's logits alone, and so do the kernels before and after USKD's ranking.
        "inputs": 1 if launch.options.get("LOSS") == 4 or launch.kernel in ONE_INPUT else 2,
        "writes": launch.options.get("GRAD", True),
        "instructions": report.instructions,
        "exponentials": report.exponentials,
        "elements": elements,
        "seconds": report.seconds,
        "library": False,
    }


def _elements(launch: Launch) -> int:
    """Of a tile, for each thread."""
    options = launch.options
    tile = options.get("ROWS", 1) * options.get("BLOCK", options.get("LANES", 0) * options.get("WIDTH", 0))
    return int(tile) // (32 * int(options["num_warps"]))


def nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def compile_cuda(source: Path, capability: int) -> list[Row]:
    """Every kernel of a CUDA source."""
    from fused_kd.backends.triton.compile import read_cubin

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = [str(nvcc()), "-std=c++17", "-O3", f"-arch=sm_{capability}", "-Xptxas", "-v", "-cubin", str(source)]
        start = time.perf_counter()
        finished = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if finished.returncode:
            raise RuntimeError(f"nvcc: {source.name} for sm_{capability}: {finished.stderr[-2000:]}")
        kernels = read_cubin(cubin)
    spilled = {}
    for part in finished.stderr.split("Compiling entry function '")[1:]:
        counts = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)[:2]
        spilled[part.split("'")[0]] = sum(map(int, counts))
    rows = []
    for name, code in kernels.items():
        if "EmptyKernel" in name:
            continue
        threads = re.search(r"rank_in_blockILi(\d+)E", name)
        rows.append(
            {
                "source": "cuda",
                "loss": "uskd",
                "case": source.name,
                "kernel": _readable(name),
                "capability": capability,
                "registers": code.registers,
                "threads": int(threads[1]) if threads else code.threads,
                "shared": code.shared,
                "shared_limit": 48 * 1024,  # what is static; arrangements.h bounds what is not
                "stack": code.stack,
                "local": code.local,
                "spilled": spilled.get(name, 0),
                "loads": code.loads,
                "stores": code.stores,
                "vector": 0,
                "element_bytes": 0,
                "inputs": 0,
                "writes": False,
                "instructions": code.instructions,
                "exponentials": code.exponentials,
                "elements": 0,
                "seconds": seconds,
                "library": "3cub" in name,
            }
        )
    return rows


def _readable(name: str) -> str:
    """The function of a mangled name, and its numbers."""
    if "3cub" in name:
        return "CUB's segmented sort"
    own = re.findall(r"(?<=\d)([a-z]+(?:_[a-z]+)*)(?=I|E|P)", name)
    function = next((word for word in own if word not in ("fused_kd", "common")), name)
    numbers = re.findall(r"Li(\d+)E", name)
    return function + (f"<{','.join(numbers)}>" if numbers else "")


Task = tuple[Callable[..., Any], tuple[Any, ...]]


def tasks_of(losses: Sequence[str], full: bool, capabilities: Sequence[int], weighted: bool = False) -> list[Task]:
    """A compilation of every distinct kernel for every GPU; only those with weights per row, if ``weighted``."""
    jobs = [job for job in cases.distinct(losses, full) if job.call.weighted or not weighted]
    return [(compile_triton, (job.call, job.number, c, job.loss)) for job in jobs for c in capabilities]


def part_of(tasks: list[Task], text: str) -> list[Task]:
    """The K-th of N parts of about equal work, for "K/N"."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"expected a part such as 1/4, got {text!r}")
    return tasks[int(found[1]) - 1 :: int(found[2])]


def _longest_first(task: Task) -> int:
    """So that no process is left alone with one at the end: nvcc takes half a minute, a sort on chip some seconds."""
    function, arguments = task
    return 0 if function is compile_cuda else 1 if arguments[3] == "uskd" else 2


def compile_all(tasks: list[Task], workers: int, console: Console) -> tuple[list[Row], int]:
    """The rows of all tasks, in the tasks' order, and how many problems there are; tells of each when it is found."""
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: list[list[Row]] = [[] for _ in tasks]
    broken = 0
    # Fresh processes, since forking one whose threads have started is unsafe.
    context = multiprocessing.get_context("spawn")
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(tasks))
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            order = sorted(range(len(tasks)), key=lambda i: _longest_first(tasks[i]))
            futures = {pool.submit(tasks[i][0], *tasks[i][1]): i for i in order}
            for future in as_completed(futures):
                progress.advance(bar)
                task = futures[future]
                try:
                    result = future.result()
                except Exception as error:  # of an hour's work, what does not compile is one line
                    found = [f"{' '.join(map(str, tasks[task][1]))}: {type(error).__name__}: {error}"]
                else:
                    results[task] = result if isinstance(result, list) else [result]
                    found = [problem for row in results[task] for problem in problems(row)]
                broken += len(found)
                for problem in found:
                    console.print(f"error: {problem}", highlight=False, markup=False, soft_wrap=True)
    return [row for rows in results for row in rows], broken


COLUMNS = ("kernel", "call", "sm", "threads", "regs", "shared", "local", "load", "store", "tile", "code", "exp", "time")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text: bytes of shared memory, instructions on local memory, widest access in bytes, elements of a tile
    for each thread, instructions in all and those that make an exponential, seconds."""
    return (
        *(row["kernel"], row["case"], str(row["capability"]), str(row["threads"] or "–"), str(row["registers"])),
        *(str(row["shared"]), str(row["local"] or "none"), _widest(row["loads"]), _widest(row["stores"])),
        *(str(row["elements"] or "–"), str(row["instructions"]), str(row["exponentials"])),
        f"{row['seconds']:.1f} s",
    )


def _widest(counts: dict[int, int]) -> str:
    return f"{max(counts)} B" if counts else "–"


def _markdown(columns: Sequence[str], words: int, rows: Sequence[Sequence[str]]) -> str:
    """A table whose first columns are ``words``, the others figures."""
    align = ["---"] * words + ["---:"] * (len(columns) - words)
    return lines([columns, align, *([cell.replace("<", "&lt;") for cell in row] for row in rows)])


def markdown(rows: list[Row]) -> str:
    return _markdown(COLUMNS, 2, [cells(row) for row in rows])


def markdown_summary(rows: list[Row]) -> str:
    broken = sum(len(problems(row)) for row in rows)
    table = _markdown(SUMMARY, 1, summarise(rows))
    return f"{table}\n\n{len(rows)} kernels, of which {broken or 'none'} break a rule."


def print_table(rows: list[Row], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        text = column in ("kernel", "call")
        # Only the call's description may wrap; figures cut short are of no use.
        width = {"kernel": 22, "call": 34}.get(column)
        table.add_column(column, justify="left" if text else "right", no_wrap=column != "call", width=width)
    for row in rows:
        table.add_row(*cells(row), style="red" if problems(row) else None)
    console.print(table)


SUMMARY = ("kernel", "sm", "configurations", "regs", "shared", "local", "narrowest load", "time", "slowest")


def summarise(rows: list[Row]) -> list[tuple[str, ...]]:
    """A line for each kernel and GPU: the range of registers, the most shared memory, how many configurations spill,
    the narrowest of their widest loads, seconds in all and of the slowest."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["capability"]), []).append(row)
    lines: list[tuple[str, ...]] = []
    for (kernel, capability), group in sorted(groups.items()):
        registers = [row["registers"] for row in group]
        seconds = [row["seconds"] for row in group]
        spills = sum(bool(row["local"] or row["stack"] or row["spilled"]) for row in group)
        load = min((max(row["loads"]) for row in group if row["loads"]), default=0)
        lines.append((
            *(kernel, str(capability), str(len(group)), f"{min(registers)}–{max(registers)}"),
            *(str(max(row["shared"] for row in group)), f"{spills} spill" if spills else "none", f"{load} B"),
            *(f"{sum(seconds):.0f} s", f"{max(seconds):.1f} s"),
        ))  # fmt: skip
    return lines


def print_summary(rows: list[Row], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in SUMMARY:
        table.add_column(column, justify="left" if column == "kernel" else "right", no_wrap=True)
    for line in summarise(rows):
        table.add_row(*line)
    console.print(table)


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
        capabilities = [int(text) for text in args.arch.split(",")]
    except ValueError:
        parser.error(f"--arch: expected numbers such as 90, got {args.arch!r}")
    losses = list(cases.CASES) if args.loss == "all" else [] if args.loss == "none" else [args.loss]
    tasks = tasks_of(losses, args.full, capabilities, args.weighted)
    errors = Console(stderr=True)
    if not args.no_cuda and not args.weighted:
        if nvcc() is None:
            errors.print("no nvcc: the CUDA sources are left out", highlight=False)
        else:
            sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
            wanted = args.sources.split(",") if args.sources else [source.name for source in sources]
            for name in wanted:
                if name not in [source.name for source in sources]:
                    parser.error(f"--sources: expected names among those in csrc/cuda, got {name!r}")
            cuda = [source for source in sources if source.name in wanted]
            tasks += [(compile_cuda, (source, capability)) for source in cuda for capability in capabilities]
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
        "--full", action="store_true", help="every configuration that dispatch can choose; over an hour"
    )
    parser.add_argument("--weighted", action="store_true", help="Triton's kernels with weights per row alone")
    parser.add_argument("--part", metavar="K/N", default="1/1", help="the K-th of N parts, for N machines")
    parser.add_argument("--loss", choices=[*cases.CASES, "all", "none"], default="all", help="of Triton's kernels")
    parser.add_argument("--arch", default="80,90,100", metavar="80,90,100", help="compute capabilities")
    parser.add_argument("--no-cuda", action="store_true", help="leave the CUDA sources out")
    parser.add_argument("--sources", metavar="NAME,...", help="of csrc/cuda; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument(
        "--read", type=Path, nargs="+", metavar="FILE", help="show the rows that --json wrote; compile nothing"
    )
    parser.add_argument(
        "--update", type=Path, metavar="FILE.md",
        help=f"write a table between {BEGIN} and {END}, of --full kernels-full, of both --full and --weighted "
        "kernels-weighted",
    )  # fmt: skip
    args = parser.parse_args(argv)
    start = time.monotonic()
    rows, broken = read_rows(args.read, parser) if args.read else compile_rows(args, parser)
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=150)
    (print_summary if args.full else print_table)(rows, console)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.update:
        if args.full and args.weighted:
            replace_block(args.update, WEIGHTED_BEGIN, WEIGHTED_END, markdown_summary(rows))
        elif args.full:
            replace_block(args.update, FULL_BEGIN, FULL_END, markdown_summary(rows))
        else:
            replace_block(args.update, BEGIN, END, markdown(rows))
    console.print(f"{len(rows)} kernels, {broken} problems, {time.monotonic() - start:.0f} s")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
