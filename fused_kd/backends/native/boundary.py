"""The form in which tensors and options cross to C++: see csrc/python/boundary.h."""

from __future__ import annotations

import torch
from torch import Tensor

#: (address, dtype, strides in elements)
Matrix = tuple[int, int, tuple[int, ...]]
#: (where, student, target, shape, ignore_index, accumulation dtype)
Batch = tuple[tuple[str, int], Matrix, Matrix, torch.Size, int, int]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
RANKS = {"normalized": 0, "cls_kd": 1, "weak": 2, "final": 3, "sum": 4}


def matrix(tensor: Tensor) -> Matrix:
    data = tensor.data_ptr()
    if data == 0 and tensor.numel() > 0:
        raise RuntimeError(
            f"fused_kd: expected tensors in memory, got one of shape {tuple(tensor.shape)} whose storage is empty, as "
            "resize_(0) leaves it, or FSDP outside of the module's forward and backward pass"
        )
    return data, DTYPES[tensor.dtype], tensor.stride()


def batch(where: tuple[str, int], student: Tensor, target: Tensor, ignore_index: int, dtype: torch.dtype) -> Batch:
    """Return the rows' arguments for every kernel of a loss. ``where`` is the instruction set and the threads."""
    return where, matrix(student), matrix(target), student.shape, ignore_index, DTYPES[dtype]


def incoming(grad_output: Tensor) -> Matrix:
    """Return the incoming gradient: one per row, or one for all rows with a stride of 0."""
    return grad_output.data_ptr(), DTYPES[grad_output.dtype], grad_output.stride() or (0,)


def address(tensor: Tensor | None) -> int:
    """Return a tensor's address, or 0 if it is None or empty."""
    return 0 if tensor is None else tensor.data_ptr()
