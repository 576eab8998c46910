"""Which calls the compile matrix covers.

A case is a call on meta tensors, planned by the very functions that dispatch a real one, so what is compiled is what
would run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_kd.backends import triton as backend
from fused_kd.backends import triton_uskd
from fused_kd.backends.triton import Launch
from fused_kd.backends.triton_compile import TYPES
from fused_kd.reference import accumulation_dtype
from fused_kd.registry import ROW_LOSSES


class Call(Protocol):
    """A call whose kernels are compiled; picklable, since other processes do that."""

    @property
    def element_bytes(self) -> int:
        """Of the widest logits."""

    def launches(self) -> list[Launch]:
        """Every launch of a kernel that the call makes."""


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _logits(rows: int, classes: int, dtype: torch.dtype, strided: bool) -> Tensor:
    return _empty(classes, rows, dtype=dtype).t() if strided else _empty(rows, classes, dtype=dtype)


def _describe(dtypes: tuple[torch.dtype, torch.dtype]) -> str:
    return "/".join(dict.fromkeys(TYPES[dtype] for dtype in dtypes))


class Case(NamedTuple):
    """A call of a row loss; ``student`` and ``teacher`` may differ in dtype, ``strided`` is the student."""

    student: torch.dtype
    teacher: torch.dtype
    classes: int
    temperature: float = 1.0
    probabilities: bool = False
    reduction: str = "mean"
    rows: int = 1024
    strided: bool = False
    loss: str = "nkd"
    smoothing: float = 0.0
    standardize: bool = False

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.classes}", _describe((self.student, self.teacher))]
        words += [*([self.loss] if self.loss != "nkd" else []), *(["smoothed"] if self.smoothing else [])]
        words += ["z-scores"] if self.standardize else []
        words += [*(["prob"] if self.probabilities else []), f"T={self.temperature:g}", self.reduction]
        return " ".join([*words, *(["strided"] if self.strided else [])])

    @property
    def element_bytes(self) -> int:
        return max(self.student.itemsize, self.teacher.itemsize)

    def launches(self) -> list[Launch]:
        """Every launch of the forward and of the backward op."""
        student = _logits(self.rows, self.classes, self.student, self.strided)
        teacher = _empty(self.rows, self.classes, dtype=self.teacher)
        acc = accumulation_dtype(student, teacher)
        shape = (self.rows,) if self.reduction == "none" else ()
        loss, norm = _empty(*shape, dtype=acc), _empty(dtype=acc)
        target = (
            _empty(self.rows, self.classes, dtype=self.student)
            if self.probabilities
            else _empty(self.rows, dtype=torch.int64)
        )
        weights = [0.5, 1.0, self.temperature, 1.0, self.smoothing]
        plan = backend.plan_row_loss(
            student, teacher, target, _empty(*student.shape, dtype=self.student), loss, _empty(3, *shape, dtype=acc),
            norm, self.loss, weights, self.standardize, -100, self.reduction, True, 1.0,
        )  # fmt: skip
        return [*plan, backend.plan_scale(student, loss, norm, student)]


class RankedCase(NamedTuple):
    """A call of USKD."""

    student: torch.dtype
    weak: torch.dtype
    classes: int
    rank: str = "normalized"
    probabilities: bool = False
    reduction: str = "mean"
    rows: int = 1024
    strided: bool = False

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.classes}", _describe((self.student, self.weak))]
        words += [*(["prob"] if self.probabilities else []), *([self.rank] if self.rank != "normalized" else [])]
        return " ".join([*words, self.reduction, *(["strided"] if self.strided else [])])

    @property
    def element_bytes(self) -> int:
        return max(self.student.itemsize, self.weak.itemsize)

    def launches(self) -> list[Launch]:
        """Every launch of a kernel, of the batch sums and of the forward op; the backward op is NKD's."""
        student = _logits(self.rows, self.classes, self.student, self.strided)
        weak = _empty(self.rows, self.classes, dtype=self.weak)
        acc = accumulation_dtype(student, weak)
        shape = (self.rows,) if self.reduction == "none" else ()
        target = (
            _empty(self.rows, self.classes, dtype=self.student)
            if self.probabilities
            else _empty(self.rows, dtype=torch.int64)
        )
        sums, norm = _empty(3, dtype=torch.float64), _empty(dtype=acc)
        gradients = _empty(*student.shape, dtype=self.student), _empty(*weak.shape, dtype=self.weak)
        plan = triton_uskd.plan_uskd(
            student, weak, target, sums, gradients, _empty(*shape, dtype=acc), _empty(4, *shape, dtype=acc),
            (norm, norm), 1.0, 0.1, 0.005, 1.0, self.rank, True, -100, self.reduction, True, True, 1.0, 1.0,
        )  # fmt: skip
        plan = [*triton_uskd.plan_batch_sums(student, target, sums, True, -100), *plan]
        return [launch for launch in plan if launch.kernel not in backend.HOST]


