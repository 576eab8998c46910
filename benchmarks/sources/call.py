"""``python -m benchmarks.sources.call JSON``: times one form of a head in a process of its own and prints the result.

On a CPU the process's resident memory is measured, so each form needs its own process.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.machine import ROOT, without_paths
from benchmarks.measure.timing import synchronize
from benchmarks.sources.case import Case, make_inputs
from benchmarks.sources.forms import BARE, LOSSES, Form, Run, forms

INTERVAL = 0.002  # seconds between two readings of the memory
WARM_UP_ROWS = 8
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Resident:
    """Peak resident memory of this process while the block runs, sampled by a thread."""

    def __enter__(self) -> Resident:
        self._done = threading.Event()
        self.before = self.peak = self._now()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self._now())

    def _look(self) -> None:
        while not self._done.wait(INTERVAL):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


class Allocated:
    """Peak memory of a GPU, from PyTorch's allocator."""

    def __enter__(self) -> Allocated:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        self.peak = torch.cuda.max_memory_allocated()


def run_once(run: Run) -> None:
    value = run()
    if value is not None and value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]


def _timed(run: Run, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run_once(run)
    synchronize(device)
    return time.perf_counter() - start


def observe(form: Form, case: Case, seconds: float) -> dict[str, Any]:
    """Time calls, forward and backward, for ``seconds``; also the first call's peak beyond inputs and gradients."""
    inputs = make_inputs(case)
    few = inputs.first(WARM_UP_ROWS)
    run_once(form.make(few, case))
    few.drop_gradients()
    run = form.make(inputs, case)
    gc.collect()
    with Allocated() if case.device == "cuda" else Resident() as memory:
        taken = [_timed(run, case.device)]
    gradients = sum(leaf.grad.nbytes for leaf in inputs.trained() if leaf.grad is not None)
    while sum(taken) < seconds:
        inputs.drop_gradients()
        taken.append(_timed(run, case.device))
    found: dict[str, Any] = {"seconds": [each * form.times(case) for each in taken]}
    if form.name not in BARE:
        found |= {"peak_bytes": max(0, memory.peak - memory.before - gradients), "gradient_bytes": gradients}
    return found


def in_process(form: Form, case: Case, seconds: float, threads: int) -> dict[str, Any]:
    """:func:`observe` in a process of its own; raises RuntimeError with the last line of its stderr."""
    asked = json.dumps({"form": form.key, "case": vars(case), "seconds": seconds, "threads": threads})
    command = [sys.executable, "-m", "benchmarks.sources.call", asked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(without_paths(last))
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main(argument: str) -> None:
    asked = json.loads(argument)
    torch.set_num_threads(asked["threads"])
    form = next(form for form in forms(list(LOSSES)) if form.key == asked["form"])
    print(json.dumps(observe(form, Case(**asked["case"]), asked["seconds"])))


if __name__ == "__main__":
    main(sys.argv[1])
