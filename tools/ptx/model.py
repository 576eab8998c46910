"""A simple model of the resource that bounds a compiled Triton kernel: ``python -m tools.ptx model``.

:mod:`tools.ptx` counts a call's instructions and accesses; ptxas gives the registers. Each resource of a GPU needs some
time for its share alone, and the longest of these times is a lower bound that no kernel reaches. So the model ranks
resources and predicts no times. It has no latency, no bank conflicts and no L2 bandwidth, and it counts PTX
instructions, which ptxas translates into others. A few rows are run, and their counts extrapolated.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from tools.ptx.counters import KINDS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
#: A multiprocessor of compute capability 8.0, 9.0 or 10.0 ("Arithmetic Instructions" and "Technical Specifications per
#: Compute Capability" in NVIDIA's CUDA C++ Programming Guide): schedulers, each issuing one instruction of a warp per
#: clock; lanes of special functions and of shuffles per clock; resident warps and blocks; 32-bit registers, allocated
#: to a warp in units of 256; bytes of shared memory reserved per block.
SCHEDULERS, SPECIAL_LANES, SHUFFLE_LANES = 4, 16, 32
WARPS, BLOCKS, REGISTERS, REGISTER_UNIT, RESERVED = 64, 32, 65536, 256, 1024
#: Bytes per clock from the first-level cache: one line, as on a V100 (Jia, Maggioni, Staiger and Scarpazza, "Dissecting
#: the NVIDIA Volta GPU Architecture via Microbenchmarking", 2018).
LINE = 128
#: Least seconds of a kernel: scale_rows, which returns at once, took 1.4 us and more on an H200 in the kernel times
#: under benchmarks/results.
LAUNCH = 1.4e-6


class Gpu(NamedTuple):
    """``clock``: the highest, in Hz. ``bandwidth``: of memory, in bytes per second. ``cache``, ``shared``: bytes of the
    second-level cache and of a multiprocessor's shared memory."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    cache: int
    shared: int


#: By compute capability. A100 80GB SXM: NVIDIA's datasheet and "A100 Tensor Core GPU Architecture". H200 SXM: its
#: datasheet, and "H100 Tensor Core GPU Architecture" for the parts shared with the H100 (its memory: 3.35e12); the
#: clock follows from 67e12 float32 operations per second. B200: the datasheet of eight (DGX B200) gives 64e12 bytes per
#: second; its driver reports 148 multiprocessors and the cache; 75e12 float32 operations per second give the clock.
GPUS = {
    80: Gpu("A100", 108, 1.41e9, 2.039e12, 40 << 20, 164 << 10),
    90: Gpu("H200", 132, 1.98e9, 4.8e12, 50 << 20, 228 << 10),
    100: Gpu("B200", 148, 1.98e9, 8e12, 126 << 20, 228 << 10),
}


class Call(NamedTuple):
    loss: str
    rows: int
    classes: int

    @property
    def run(self) -> int:
        """Number of rows that are run instead of all, at most."""
        return min(self.rows, 1024 if self.classes <= 2048 else 32)

    def __str__(self) -> str:
        return f"{self.loss} {self.rows}×{self.classes}"


