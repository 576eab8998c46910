"""The C++ core on CUDA tensors: USKD. :mod:`fused_kd.backends.native` calls this module."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fused_kd.backends import cuda_devices
from fused_kd.backends.native.boundary import DTYPES, RANKS, REDUCTIONS, address, incoming, matrix
from fused_kd.core.options import Options, pair_outputs
from fused_kd.reference import accumulation_dtype


def unavailable(core: Any, device: torch.device | str = "cuda") -> str | None:
    """Return why the compiled module cannot run tensors of this CUDA device, or None if it can."""
    if torch.version.hip:
        return "the CUDA kernels run on NVIDIA GPUs, and this PyTorch is built for AMD's"
    if core.cuda_missing:
        return str(core.cuda_missing)
    device = cuda_devices.resolved(device)
    return cuda_devices.missing(device) or _problem(core, device)


@cache
def _problem(core: Any, device: torch.device) -> str | None:
    with torch.cuda.device(device):  # the module checks the current device
        problem = core.cuda_problem()
    if not problem:
        return None
    where = cuda_devices.named(device)
    return f"the CUDA kernels, built for {core.cuda_architectures}, do not run on {where} or its driver: {problem}"


def _place(device: torch.device) -> tuple[int, int]:
    """Return the device and its current stream, which orders the reuse of memory by PyTorch's allocator."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


def uskd_batch_sums(core: Any, student: Tensor, target: Tensor, square: bool, ignore_index: int) -> Tensor:
    rows, num_classes = student.shape
    device = student.device
    sums = torch.empty(3, dtype=torch.float64, device=device)
    workspace = torch.empty(2 * rows, dtype=torch.float64, device=device)
    with cuda_devices.current(device):
        core.cuda_uskd_batch_sums(
            _place(device),
            matrix(student),
            matrix(target),
            (rows, num_classes),
            square,
            ignore_index,
            DTYPES[accumulation_dtype(student)],
            sums.data_ptr(),
            workspace.data_ptr(),
        )
    return sums


def uskd(
    core: Any,
    student: Tensor,
    weak: Tensor,
    target: Tensor,
    batch_sums: Tensor,
    factors: Tensor | None,
    options: Options,
) -> tuple[Tensor, ...]:
    device, dtype = student.device, accumulation_dtype(student, weak)
    results = pair_outputs(student, weak, options.wanted, 4, options.reduction, dtype)
    loss, parts, student_gradient, weak_gradient, student_norm, weak_norm = results
    with cuda_devices.current(device):
        place = _place(device)
        # Freed on return. The allocator reuses it only for later work on the same stream.
        bytes_needed = core.cuda_uskd_workspace(place[0], *student.shape, DTYPES[dtype])
        workspace = torch.empty(bytes_needed, dtype=torch.uint8, device=device)
        core.cuda_uskd(
            place,
            matrix(student),
            matrix(weak),
            matrix(target),
            student.shape,
            options.hyper,
            (RANKS[options.rank], options.square, options.ignore_index, REDUCTIONS[options.reduction]),
            batch_sums.data_ptr(),
            address(factors),
            ((student_gradient.data_ptr(), options.scales[0]), (weak_gradient.data_ptr(), options.scales[1])),
            (
                *(tensor.data_ptr() for tensor in (loss, parts, student_norm, weak_norm, workspace)),
                DTYPES[dtype],
            ),
        )
    return results


def scale_gradient(core: Any, gradient: Tensor, grad_output: Tensor, norm: Tensor, out: Tensor) -> None:
    device = gradient.device
    with cuda_devices.current(device):
        core.cuda_scale_gradient(
            _place(device),
            gradient.data_ptr(),
            out.data_ptr(),
            DTYPES[gradient.dtype],
            incoming(grad_output),
            norm.data_ptr(),
            DTYPES[norm.dtype],
            gradient.shape,
        )
