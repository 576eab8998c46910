"""The C++ core: passes pointers, sizes and strides to the compiled module.

This module is for CPU tensors, :mod:`fused_kd.backends.native.cuda` for CUDA tensors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_kd.backends.native import core, cuda, direct, staged
from fused_kd.backends.native.boundary import DTYPES, RANKS, REDUCTIONS, address, batch, incoming, matrix
from fused_kd.core.catalogue import NUMBERS, REST_NUMBERS
from fused_kd.core.options import Options, empty_gradient, outputs, pair_outputs
from fused_kd.core.row_errors import kept_error, row_error
from fused_kd.core.rows import TOPK_FIELDS, Piece, StageResults, TopKPiece
from fused_kd.reference import accumulation_dtype

_core: Any
_folder: Path | None
_failure: str | None
# torch must be imported first: the core uses the threads of the OpenMP runtime that PyTorch has loaded.
_core, _folder, _failure = core.find()

#: The instruction set of the kernels, one of ``instruction_sets()``. Tests set it to reach each build.
instruction_set: str = _core.instruction_sets()[0] if _core else ""
#: See :mod:`fused_kd.direct`; None if the core takes no whole calls.
direct_loss: Any
direct_scale: Any
direct_loss, direct_scale = (_core.direct_loss, _core.direct_scale) if direct.begin(_core) else (None, None)


def unavailable(device: torch.device | str) -> str | None:
    if _core is None:
        return _failure
    kind = torch.device(device).type
    if kind == "cuda":
        return cuda.unavailable(_core, device)
    return None if kind == "cpu" else f"the C++ core runs CPU and CUDA tensors, not {kind} tensors"


def instruction_sets() -> list[str]:
    """Return the builds of the kernels that this processor can run, best first."""
    return list(_core.instruction_sets()) if _core else []


def compiler() -> str:
    return str(_core.compiler) if _core else ""


def openmp_runtime() -> str:
    """Return the file of PyTorch's OpenMP runtime, which the core uses; "" if none is found: the core uses one
    thread."""
    return str(_core.openmp_runtime()) if _core else ""


def loaded_openmp_runtimes() -> list[str]:
    """Return the files of all OpenMP runtimes of this process, on Linux. Two of them compete for the cores."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/")}
    return sorted(path for path in found if re.match(r"lib(gomp|iomp5|omp\d*)\b", Path(path).name))


def folder() -> Path | None:
    """Return the folder of the compiled module. In a source folder it may come from an installation."""
    return _folder


def cuda_architectures() -> str:
    """Return the architectures of the CUDA kernels, or "" if these were not built."""
    return str(_core.cuda_architectures) if _core else ""


def _where() -> tuple[str, int]:
    return instruction_set, torch.get_num_threads()


def row_loss(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    factors: Tensor | None,
    column_factor: Tensor | None,
    options: Options,
) -> tuple[Tensor, ...]:
    other = student if teacher is None else teacher  # not read if the loss has no teacher
    dtype = accumulation_dtype(student, other)
    results = outputs(student, options.wanted[0], 3, options.reduction, dtype, options.in_place, options.padding)
    loss, parts, gradient, norm = results
    bad_row = _core.row_loss(
        batch(_where(), student, target, options.ignore_index, dtype),
        (options.hyper, address(factors)),
        matrix(other),
        NUMBERS[options.loss],
        options.standardize,
        address(column_factor),
        (gradient.data_ptr(), options.scales[0], options.padding),
        (REDUCTIONS[options.reduction], loss.data_ptr(), parts.data_ptr(), norm.data_ptr()),
    )
    if bad_row >= 0:
        raise row_error(target, bad_row, student.shape[1], options.ignore_index)
    return results


def row_stage(stage: str, piece: Piece, earlier: StageResults, options: Options, factors: Tensor | None) -> Any:
    """See :func:`fused_kd.backends.native.staged.row_stage`."""
    return staged.row_stage(_core, _where(), stage, piece, earlier, options, factors)


def uskd_batch_sums(student: Tensor, target: Tensor, square: bool, ignore_index: int) -> Tensor:
    if student.is_cuda:
        return cuda.uskd_batch_sums(_core, student, target, square, ignore_index)
    sums = student.new_empty(3, dtype=torch.float64)
    rows = batch(_where(), student, target, ignore_index, accumulation_dtype(student))
    bad_row = _core.uskd_batch_sums(rows, square, sums.data_ptr())
    if bad_row >= 0:
        raise row_error(target, bad_row, student.shape[1], ignore_index)
    return sums


