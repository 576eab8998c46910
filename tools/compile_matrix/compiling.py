"""Compiles launches and sources in parallel, in worker processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fused_kd.backends.triton.launch import Launch
from fused_kd.core.catalogue import BITS
from tools.compile_matrix import cases
from tools.compile_matrix.calls import Call
from tools.compile_matrix.rules import ONE_INPUT, RANKED_SHARED, Gpu, Row, problems, shared_limit

TEACHER = BITS["teacher"]


def compile_triton(case: Call, number: int, gpu: Gpu, loss: str) -> Row:
    """Compile one launch of a call, in a worker process."""
    from tools.compile_matrix.machine_code import compile_launch, source_of, target_of

    launch = case.launches()[number]
    report = compile_launch(launch, gpu)
    threads = target_of(gpu).warp_size * source_of(launch, gpu)[1]["num_warps"]
    elements = _elements(launch, threads)
    limit = shared_limit(gpu)
    # VEC is the vector of a row; a thread may have fewer elements.
    options = _options(launch)
    most = min(options.get("VEC", 1), elements or math.inf)
    # The first tensors of a launch are its logits; an offset address rules out vectors.
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in launch.arguments[:2])
    return {
        "source": "triton",
        "loss": loss,
        "case": str(case),
        "kernel": launch.kernel,
        "capability": gpu,
        "registers": report.registers,
        "threads": threads,
        "shared": report.shared,
        "shared_limit": min(limit, RANKED_SHARED) if loss == "uskd" else limit,
        "stack": report.stack,
        "local": report.local,
        "spilled": 0,
        "loads": report.loads,
        "stores": report.stores,
        "vector": 2 * most if aligned else 2,
        "element_bytes": case.element_bytes,
        # Tf-KD and the kernels before and after USKD's ranking read the student's logits alone.
        "inputs": 2 if launch.kernel not in ONE_INPUT and options.get("LOSS", TEACHER) & TEACHER else 1,
        "writes": options.get("GRAD", True),
        "instructions": report.instructions,
        "exponentials": report.exponentials,
        "elements": elements,
        "seconds": report.seconds,
        "library": False,
    }


def _options(launch: Launch) -> dict[str, Any]:
    """A launch's options, with the fields of those that are tuples in their place."""
    tuples: list[Any] = [each for each in launch.options.values() if isinstance(each, tuple)]
    return launch.options | {name: value for each in tuples for name, value in each._asdict().items()}


def _elements(launch: Launch, threads: int) -> int:
    """Elements of a tile per thread."""
    options = _options(launch)
    tile = options.get("ROWS", 1) * options.get("BLOCK", options.get("LANES", 0) * options.get("WIDTH", 0))
    return int(tile) // threads


def nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def compile_cuda(source: Path, capability: int) -> list[Row]:
    """Compile a CUDA source; return a row for each of its kernels."""
    from tools.compile_matrix.machine_code import read_cubin

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
        threads = re.search(r"rank_(?:held|streamed)_rowILi(\d+)E", name)
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
                "shared_limit": 48 * 1024,  # of static shared memory; arrangements.h bounds the dynamic part
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
    """The function and the numbers of a mangled name."""
    if "3cub" in name:
        return "CUB's segmented sort"
    own = re.findall(r"(?<=\d)([a-z]+(?:_[a-z]+)*)(?=I|E|P)", name)
    function = next((word for word in own if word not in ("fused_kd", "common")), name)
    numbers = re.findall(r"Li(\d+)E", name)
    return function + (f"<{','.join(numbers)}>" if numbers else "")


Task = tuple[Callable[..., Any], tuple[Any, ...]]


def tasks_of(losses: Sequence[str], full: bool, gpus: Sequence[Gpu]) -> list[Task]:
    """Tasks that compile every distinct kernel for every GPU."""
    jobs = cases.distinct(losses, full)
    return [(compile_triton, (job.call, job.number, gpu, job.loss)) for job in jobs for gpu in gpus]


def part_of(tasks: list[Task], text: str) -> list[Task]:
    """The K-th of N parts of about equal work, given "K/N"."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"expected a part such as 1/4, got {text!r}")
    return tasks[int(found[1]) - 1 :: int(found[2])]


def _longest_first(task: Task) -> int:
    """Sort key: long tasks first, so that none is left alone at the end. nvcc takes half a minute, a sort on chip some
    seconds."""
    function, arguments = task
    return 0 if function is compile_cuda else 1 if arguments[3] == "uskd" else 2


def compile_all(tasks: list[Task], workers: int, console: Console) -> tuple[list[Row], int]:
    """Run all tasks; print each problem when found. Return the rows in the tasks' order and the number of problems."""
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: list[list[Row]] = [[] for _ in tasks]
    broken = 0
    # Spawned, because forking a process with running threads is unsafe.
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
                except Exception as error:  # one kernel that does not compile must not end an hour's work
                    found = [f"{' '.join(map(str, tasks[task][1]))}: {type(error).__name__}: {error}"]
                else:
                    results[task] = result if isinstance(result, list) else [result]
                    found = [problem for row in results[task] for problem in problems(row)]
                broken += len(found)
                for problem in found:
                    console.print(f"error: {problem}", highlight=False, markup=False, soft_wrap=True)
    return [row for rows in results for row in rows], broken
