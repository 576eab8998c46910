"""Compiles the kernels for GPUs that are not there, and reads the compiler's own report.

A case is a call on meta tensors, planned by the very functions that dispatch a real one, so what is compiled is what
would run. Needs Triton, no GPU, and a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_kd.backends import triton as backend
from fused_kd.backends import triton_uskd
from fused_kd.backends.triton import Launch
from fused_kd.reference import accumulation_dtype

#: Shared memory a block can have, by compute capability, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Report(NamedTuple):
    """What the compiler made of a kernel. ``stack`` is the local memory of a thread: 0 means that nothing spills.

    ``loads`` and ``stores`` count the instructions on global memory by bytes per thread.
    """

    registers: int
    stack: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]


class Case(NamedTuple):
    """A call whose kernels are compiled; ``student`` and ``teacher`` may differ in dtype."""

    student: torch.dtype
    teacher: torch.dtype
    classes: int
    temperature: float = 1.0
    probabilities: bool = False
    reduction: str = "mean"
    rows: int = 1024
    transposed: bool = False

    def __str__(self) -> str:
        dtypes = "/".join(dict.fromkeys((_TYPES[self.student], _TYPES[self.teacher])))
        target = "probabilities" if self.probabilities else "indices"
        return f"{self.rows}x{self.classes} {dtypes} {target} T={self.temperature:g} {self.reduction}" + (
            " transposed" if self.transposed else ""
        )

    def launches(self) -> list[Launch]:
        """Every launch of the forward and of the backward op."""

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        student = empty(self.rows, self.classes, dtype=self.student)
        if self.transposed:
            student = empty(self.classes, self.rows, dtype=self.student).t()
        teacher = empty(self.rows, self.classes, dtype=self.teacher)
        acc = accumulation_dtype(student, teacher)
        shape = (self.rows,) if self.reduction == "none" else ()
        loss, norm = empty(*shape, dtype=acc), empty(dtype=acc)
        target = (
            empty(self.rows, self.classes, dtype=self.student)
            if self.probabilities
            else empty(self.rows, dtype=torch.int64)
        )
        plan = backend.plan_nkd(
            student, teacher, target, empty(*student.shape, dtype=self.student), loss,
            empty(3, *shape, dtype=acc), norm, 1.5, self.temperature, 1.0, -100, self.reduction, True, 1.0,
        )  # fmt: skip
        return [*plan, backend.plan_scale(student, loss, norm, student)]


class RankedCase(NamedTuple):
    """A call of USKD whose kernels are compiled."""

    student: torch.dtype
    weak: torch.dtype
    classes: int
    rank: str = "normalized"
    probabilities: bool = False
    reduction: str = "mean"
    rows: int = 1024
    transposed: bool = False

    def __str__(self) -> str:
        dtypes = "/".join(dict.fromkeys((_TYPES[self.student], _TYPES[self.weak])))
        target = "probabilities" if self.probabilities else "indices"
        return f"{self.rows}x{self.classes} {dtypes} {target} {self.rank} {self.reduction}" + (
            " transposed" if self.transposed else ""
        )

    def launches(self) -> list[Launch]:
        """Every launch of a kernel, of the batch sums and of the forward op; the backward op is NKD's."""

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        student = empty(self.rows, self.classes, dtype=self.student)
        if self.transposed:
            student = empty(self.classes, self.rows, dtype=self.student).t()
        weak = empty(self.rows, self.classes, dtype=self.weak)
        acc = accumulation_dtype(student, weak)
        shape = (self.rows,) if self.reduction == "none" else ()
        target = (
            empty(self.rows, self.classes, dtype=self.student)
            if self.probabilities
            else empty(self.rows, dtype=torch.int64)
        )
        sums, norm = empty(3, dtype=torch.float64), empty(dtype=acc)
        gradients = empty(*student.shape, dtype=self.student), empty(*weak.shape, dtype=self.weak)
        plan = triton_uskd.plan_uskd(
            student, weak, target, sums, gradients, empty(*shape, dtype=acc), empty(4, *shape, dtype=acc), (norm, norm),
            1.0, 0.1, 0.005, 1.0, self.rank, True, -100, self.reduction, True, True, 1.0, 1.0,
        )  # fmt: skip
        plan = [*triton_uskd.plan_batch_sums(student, target, sums, True, -100), *plan]
        return [launch for launch in plan if launch.kernel not in backend.HOST]


