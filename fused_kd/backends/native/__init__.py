"""The C++ core: hands pointers, sizes and strides to the compiled module.

CPU tensors here; CUDA tensors in :mod:`fused_kd.backends.native.cuda`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_kd.backends.native import core, cuda
from fused_kd.core import checks
from fused_kd.core.catalogue import ROW_LOSSES
from fused_kd.reference import accumulation_dtype

_core: Any
_folder: Path | None
_failure: str | None
# torch is imported first: the core uses the OpenMP runtime that PyTorch has loaded, and its threads.
_core, _folder, _failure = core.find()

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4}
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
_RANKS = {"normalized": 0, "cls_kd": 1, "weak": 2, "final": 3, "sum": 4}

#: The instruction set whose kernels run: one of ``instruction_sets()``. Tests set it to reach each build.
instruction_set: str = _core.instruction_sets()[0] if _core else ""


def unavailable(device: torch.device | str) -> str | None:
    if _core is None:
        return _failure
    kind = torch.device(device).type
    if kind == "cuda":
        return cuda.unavailable(_core, device)
    return None if kind == "cpu" else f"the C++ core runs CPU and CUDA tensors, not {kind} tensors"


def instruction_sets() -> list[str]:
    """The builds of the kernels that this processor can run, best first."""
    return list(_core.instruction_sets()) if _core else []


def compiler() -> str:
    return str(_core.compiler) if _core else ""


def openmp_runtime() -> str:
    """The file of the OpenMP runtime whose threads the core uses, PyTorch's; "" where it finds none and uses one."""
    return str(_core.openmp_runtime()) if _core else ""


