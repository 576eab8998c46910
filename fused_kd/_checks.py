"""Argument checks shared by the losses. Every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from fused_kd._transforms import carries_gradient, readable

_LOGIT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")


class Rows(NamedTuple):
    """Arguments flattened to rows: logits ``(N, C)``, target ``(N,)`` int64 or ``(N, C)``, and the target's shape."""

    student_logits: Tensor
    other_logits: Tensor
    target: Tensor
    shape: tuple[int, ...]


def check_scalar(name: str, value: float, *, positive: bool = False) -> float:
    """A finite hyper-parameter, at least 0, or above 0 when ``positive``; returned as a float."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Python number, got a Tensor (a float keeps the device free of a sync)")
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if positive:
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    elif not 0.0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    return value if isinstance(value, torch.SymFloat) else float(value)


def check_fraction(name: str, value: float) -> float:
    """A number from 0 to below 1; returned as a float."""
    value = check_scalar(name, value)
    if not value < 1.0:
        raise ValueError(f"{name}: expected a number from 0 to below 1, got {value}")
    return value


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_reduction(reduction: str) -> None:
    check_choice("reduction", reduction, REDUCTIONS)


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_ignore_index(ignore_index: int) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")


def _check_logits(name: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(logits).__name__}")
    if logits.dtype not in _LOGIT_DTYPES:
        raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16 logits, got {logits.dtype}")
    if logits.dim() == 0:
        raise ValueError(f"{name}: expected logits of shape (..., C), got a scalar")


def check_teacher_detached(teacher_logits: Tensor) -> None:
    if carries_gradient(teacher_logits):
        raise ValueError(
            "teacher_logits: expected logits that do not require grad, since no gradient flows to the teacher; "
            "run the teacher under torch.no_grad() or pass teacher_logits.detach()"
        )


def check_process_group(process_group: Any) -> None:
    """A group of an initialised torch.distributed, or None."""
    if process_group is None:
        return
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            "process_group: expected None while torch.distributed is not initialised, got "
            f"{type(process_group).__name__}; call torch.distributed.init_process_group first"
        )
    if not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(
            "process_group: expected torch.distributed.group.WORLD or another ProcessGroup that this process belongs "
            f"to, or None, got {type(process_group).__name__}"
        )


def flatten(student_logits: Tensor, other_logits: Tensor, other_name: str, target: Tensor) -> Rows:
    """Check logits ``(..., C)`` and their target, and view them as rows.

    Raises:
        TypeError: an argument is no Tensor or has a dtype that is not supported.
        ValueError: shapes or devices disagree, there are fewer than two classes, or a target requires grad.
    """
    _check_logits("student_logits", student_logits)
    _check_logits(other_name, other_logits)
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a Tensor, got {type(target).__name__}")
    shape = student_logits.shape
    num_classes = shape[-1]
    if num_classes < 2:
        raise ValueError(f"student_logits: expected at least 2 classes in the last dimension, got shape {tuple(shape)}")
    if other_logits.shape != shape:
        raise ValueError(
            f"{other_name}: expected the shape of student_logits, {tuple(shape)}, got {tuple(other_logits.shape)}"
        )
    device = student_logits.device
    for name, tensor in ((other_name, other_logits), ("target", target)):
        if tensor.device != device:
            raise ValueError(f"{name}: expected the device of student_logits, {device}, got {tensor.device}")
    if target.dtype in _INDEX_DTYPES:
        if target.shape != shape[:-1]:
            # (N, 1) indices are common in data loaders; published code reads them as soft labels of class 0.
            if target.shape != (*shape[:-1], 1):
                raise ValueError(
                    f"target: expected class indices of shape {tuple(shape[:-1])} for logits of shape {tuple(shape)}, "
                    f"got {tuple(target.shape)}"
                )
            target = target.squeeze(-1)
        if target.dtype != torch.int64:
            target = target.to(torch.int64)
    elif target.dtype in _LOGIT_DTYPES:
        if target.shape != shape:
            raise ValueError(
                f"target: expected class probabilities of shape {tuple(shape)}, got {target.dtype} of shape "
                f"{tuple(target.shape)} (class indices are integers)"
            )
        if carries_gradient(target):
            raise ValueError("target: expected probabilities that do not require grad; pass target.detach()")
    else:
        raise TypeError(f"target: expected integer class indices or floating-point probabilities, got {target.dtype}")
    if len(shape) == 2:
        return Rows(student_logits, other_logits, target, shape[:-1])
    target = target.reshape(-1, num_classes) if target.is_floating_point() else target.reshape(-1)
    return Rows(student_logits.reshape(-1, num_classes), other_logits.reshape(-1, num_classes), target, shape[:-1])


def flatten_dense(dense_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Logits of the positions ``(..., P, C)``, viewed as ``(N, P, C)``."""
    _check_logits("dense_logits", dense_logits)
    shape, wanted = dense_logits.shape, student_logits.shape
    if len(shape) != len(wanted) + 1 or shape[:-2] != wanted[:-1] or shape[-1] != wanted[-1] or shape[-2] == 0:
        expected = ", ".join(map(str, (*wanted[:-1], "P", wanted[-1])))
        raise ValueError(f"dense_logits: expected shape ({expected}) with P at least 1, got {tuple(shape)}")
    if dense_logits.device != student_logits.device:
        raise ValueError(
            f"dense_logits: expected the device of student_logits, {student_logits.device}, got {dense_logits.device}"
        )
    return dense_logits if len(shape) == 3 else dense_logits.reshape(-1, *shape[-2:])


def flatten_weight(weight: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """A weight per row, of the rows' shape ``(...)``, viewed as ``(N,)``.

    Raises:
        TypeError: it is no Tensor, or not of floating point.
        ValueError: its shape or device is another, it requires grad, or on the CPU one is negative or not finite.
    """
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a Tensor with one weight per row, or None, got {type(weight).__name__}")
    if weight.dtype not in _LOGIT_DTYPES:
        raise TypeError(f"weight: expected float64, float32, float16 or bfloat16 weights, got {weight.dtype}")
    if weight.shape != shape:
        raise ValueError(f"weight: expected one per row, of shape {tuple(shape)}, got {tuple(weight.shape)}")
    if weight.device != device:
        raise ValueError(f"weight: expected the device of student_logits, {device}, got {weight.device}")
    if carries_gradient(weight):
        raise ValueError("weight: expected weights that do not require grad, since none flows there; detach them")
    if readable(weight):
        bad = ~((weight >= 0) & (weight < math.inf))
        if bool(bad.any()):
            raise ValueError(f"weight: expected finite numbers of at least 0, got {float(weight[bad][0])}")
    return weight.reshape(-1)


def index_error(target: int, num_classes: int, ignore_index: int) -> IndexError:
    return IndexError(
        f"target: expected class indices from 0 to {num_classes - 1}, or ignore_index {ignore_index}, got {target}"
    )


def check_index_range(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise an IndexError for a class index out of range. Reads the values, so it is for CPU tensors only."""
    bad = (target != ignore_index) & ((target < 0) | (target >= num_classes))
    if bool(bad.any()):
        raise index_error(int(target[bad.to(torch.uint8).argmax()]), num_classes, ignore_index)