def compile_launch(launch: Launch, capability: int) -> Report:
    """Compile a planned launch for a compute capability (90 for 9.0) as Triton would at its first call."""
    function = backend._kernels()[launch.kernel]
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], Any] = {}
    arguments = iter(launch.arguments)
    for parameter in function.params:
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            continue
        argument = next(arguments)
        if isinstance(argument, Tensor):
            signature[parameter.name] = "*" + _TYPES[argument.dtype]
            if argument.data_ptr() % 16 == 0:  # as the JIT specialises; meta tensors count as aligned
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type
    options = dict(launch.options)
    compiler_options = {name: options.pop(name) for name in ("num_warps", "maxnreg") if name in options}
    source = ASTSource(function, signature, options, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=compiler_options)
    registers, stack = _resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return Report(registers, stack, kernel.metadata.shared, _widths("ld", ptx), _widths("st", ptx))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread, from the machine code's own header."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(_TOOLS / "cuobjdump"), "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected a line of resource usage, got {text!r}")
    return int(found[1]), int(found[2])


def _widths(instruction: str, ptx: str) -> dict[int, int]:
    pattern = rf"\b{instruction}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)\b"
    return dict(sorted(Counter(int(n or 1) * int(bits) // 8 for n, bits in re.findall(pattern, ptx)).items()))


def cases(*, full: bool) -> Iterator[Case]:
    """Calls that reach every row of the dispatch table: a selection that covers each regime, or every combination."""
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    if not full:
        yield from (Case(bf16, bf16, classes) for classes in (100, 1000, 2048, 4096, 8192, 21841, 128256))
        yield from (Case(fp32, fp32, classes) for classes in (1000, 8192, 21841))
        yield from (Case(bf16, bf16, classes, 3.0, True, "none") for classes in (1000, 4096, 21841))
        yield Case(fp64, fp64, 2048, 3.0, True)
        yield Case(fp64, fp64, 128256, 3.0, True)
        yield Case(bf16, fp32, 21841, 3.0)
        yield Case(fp16, fp16, 1000, rows=40000)
        yield Case(bf16, bf16, 21841, 3.0, True, transposed=True)
        return
    for student, teacher in ((bf16, bf16), (fp16, fp16), (fp32, fp32), (fp64, fp64), (bf16, fp32), (fp32, bf16)):
        for classes in (10, 100, 256, 1000, 1001, 2048, 4096, 8192, 21841, 128256):
            for temperature, probabilities in itertools.product((1.0, 3.0), (False, True)):
                case = Case(student, teacher, classes, temperature, probabilities)
                yield from (case, case._replace(reduction="none", rows=40000), case._replace(transposed=True))


def ranked_cases(*, full: bool) -> Iterator[RankedCase]:
    """The same for USKD."""
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    if not full:
        yield from (RankedCase(bf16, bf16, classes) for classes in (100, 1000, 21841))
        yield RankedCase(fp16, fp32, 4096, "cls_kd", True)
        yield RankedCase(fp32, fp32, 21841, "sum", True, "none")
        yield RankedCase(fp64, fp64, 2048, "cls_kd", True)
        return
    for student, weak in ((bf16, bf16), (fp16, fp16), (fp32, fp32), (fp64, fp64), (bf16, fp32), (fp32, fp16)):
        for classes in (10, 100, 1000, 1001, 2048, 4096, 21841):
            for probabilities in (False, True):
                case = RankedCase(student, weak, classes, "normalized", probabilities)
                yield from (case, case._replace(reduction="none", transposed=True))
                yield case._replace(rank="cls_kd", rows=40000)
    for rank in ("weak", "final", "sum"):
        yield from (RankedCase(bf16, bf16, classes, rank) for classes in (1000, 21841))