def loaded_openmp_runtimes() -> list[str]:
    """The files of all that this process has loaded, as Linux tells. Two of them compete for the cores."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/")}
    return sorted(path for path in found if re.match(r"lib(gomp|iomp5|omp\d*)\b", Path(path).name))


def folder() -> Path | None:
    """Where the compiled module is: in a source folder it may be that of an installation."""
    return _folder


def cuda_architectures() -> str:
    """Those that the CUDA kernels were built for, or "" where they were left out."""
    return str(_core.cuda_architectures) if _core else ""


def row_loss(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    factors: Tensor | None,
    loss_name: str,
    weights: list[float],
    standardize: bool,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
    gradient_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, num_classes = student.shape
    other = student if teacher is None else teacher  # not read where the loss has no teacher
    dtype = accumulation_dtype(student, other)
    shape = (rows,) if reduction == "none" else ()
    loss = torch.empty(shape, dtype=dtype)
    parts = torch.empty((3, *shape), dtype=dtype)
    gradient = torch.empty((rows, num_classes) if need_gradient else (0,), dtype=student.dtype)
    norm = torch.empty((), dtype=dtype)
    bad_row = _core.row_loss(
        instruction_set,
        student.data_ptr(),
        _DTYPES[student.dtype],
        student.stride(),
        other.data_ptr(),
        _DTYPES[other.dtype],
        other.stride(),
        target.data_ptr(),
        _DTYPES[target.dtype],
        target.stride(),
        0 if factors is None else factors.data_ptr(),
        gradient.data_ptr() if need_gradient else 0,
        loss.data_ptr(),
        parts.data_ptr(),
        norm.data_ptr(),
        _DTYPES[dtype],
        rows,
        num_classes,
        ROW_LOSSES[loss_name].kind,
        weights,
        standardize,
        ignore_index,
        _REDUCTIONS[reduction],
        gradient_scale,
        torch.get_num_threads(),
    )
    if bad_row >= 0:
        raise checks.row_error(target, bad_row, num_classes, ignore_index)
    return loss, parts, gradient, norm


def uskd_batch_sums(student: Tensor, target: Tensor, square: bool, ignore_index: int) -> Tensor:
    if student.is_cuda:
        return cuda.uskd_batch_sums(_core, student, target, square, ignore_index)
    rows, num_classes = student.shape
    sums = torch.empty(3, dtype=torch.float64)
    bad_row = _core.uskd_batch_sums(
        instruction_set,
        student.data_ptr(),
        _DTYPES[student.dtype],
        student.stride(),
        target.data_ptr(),
        _DTYPES[target.dtype],
        target.stride(),
        sums.data_ptr(),
        _DTYPES[accumulation_dtype(student)],
        rows,
        num_classes,
        square,
        ignore_index,
        torch.get_num_threads(),
    )
    if bad_row >= 0:
        raise checks.row_error(target, bad_row, num_classes, ignore_index)
    return sums


def uskd(
    student: Tensor,
    weak: Tensor,
    target: Tensor,
    batch_sums: Tensor,
    factors: Tensor | None,
    weights: list[float],
    rank: str,
    square: bool,
    ignore_index: int,
    reduction: str,
    need_student: bool,
    need_weak: bool,
    student_scale: float,
    weak_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if student.is_cuda:
        return cuda.uskd(
            _core, student, weak, target, batch_sums, factors, weights, rank, square, ignore_index, reduction,
            need_student, need_weak, student_scale, weak_scale,
        )  # fmt: skip
    rows, num_classes = student.shape
    dtype = accumulation_dtype(student, weak)
    shape = (rows,) if reduction == "none" else ()
    loss = torch.empty(shape, dtype=dtype)
    parts = torch.empty((4, *shape), dtype=dtype)
    student_gradient = torch.empty((rows, num_classes) if need_student else (0,), dtype=student.dtype)
    weak_gradient = torch.empty((rows, num_classes) if need_weak else (0,), dtype=weak.dtype)
    student_norm, weak_norm = torch.empty((), dtype=dtype), torch.empty((), dtype=dtype)
    bad_row = _core.uskd(
        instruction_set,
        student.data_ptr(),
        _DTYPES[student.dtype],
        student.stride(),
        weak.data_ptr(),
        _DTYPES[weak.dtype],
        weak.stride(),
        target.data_ptr(),
        _DTYPES[target.dtype],
        target.stride(),
        batch_sums.data_ptr(),
        0 if factors is None else factors.data_ptr(),
        student_gradient.data_ptr() if need_student else 0,
        weak_gradient.data_ptr() if need_weak else 0,
        loss.data_ptr(),
        parts.data_ptr(),
        student_norm.data_ptr(),
        weak_norm.data_ptr(),
        _DTYPES[dtype],
        rows,
        num_classes,
        weights,
        _RANKS[rank],
        square,
        ignore_index,
        _REDUCTIONS[reduction],
        student_scale,
        weak_scale,
        torch.get_num_threads(),
    )
    if bad_row >= 0:
        raise checks.row_error(target, bad_row, num_classes, ignore_index)
    return loss, parts, student_gradient, weak_gradient, student_norm, weak_norm


def zipf_ls(
    student: Tensor,
    dense: Tensor,
    target: Tensor,
    factors: Tensor | None,
    weights: list[float],
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
    gradient_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, num_classes = student.shape
    dtype = accumulation_dtype(student)
    shape = (rows,) if reduction == "none" else ()
    loss = torch.empty(shape, dtype=dtype)
    parts = torch.empty((2, *shape), dtype=dtype)
    gradient = torch.empty((rows, num_classes) if need_gradient else (0,), dtype=student.dtype)
    norm = torch.empty((), dtype=dtype)
    bad_row = _core.zipf_ls(
        instruction_set,
        student.data_ptr(),
        _DTYPES[student.dtype],
        student.stride(),
        dense.data_ptr(),
        _DTYPES[dense.dtype],
        dense.stride(),
        dense.shape[1],
        target.data_ptr(),
        _DTYPES[target.dtype],
        target.stride(),
        0 if factors is None else factors.data_ptr(),
        gradient.data_ptr() if need_gradient else 0,
        loss.data_ptr(),
        parts.data_ptr(),
        norm.data_ptr(),
        _DTYPES[dtype],
        rows,
        num_classes,
        weights,
        ignore_index,
        _REDUCTIONS[reduction],
        gradient_scale,
        torch.get_num_threads(),
    )
    if bad_row >= 0:
        raise checks.row_error(target, bad_row, num_classes, ignore_index)
    return loss, parts, gradient, norm


def argsort_descending(keys: Tensor) -> Tensor:
    """The ranking alone, of contiguous float32 rows: indices from the largest to the smallest, stable."""
    order = torch.empty(keys.shape, dtype=torch.int64)
    _core.argsort_descending(instruction_set, keys.data_ptr(), *keys.shape, order.data_ptr(), torch.get_num_threads())
    return order


def scale_gradient(gradient: Tensor, grad_output: Tensor, norm: Tensor, out: Tensor) -> None:
    """out = gradient * grad_output * norm, row by row; ``out`` may be ``gradient``."""
    if gradient.is_cuda:
        cuda.scale_gradient(_core, gradient, grad_output, norm, out)
        return
    rows, num_classes = gradient.shape
    _core.scale_gradient(
        instruction_set,
        gradient.data_ptr(),
        out.data_ptr(),
        _DTYPES[gradient.dtype],
        grad_output.data_ptr(),
        _DTYPES[grad_output.dtype],
        grad_output.stride(0) if grad_output.dim() else 0,
        norm.item(),
        rows,
        num_classes,
        torch.get_num_threads(),
    )