def cases(full: bool) -> Iterator[Case]:
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
        yield Case(bf16, bf16, 21841, 3.0, True, strided=True)
        return
    for student, teacher in ((bf16, bf16), (fp16, fp16), (fp32, fp32), (fp64, fp64), (bf16, fp32), (fp32, bf16)):
        for classes in (10, 100, 256, 1000, 1001, 2048, 4096, 8192, 21841, 128256):
            for temperature, probabilities in itertools.product((1.0, 3.0), (False, True)):
                case = Case(student, teacher, classes, temperature, probabilities)
                yield from (case, case._replace(reduction="none", rows=40000), case._replace(strided=True))
                yield case._replace(rows=40000)


def row_cases(full: bool) -> Iterator[Case]:
    """The same for the row losses beside NKD, and for the options that they share with it."""
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    losses = [loss for loss in ROW_LOSSES if loss != "nkd"]
    if not full:
        yield from (Case(bf16, bf16, classes, 4.0, loss=loss) for loss in losses for classes in (1000, 21841))
        yield from (Case(bf16, bf16, classes, 2.0, True, standardize=True) for classes in (1000, 21841))
        yield Case(fp32, fp32, 8192, 2.0, loss="wsld", smoothing=0.1, standardize=True)
        return
    for loss in (*losses, "nkd"):
        for dtype in (bf16, fp16, fp32, fp64):
            for classes in (100, 1000, 4096, 8192, 21841):
                for temperature, probabilities in ((1.0, False), (4.0, False), (4.0, True)):
                    case = Case(dtype, dtype, classes, temperature, probabilities, loss=loss)
                    yield from (case, case._replace(smoothing=0.1))
                    if loss != "tf_kd":
                        yield case._replace(smoothing=0.1, standardize=True)


def ranked_cases(full: bool) -> Iterator[RankedCase]:
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
                yield from (case, case._replace(reduction="none", strided=True))
                yield case._replace(rank="cls_kd", rows=40000)
    for rank in ("weak", "final", "sum"):
        yield from (RankedCase(bf16, bf16, classes, rank) for classes in (1000, 21841))


#: What has Triton kernels, NKD and the further row losses apart, with its calls: all of them, or a selection.
CASES: dict[str, Callable[[bool], Iterator[Call]]] = {"nkd": cases, "rows": row_cases, "uskd": ranked_cases}


def distinct(loss: str, full: bool) -> list[tuple[Call, int, Launch]]:
    """The kernels of a loss that differ in what the compiler sees: a call, which of its launches, and that launch. The
    count kernels and reductions of two calls are mostly the same."""
    found: dict[tuple[Any, ...], tuple[Call, int, Launch]] = {}
    for case in CASES[loss](full):
        for index, launch in enumerate(case.launches()):
            tensors = [str(argument.dtype) for argument in launch.arguments if isinstance(argument, Tensor)]
            found.setdefault((launch.kernel, str(launch.options), *tensors), (case, index, launch))
    return list(found.values())