class Kernel(NamedTuple):
    """Counts of all launches of one kernel in a call, scaled up to its rows; ``blocks`` is the largest launch's."""

    name: str
    call: Call
    capability: int
    launches: int
    blocks: float
    threads: int
    registers: int
    shared: int
    counts: dict[str, float]

    @property
    def instructions(self) -> float:
        """Instructions of warps."""
        return sum(self.counts.get(f"{kind} instructions", 0.0) for kind in KINDS)

    @property
    def elements(self) -> int:
        return self.call.rows * self.call.classes

    @property
    def resident(self) -> int:
        """Resident blocks per multiprocessor."""
        warps = -(-self.threads // 32)
        warp_registers = -(-32 * self.registers // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = REGISTERS // SCHEDULERS // warp_registers * SCHEDULERS // warps
        by_shared = GPUS[self.capability].shared // (self.shared + RESERVED)
        return min(BLOCKS, WARPS // warps, by_registers, by_shared)

    @property
    def occupancy(self) -> float:
        """Resident warps as a share of the most that a multiprocessor can hold."""
        return self.resident * -(-self.threads // 32) / WARPS

    def bounds(self) -> dict[str, float]:
        """Least seconds that each resource is busy, the longest first."""
        gpu, counts = GPUS[self.capability], self.counts
        cycles = min(gpu.multiprocessors, self.blocks) * gpu.clock
        sectors = counts.get("load sectors", 0.0) + counts.get("store sectors", 0.0)
        touched = {how: counts.get(f"{how} bytes of memory", 0.0) for how in ("load", "store")}
        # If the data of all resident blocks fits into the second-level cache, memory delivers it once.
        working_set = min(self.blocks, self.resident * gpu.multiprocessors) / self.blocks * touched["load"]
        loaded = touched["load"] if working_set <= gpu.cache else 32 * counts.get("load sectors", 0.0)
        found = {
            "instructions": self.instructions / (SCHEDULERS * cycles),
            "special functions": 32 / SPECIAL_LANES * counts.get("special instructions", 0.0) / cycles,
            "shuffles": 32 / SHUFFLE_LANES * counts.get("shuffles", 0.0) / cycles,
            "first-level cache": 32 * sectors / (LINE * cycles),
            "memory": (loaded + touched["store"]) / gpu.bandwidth,
            "launch": self.launches * LAUNCH,
        }
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def bound(self) -> tuple[str, float]:
        """The bounding resource, and its time over the next one's."""
        (first, longest), (_, second), *_ = self.bounds().items()
        return first, longest / second if second else math.inf


def calls(losses: list[str]) -> Iterator[Call]:
    """Calls in bfloat16 with a mean: the measured ones (tools/gpu/profile.py), and 1024×1000 for every loss."""
    from tools.gpu.profile import CALLS

    measured = [Call(each.loss, each.rows, each.classes) for each in CALLS]
    for loss in losses:
        yield from dict.fromkeys([Call(loss, 1024, 1000), *(call for call in measured if call.loss == loss)])


@lru_cache(maxsize=1024)
def registers(ptx: str, capability: int) -> int:
    from tools.compile_matrix.machine_code import read_cubin
    from tools.ptx.triton.driver import assemble

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(assemble(ptx, capability))
        (code,) = read_cubin(path).values()
    return code.registers


def run(call: Call, capability: int) -> list[Kernel]:
    """Run forward and backward of a call, launched as on a GPU, on the driver of :mod:`tools.ptx.triton`.

    Two runs with different numbers of rows separate counts per row from counts per launch; a line through both gives
    the counts of all rows.
    """
    few, more = (_run(call, rows, capability) for rows in (call.run // 2, call.run))
    further = (call.rows - call.run) / (call.run - call.run // 2)
    found = []
    for name, kernel in more.items():
        counts = {
            each: number + further * max(0.0, number - few[name].counts.get(each, 0.0))
            for each, number in kernel.counts.items()
        }
        blocks = kernel.blocks + further * (kernel.blocks - few[name].blocks)
        found.append(kernel._replace(blocks=blocks, counts=counts))
    return found


def _run(call: Call, rows: int, capability: int) -> dict[str, Kernel]:
    from fused_kd import autograd, check
    from fused_kd.backends.triton import replay
    from fused_kd.backends.triton.plans import common, scale
    from tools.ptx.triton.driver import session

    before = len(session.launches)
    tensors = check.Case(torch.bfloat16, rows, call.classes, {}, loss=call.loss).inputs("cpu")
    with (
        warnings.catch_warnings(),
        mock.patch.object(session, "capability", capability),
        # Launch as for all rows, without a replay of earlier calls, and as for an incoming gradient on a GPU.
        mock.patch.object(replay, "_kept", {}),
        mock.patch.object(common, "COUNT_ROWS", common.COUNT_ROWS * rows // call.rows),
        mock.patch.object(scale, "SCALE_PROGRAMS", scale.SCALE_PROGRAMS * rows // call.rows),
        mock.patch.object(autograd, "_is_one", return_value=False),
    ):
        warnings.simplefilter("ignore")
        check.evaluate("triton", *tensors, {}, None, call.loss)
    found: dict[str, Kernel] = {}
    for launched in session.launches[before:]:
        one = Kernel(
            launched.kernel,
            call,
            capability,
            1,
            launched.grid[0],
            launched.threads,
            registers(launched.ptx, capability),
            launched.shared,
            dict(launched.result.counts),
        )
        known = found.setdefault(launched.kernel, one)
        if known is not one:
            found[launched.kernel] = one._replace(
                launches=known.launches + 1,
                blocks=max(known.blocks, one.blocks),
                registers=max(known.registers, one.registers),
                shared=max(known.shared, one.shared),
                counts=dict(Counter(known.counts) + Counter(one.counts)),
            )
    return found


def measured() -> dict[tuple[str, Call], float]:
    """Seconds of each kernel in each call on an H200, from the newest result."""
    newest: dict[str, Any] = json.loads(sorted(RESULTS.glob("kernel-times-cuda-*.json"))[-1].read_text("utf-8"))
    assert newest["machine"]["gpu"] == "NVIDIA H200"
    return {
        (kernel, Call(entry["loss"], entry["rows"], entry["classes"])): microseconds / 1e6
        for entry in newest["results"]
        if entry["backend"] == "triton"
        for kernel, microseconds in entry["kernels"].items()
    }


HEADER = (
    "kernel", "N×C", "launches", "instructions", "sectors loaded", "stored", "shuffles", "barriers", "registers",
    "occupancy", *(f"bound on {gpu.name}" for gpu in GPUS.values()), "share of H200 time",
)  # fmt: skip
#: Kernels bounded by their launch: they process a few numbers per row, or return at once.
SMALL = ("count_chunks", "reduce_parts", "rank_votes", "scale_rows")


def cells(by_gpu: dict[int, Kernel], known: dict[tuple[str, Call], float]) -> list[str]:
    """A row of one kernel in one call: counts per element, shuffles and barriers per row; "80 / 90 / 100" where
    :data:`GPUS` differ."""
    first = next(iter(by_gpu.values()))

    def each(text: Any) -> str:
        values = [text(kernel) for kernel in by_gpu.values()]
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    def per(name: str, by: int) -> Any:
        return lambda kernel: f"{kernel.counts.get(name, 0.0) / by:.3g}"

    bounds = [f"{name}, {min(times, 99):.1f}×" for name, times in (kernel.bound for kernel in by_gpu.values())]
    seconds = known.get((first.name, first.call))
    on_h200 = f"{max(by_gpu[90].bounds().values()) / seconds:.0%}" if seconds and 90 in by_gpu else "–"
    return [
        first.name, f"{first.call.rows}×{first.call.classes}", str(first.launches),
        each(lambda kernel: f"{kernel.instructions / kernel.elements:.2f}"),
        each(per("load sectors", first.elements)), each(per("store sectors", first.elements)),
        each(per("shuffles", first.call.rows)), each(per("barriers", first.call.rows)),
        each(lambda kernel: str(kernel.registers)), each(lambda kernel: f"{kernel.occupancy:.0%}"),
        *bounds, on_h200,
    ]  # fmt: skip


def rows_of(call: Call, capabilities: list[int], known: dict[tuple[str, Call], float]) -> list[list[str]]:
    """The rows of a call's kernels, with the loss before each name."""
    found = {capability: {kernel.name: kernel for kernel in run(call, capability)} for capability in capabilities}
    names = next(iter(found.values()))
    rows = [cells({capability: found[capability][name] for capability in capabilities}, known) for name in names]
    return [[f"{call.loss}: {name}", *rest] for name, *rest in rows]
