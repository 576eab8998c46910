"""How it is measured: agreement with float64, memory, time, and the machine's copy bandwidth."""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.cases import Inputs
from benchmarks.providers import Loss, LossFunction

# Far above rounding in each dtype, far below what a wrong formula gives.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}
CHUNK_ELEMENTS = 2**25  # of the float64 reference at a time, so that a billion logits fit
COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}  # well beyond the caches
FLUSH_BYTES = 2**28  # several times a GPU's L2

# The profiler otherwise writes two lines to stderr each time it is used, across the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


@dataclass(frozen=True)
class Errors:
    """Largest errors against float64, relative to the loss and to the largest entry of the gradient."""

    loss: float
    gradient: float

    def within(self, tolerance: float) -> bool:
        return self.loss <= tolerance and self.gradient <= tolerance  # NaN is not


@dataclass(frozen=True)
class Memory:
    saved_bytes: int  # of the tensors that autograd saves, each storage once, the inputs left out
    saved_bytes_with_inputs: int
    held_bytes: int  # allocated by the forward pass and still there at its end, whoever keeps it
    peak_bytes: int  # beyond the inputs, over forward and backward; the gradient itself is in it


@dataclass
class Samples:
    """Seconds, one entry per timed call."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # until the call returned; on a CPU the same as both


def run_once(function: LossFunction, inputs: Inputs) -> Tensor:
    """One forward and backward pass; the gradient is left in inputs.student_logits.grad."""
    inputs.student_logits.grad = None
    value = function(inputs.student_logits, inputs.teacher_logits, inputs.target)
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach()


def errors(loss: Loss, function: LossFunction, inputs: Inputs) -> Errors:
    """Compares loss and gradient (mean over the rows) with the float64 reference of the same, rounded inputs."""
    student, teacher, target = inputs.student_logits, inputs.teacher_logits, inputs.target
    value = run_once(function, inputs)
    gradient = student.grad
    if gradient is None:
        raise RuntimeError("the provider left no gradient on the student logits")
    rows, classes = student.shape
    step = rows if loss.batch_coupled else max(1, CHUNK_ELEMENTS // classes)
    expected = torch.zeros((), dtype=torch.float64, device=student.device)
    worst, largest = expected.clone(), expected.clone()
    for start in range(0, rows, step):
        part = slice(start, start + step)
        exact = student.detach()[part].double().requires_grad_()
        part_loss = loss.reference_sum(exact, teacher[part].double(), target[part]) / rows
        part_loss.backward()  # type: ignore[no-untyped-call]
        assert exact.grad is not None
        expected += part_loss.detach()
        worst = torch.maximum(worst, (gradient[part].double() - exact.grad).abs().max())
        largest = torch.maximum(largest, exact.grad.abs().max())
    student.grad = None
    return Errors(float((value.double() - expected).abs() / expected.abs()), float(worst / largest))


def memory(function: LossFunction, inputs: Inputs) -> Memory:
    """Bytes kept between forward and backward, and the peak of both."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs.student_logits.grad = None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = function(inputs.student_logits, inputs.teacher_logits, inputs.target)
    del value
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs[:3]}
    without_inputs = sum(size for pointer, size in saved.items() if pointer not in own)
    observe = _cuda_allocations if inputs.student_logits.is_cuda else _cpu_allocations
    held, peak = observe(function, inputs)
    return Memory(without_inputs, sum(saved.values()), held, peak)


def _cuda_allocations(function: LossFunction, inputs: Inputs) -> tuple[int, int]:
    inputs.student_logits.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = function(inputs.student_logits, inputs.teacher_logits, inputs.target)
    held = torch.cuda.memory_allocated() - before
    value.backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    inputs.student_logits.grad = None
    return held, peak


