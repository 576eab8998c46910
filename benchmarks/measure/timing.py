"""Measures memory, time, and the machine's copy bandwidth."""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.forms.spec import LossFunction
from benchmarks.measure.cases import Inputs

COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}  # well beyond the caches
FLUSH_BYTES = 2**28  # several times a GPU's L2
QUANTILES = (0.2, 0.5, 0.8)
ALLOCATION = "[memory]"  # the profiler's name for allocations and deallocations

# Else each use of the profiler writes two lines to stderr, across the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


@dataclass(frozen=True)
class Memory:
    saved_bytes: int  # storages that autograd saves, each counted once, without the inputs
    saved_bytes_with_inputs: int
    held_bytes: int  # allocated by the forward pass and not freed at its end
    peak_bytes: int  # beyond the inputs, over forward and backward, the gradient included


@dataclass
class Samples:
    """Seconds, one entry per timed call."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # until the call returned; on a CPU the same as both
    loss: list[float] = field(default_factory=list)  # the loss's part of a training step


def quantiles(seconds: Iterable[float]) -> dict[str, float]:
    """QUANTILES in milliseconds."""
    low, median, high = np.quantile(np.array(list(seconds)) * 1e3, QUANTILES)
    return {"q20": float(low), "median": float(median), "q80": float(high)}


def synchronize(device: str) -> None:
    """Wait for a GPU's work; on a CPU there is nothing to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def memory(function: LossFunction, inputs: Inputs) -> Memory:
    """Bytes kept between forward and backward, and the peak of both passes."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs.drop_gradients()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = function(*inputs[:3])
    del value
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs[:3]}
    without_inputs = sum(size for pointer, size in saved.items() if pointer not in own)
    observe = _cuda_allocations if inputs.student_logits.is_cuda else _cpu_allocations
    held, peak = observe(function, inputs)
    return Memory(without_inputs, sum(saved.values()), held, peak)


def _cuda_allocations(function: LossFunction, inputs: Inputs) -> tuple[int, int]:
    inputs.drop_gradients()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = function(*inputs[:3])
    held = torch.cuda.memory_allocated() - before
    value.backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    inputs.drop_gradients()
    return held, peak


def _cpu_allocations(function: LossFunction, inputs: Inputs) -> tuple[int, int]:
    """Bytes held and peak, from the profiler's allocation events: PyTorch's allocator, so not a kernel's scratch."""
    mark = "forward pass of the benchmark"
    inputs.drop_gradients()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        with record_function(mark):
            value = function(*inputs[:3])
        value.backward()  # type: ignore[no-untyped-call]
    inputs.drop_gradients()
    events = trace_events(prof, mark, ALLOCATION)
    forward = next(event for event in events if event["name"] == mark and "dur" in event)
    forward_end = forward["ts"] + forward["dur"]
    live = held = peak = 0
    for event in (event for event in events if event["name"] == ALLOCATION):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
        if event["ts"] <= forward_end:
            held = live
    return held, peak


def trace_events(prof: profile, *names: str) -> list[dict[str, Any]]:
    """A profile's events with these names, in the order of time. A profile can be read only once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sorted((event for event in events if event.get("name") in names), key=lambda event: event["ts"])


def _cpu_call(function: LossFunction, inputs: Inputs, samples: Samples) -> None:
    start = time.perf_counter()
    value = function(*inputs[:3])
    middle = time.perf_counter()
    value.backward()  # type: ignore[no-untyped-call]
    end = time.perf_counter()
    samples.forward.append(middle - start)
    samples.backward.append(end - middle)
    samples.both.append(end - start)
    samples.host.append(end - start)
    # Outside the timed part, but before any other work: training does not keep the logits' gradient longer either.
    inputs.drop_gradients()


class _CudaCall:
    """Times by events after emptying the L2; meanwhile the host runs ahead with its launches."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, function: LossFunction, inputs: Inputs, samples: Samples) -> None:
        first, middle, last = (torch.cuda.Event(enable_timing=True) for _ in range(3))  # type: ignore[no-untyped-call]
        self.flush.zero_()
        first.record()
        start = time.perf_counter()
        value = function(*inputs[:3])
        middle.record()
        value.backward()  # type: ignore[no-untyped-call]
        last.record()
        samples.host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        samples.forward.append(first.elapsed_time(middle) / 1e3)
        samples.backward.append(middle.elapsed_time(last) / 1e3)
        samples.both.append(first.elapsed_time(last) / 1e3)
        inputs.drop_gradients()

    def plain(self, function: Callable[[], object], samples: Samples) -> None:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.flush.zero_()
        first.record()
        function()
        last.record()
        torch.cuda.synchronize()
        samples.both.append(first.elapsed_time(last) / 1e3)


def _cpu_plain(function: Callable[[], object], samples: Samples) -> None:
    start = time.perf_counter()
    function()
    samples.both.append(time.perf_counter() - start)


def timer(device: str) -> Callable[[LossFunction, Inputs, Samples], None]:
    """A function that runs another once, forward and backward, and appends the times to the samples."""
    return _CudaCall() if device == "cuda" else _cpu_call


def plain_timer(device: str) -> Callable[[Callable[[], object], Samples], None]:
    """The same for functions without a backward pass."""
    return _CudaCall().plain if device == "cuda" else _cpu_plain


def time_in_turn(
    calls: dict[str, Callable[[Samples], None]],
    seconds: float,
    min_rounds: int,
    progress: Callable[[float], None],
    block_seconds: float = 0.02,
    before: Callable[[], None] | None = None,
) -> dict[str, Samples]:
    """Run self-timing calls in turn, round after round, so that a disturbance of the machine hits all alike.

    Each round has one block per call. A block of several calls drops the first, which finds the caches as the previous
    block left them. ``before`` runs before each call; then no call is dropped.
    """
    fastest = {}  # seconds per call, ``before`` included
    for name, call in calls.items():
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            if before:
                before()
            call(Samples())
            taken.append(time.perf_counter() - start)
        fastest[name] = min(taken)
    samples = {name: Samples() for name in calls}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        rounds = 0
        done = 0.0
        while done < 1:
            for name, call in calls.items():
                count = max(1, min(100, int(block_seconds / fastest[name])))
                if count > 1 and not before:
                    call(Samples())
                began = time.perf_counter()
                for _ in range(count):
                    if before:
                        before()
                    call(samples[name])
                fastest[name] = min(fastest[name], (time.perf_counter() - began) / count)
            rounds += 1
            done = min(rounds / min_rounds, (time.perf_counter() - start) / seconds)
            progress(min(done, 1.0))
        return samples
    finally:
        gc.enable()


def copy_bandwidth(device: str, repeats: int = 15) -> float:
    """Median bytes per second, read plus written, of copying a tensor far larger than the caches."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.int8, device=device).view(torch.float32)
    destination = torch.zeros_like(source)
    times = []
    for _ in range(repeats + 3):
        synchronize(device)
        start = time.perf_counter()
        destination.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * COPY_BYTES[device] / sorted(times[3:])[repeats // 2]
