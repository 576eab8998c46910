"""How tensors and options cross to C++: as csrc/python/boundary.h has them."""

from __future__ import annotations

import torch
from torch import Tensor

#: (address, dtype, strides in elements)
Matrix = tuple[int, int, tuple[int, ...]]
#: (where, student, target, shape, ignore_index, dtype in which is accumulated)
Batch = tuple[tuple[str, int], Matrix, Matrix, torch.Size, int, int]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
RANKS = {"normalized": 0, "cls_kd": 1, "weak": 2, "final": 3, "sum": 4}


def matrix(tensor: Tensor) -> Matrix:
    return tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride()


def batch(where: tuple[str, int], student: Tensor, target: Tensor, ignore_index: int, dtype: torch.dtype) -> Batch:
    """What every kernel of a loss is told of its rows; ``where`` is the instruction set and the threads."""
    return where, matrix(student), matrix(target), student.shape, ignore_index, DTYPES[dtype]


def incoming(grad_output: Tensor) -> Matrix:
    """What comes in for every row, or a number for all of them, which has a stride of 0."""
    return grad_output.data_ptr(), DTYPES[grad_output.dtype], grad_output.stride() or (0,)


def address(tensor: Tensor | None) -> int:
    """0 where there is none, or nothing in it."""
    return 0 if tensor is None else tensor.data_ptr()