def _cpu_allocations(function: LossFunction, inputs: Inputs) -> tuple[int, int]:
    """From the profiler's allocation events: what goes through PyTorch's allocator, so not a kernel's own scratch."""
    mark = "forward pass of the benchmark"
    inputs.student_logits.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        with record_function(mark):
            value = function(inputs.student_logits, inputs.teacher_logits, inputs.target)
        value.backward()  # type: ignore[no-untyped-call]
    inputs.student_logits.grad = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    forward = next(event for event in events if event.get("name") == mark and "dur" in event)
    forward_end = forward["ts"] + forward["dur"]
    live = held = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
        if event["ts"] <= forward_end:
            held = live
    return held, peak


def _cpu_call(function: LossFunction, inputs: Inputs, samples: Samples) -> None:
    # The gradient of the call before is dropped outside the timed part; making the new one is inside.
    inputs.student_logits.grad = None
    start = time.perf_counter()
    value = function(inputs.student_logits, inputs.teacher_logits, inputs.target)
    middle = time.perf_counter()
    value.backward()  # type: ignore[no-untyped-call]
    end = time.perf_counter()
    samples.forward.append(middle - start)
    samples.backward.append(end - middle)
    samples.both.append(end - start)
    samples.host.append(end - start)


class _CudaCall:
    """Times by events after emptying the L2; while the GPU empties it, the host gets ahead with its launches."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, function: LossFunction, inputs: Inputs, samples: Samples) -> None:
        inputs.student_logits.grad = None
        first, middle, last = (torch.cuda.Event(enable_timing=True) for _ in range(3))  # type: ignore[no-untyped-call]
        self.flush.zero_()
        first.record()
        start = time.perf_counter()
        value = function(inputs.student_logits, inputs.teacher_logits, inputs.target)
        middle.record()
        value.backward()  # type: ignore[no-untyped-call]
        last.record()
        samples.host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        samples.forward.append(first.elapsed_time(middle) / 1e3)
        samples.backward.append(middle.elapsed_time(last) / 1e3)
        samples.both.append(first.elapsed_time(last) / 1e3)


TimedCall = Callable[[LossFunction, Inputs, Samples], None]


def timer(device: str) -> TimedCall:
    """Runs a function once, forward and backward, and appends what it took to the samples."""
    return _CudaCall() if device == "cuda" else _cpu_call


def time_providers(
    functions: dict[str, LossFunction],
    inputs: Inputs,
    seconds: float,
    min_rounds: int,
    progress: Callable[[float], None],
    block_seconds: float = 0.02,
) -> dict[str, Samples]:
    """Times the providers in turn, round after round, so that a disturbance of the machine hits all alike.

    In each round a provider runs one block of calls. A block of several calls drops the first, so that what the
    provider before left in the caches does not count.
    """
    call = timer(inputs.student_logits.device.type)
    fastest = {}
    for name, function in functions.items():
        warm_up = Samples()
        for _ in range(3):
            call(function, inputs, warm_up)
        fastest[name] = min(warm_up.both)
    samples = {name: Samples() for name in functions}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        rounds = 0
        done = 0.0
        while done < 1:
            for name, function in functions.items():
                calls = max(1, min(100, int(block_seconds / fastest[name])))
                if calls > 1:
                    call(function, inputs, Samples())
                for _ in range(calls):
                    call(function, inputs, samples[name])
                fastest[name] = min(fastest[name], *samples[name].both[-calls:])
            rounds += 1
            done = min(rounds / min_rounds, (time.perf_counter() - start) / seconds)
            progress(min(done, 1.0))
        return samples
    finally:
        gc.enable()
        inputs.student_logits.grad = None


def copy_bandwidth(device: str, repeats: int = 15) -> float:
    """Bytes per second, read plus written, of copying a tensor far larger than the caches: the median."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.int8, device=device).view(torch.float32)
    destination = torch.zeros_like(source)
    times = []
    for _ in range(repeats + 3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        destination.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * COPY_BYTES[device] / sorted(times[3:])[repeats // 2]