def uskd(
    student: Tensor, weak: Tensor, target: Tensor, batch_sums: Tensor | None, factors: Tensor | None, options: Options
) -> tuple[Tensor, ...]:
    if batch_sums is None:
        batch_sums = uskd_batch_sums(student, target, options.square, options.ignore_index)
    if student.is_cuda:
        return cuda.uskd(_core, student, weak, target, batch_sums, factors, options)
    dtype = accumulation_dtype(student, weak)
    results = pair_outputs(student, weak, options.wanted, 4, options.reduction, dtype)
    loss, parts, student_gradient, weak_gradient, student_norm, weak_norm = results
    bad_row = _core.uskd(
        batch(_where(), student, target, options.ignore_index, dtype),
        (options.hyper, address(factors)),
        matrix(weak),
        RANKS[options.rank],
        options.square,
        batch_sums.data_ptr(),
        ((student_gradient.data_ptr(), options.scales[0]), (weak_gradient.data_ptr(), options.scales[1])),
        (
            REDUCTIONS[options.reduction], loss.data_ptr(), parts.data_ptr(), student_norm.data_ptr(),
            weak_norm.data_ptr(),
        ),
    )  # fmt: skip
    if bad_row >= 0:
        raise row_error(target, bad_row, student.shape[1], options.ignore_index)
    return results


def zipf_ls(
    student: Tensor, dense: Tensor, target: Tensor, factors: Tensor | None, options: Options
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(student)
    results = loss, parts, gradient, norm = outputs(student, options.wanted[0], 2, options.reduction, dtype)
    bad_row = _core.zipf_ls(
        batch(_where(), student, target, options.ignore_index, dtype),
        (options.hyper, address(factors)),
        (*matrix(dense), dense.shape[1]),
        (gradient.data_ptr(), options.scales[0]),
        (REDUCTIONS[options.reduction], loss.data_ptr(), parts.data_ptr(), norm.data_ptr()),
    )
    if bad_row >= 0:
        raise row_error(target, bad_row, student.shape[1], options.ignore_index)
    return results


def topk_loss(
    student: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    rest: str,
    target: Tensor,
    factors: Tensor | None,
    options: Options,
    piece: TopKPiece | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`fused_kd.backends.topk.row_loss`."""
    dtype, rows, want = accumulation_dtype(student, log_probs), student.shape[0], options.wanted[0]
    loss, parts = student.new_empty(rows, dtype=dtype), student.new_empty((3, rows), dtype=dtype)
    gradient = empty_gradient(student, options.padding) if want else None
    num_classes = student.shape[1] if piece is None else piece.num_classes

    def call(gradient: Tensor | None, columns: tuple[int, int, int, int] | None) -> None:
        bad_row = _core.topk_loss(
            batch(_where(), student, target, options.ignore_index, dtype),
            (options.hyper, address(factors)),
            (matrix(log_probs), matrix(indices), indices.shape[1], REST_NUMBERS[rest]),
            NUMBERS[options.loss],
            (address(gradient), options.scales[0], options.padding),
            (REDUCTIONS["none"], loss.data_ptr(), parts.data_ptr()),
            columns,
        )
        if bad_row >= rows:
            raise kept_error(indices, bad_row - rows, num_classes)
        if bad_row >= 0:
            raise row_error(target, bad_row, num_classes, options.ignore_index)

    if piece is None:
        call(gradient, None)
        return loss, parts, gradient
    own = student.new_zeros((TOPK_FIELDS + indices.shape[1], rows), dtype=torch.float64)
    call(None, (*piece[:2], 0, own.data_ptr()))
    every = piece.exchange([own])  # alive during the call
    call(gradient, (*piece[:2], every.data_ptr(), 0))
    return loss, parts, gradient


def argsort_descending(keys: Tensor) -> Tensor:
    """Rank contiguous float32 rows: indices from the largest to the smallest, stable."""
    order = torch.empty_like(keys, dtype=torch.int64)
    _core.argsort_descending(_where(), keys.data_ptr(), keys.shape, order.data_ptr())
    return order


def scale_gradient(gradient: Tensor, grad_output: Tensor, norm: Tensor, out: Tensor) -> None:
    """out = gradient * grad_output * norm, row by row; ``out`` may be ``gradient``."""
    if gradient.is_cuda:
        cuda.scale_gradient(_core, gradient, grad_output, norm, out)
        return
    _core.scale_gradient(
        _where(),
        gradient.data_ptr(),
        out.data_ptr(),
        DTYPES[gradient.dtype],
        incoming(grad_output),
        norm.item(),
        gradient.shape,
    )
