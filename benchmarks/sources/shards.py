"""Classes shared by processes: the time of a call, compared with one process that has as many columns, and the bytes
exchanged. Each process is ``python -m benchmarks.sources.shards JSON``, with one thread on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, distributed

import fused_kd
from benchmarks.measure import cases
from benchmarks.measure.machine import ROOT, describe
from benchmarks.measure.timing import quantiles, synchronize
from fused_kd import ClassShard, nkd_loss

PATIENCE = 120.0  # seconds beyond the timing, for processes to start and make their inputs
COLLECTIVES = ("all_gather_into_tensor", "all_gather_single", "all_gather", "all_reduce")

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    processes: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.rows}×{self.classes} {self.dtype} on {self.processes} processes"


class Counted:
    """Counts the bytes that this process sends to the others and receives, in one call."""

    def __init__(self) -> None:
        self.given = self.got = self.calls = 0

    @contextmanager
    def counting(self) -> Iterator[Counted]:
        originals = {name: getattr(distributed, name) for name in COLLECTIVES if hasattr(distributed, name)}
        for name, original in originals.items():
            setattr(distributed, name, self._counting(original))
        try:
            yield self
        finally:
            for name, original in originals.items():
                setattr(distributed, name, original)

    def _counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **options: Any) -> Any:
            tensors = [each for given in args for each in (given if isinstance(given, list) else [given])]
            sizes = [each.nbytes for each in tensors if isinstance(each, Tensor)]
            own = sizes[-1]  # the outputs of a gather come first
            self.calls += 1
            self.given += own
            self.got += sum(sizes[:-1]) - own if len(sizes) > 1 else own
            return original(*args, **options)

        return collective


def _step(function: Callable[[], Tensor], leaf: Tensor, device: str) -> float:
    leaf.grad = None
    synchronize(device)
    start = time.perf_counter()
    function().backward()  # type: ignore[no-untyped-call]
    synchronize(device)
    return time.perf_counter() - start


def observe(case: Case, rank: int, seconds: float) -> dict[str, Any]:
    """Measure in this process: times, in turn with process 0 alone, bytes and errors."""
    whole = cases.make_inputs(cases.Case(case.rows, case.classes, case.dtype, case.device), case.seed)
    width = -(-case.classes // case.processes)
    columns = slice(rank * width, min((rank + 1) * width, case.classes))
    student = whole.student_logits.detach()[:, columns].contiguous().requires_grad_()
    teacher = whole.other_logits[:, columns].contiguous()
    target = whole.target

    def shared() -> Tensor:
        return nkd_loss(
            ClassShard(student, columns.start, case.classes),
            ClassShard(teacher, columns.start, case.classes),
            target,
        )

    def alone() -> Tensor:
        return nkd_loss(student, teacher, target % student.shape[1])

    exact = whole.student_logits.detach().double().requires_grad_()
    truth = fused_kd.nkd_loss(exact, whole.other_logits.double(), target, backend="reference")
    (exact_gradient,) = torch.autograd.grad(truth, exact)
    with Counted().counting() as counted:
        found = shared()
        found.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    error = (student.grad.double() - exact_gradient[:, columns]).abs().max() / exact_gradient.abs().max()
    result: dict[str, Any] = {
        "relative_errors": {
            "loss": float((found.detach().double() - truth.detach()).abs() / truth.detach().abs()),
            "gradient": float(error),
        },
        "given_bytes": counted.given,
        "got_bytes": counted.got,
        "exchanges": counted.calls,
        "alone": [],
        "shared": [],
    }
    del exact, exact_gradient, truth
    more = torch.ones(1, device=case.device)
    start = time.perf_counter()
    while more:
        distributed.barrier()
        if rank == 0:  # the others wait
            result["alone"].append(_step(alone, student, case.device))
        distributed.barrier()
        result["shared"].append(_step(shared, student, case.device))
        # At least two rounds: the first one is dropped.
        more.fill_(float(len(result["shared"]) < 2 or time.perf_counter() - start < seconds))
        distributed.broadcast(more, 0)
    return result


def measure(case: Case, seconds: float, progress: Progress) -> dict[str, Any]:
    """Measure one case in processes of its own."""
    progress(f"{case.processes} processes", 0.1)
    about: dict[str, Any] = {**asdict(case), "name": case.name}
    if case.device == "cuda" and torch.cuda.device_count() < case.processes:
        have = torch.cuda.device_count()
        return about | {"status": "unavailable", "reason": f"needs {case.processes} GPUs, {have} here"}
    with tempfile.TemporaryDirectory() as folder:
        asked = {"case": asdict(case), "seconds": seconds, "store": str(Path(folder) / "store")}
        command = [sys.executable, "-m", "benchmarks.sources.shards"]
        processes = [
            subprocess.Popen(
                [*command, json.dumps({**asked, "rank": rank})], stdout=subprocess.PIPE, text=True, cwd=ROOT
            )
            for rank in range(case.processes)
        ]
        try:
            answers = [process.communicate(timeout=seconds + PATIENCE)[0] for process in processes]
        except subprocess.TimeoutExpired:
            return about | {"status": "failed", "reason": "a process did not answer in time"}
        finally:
            for process in processes:
                process.kill()
                process.wait()
    found: list[dict[str, Any]] = [json.loads(answer.splitlines()[-1]) for answer in answers if answer]
    reasons = [each for each in found if "reason" in each]
    if reasons or len(found) < case.processes:
        reason = reasons[0] if reasons else {"status": "failed", "reason": "a process ended without an answer"}
        return about | reason
    progress("done", 1.0)
    return about | _summary(case, found)


def _summary(case: Case, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Result of all processes. The slowest process determines a call's time; the first call is dropped."""
    shared = [max(each) for each in zip(*(process["shared"] for process in found), strict=True)][1:]
    alone = found[0]["alone"][1:]
    return {
        "status": "ok",
        "reason": None,
        "calls": len(shared),
        "milliseconds": {"shared": quantiles(shared), "alone": quantiles(alone)},
        "over_alone": median(both / one for both, one in zip(shared, alone, strict=True)),
        "exchanges": found[0]["exchanges"],
        "given_bytes_per_row": found[0]["given_bytes"] / case.rows,
        "got_bytes_per_row": found[0]["got_bytes"] / case.rows,
        "relative_errors": {
            name: max(process["relative_errors"][name] for process in found) for name in ("loss", "gradient")
        },
    }


def main(argument: str) -> None:
    asked = json.loads(argument)
    case, rank = Case(**asked["case"]), asked["rank"]
    if case.device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    distributed.init_process_group(
        "nccl" if case.device == "cuda" else "gloo",
        f"file://{asked['store']}",
        timeout=timedelta(seconds=PATIENCE),
        rank=rank,
        world_size=case.processes,
    )
    try:
        answer = observe(case, rank, asked["seconds"])
    except Exception as error:  # reported in the result
        answer = {"status": "failed", "reason": describe(error)}
    print(json.dumps(answer), flush=True)
    distributed.destroy_process_group()
    # Skip the interpreter's shutdown: a thread of Gloo that releases a Python object during it aborts the process.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
