"""Argument checks shared by the losses. Every message names the argument, what was expected and what was given."""

from __future__ import annotations

import math
import sys
from numbers import Rational, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from fused_kd.core.transforms import carries_gradient, readable

_LOGIT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES = tuple(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))
REDUCTIONS = ("mean", "sum", "none")
_ONE_HOT = "; class probabilities must be floating point: target.float()"


class Rows(NamedTuple):
    """Arguments flattened to rows: logits ``(N, C)``, target ``(N,)`` int64 or ``(N, C)``.

    ``shape`` is the shape of the rows before flattening, which class indices have too. ``other_logits`` are the
    teacher's or the weak logits, the dense ones ``(N, P, C)`` of Zipf's label smoothing, or None.
    """

    student_logits: Tensor
    other_logits: Tensor | None
    target: Tensor
    shape: tuple[int, ...]


def check_scalar(name: str, value: float, *, positive: bool = False) -> float:
    """Check a finite hyper-parameter, at least 0, or above 0 if ``positive``. Return it as a float."""
    if isinstance(value, Tensor):
        given = f" of shape {tuple(value.shape)}" if value.dim() else f"; pass {name}.item()"
        learned = "; it cannot be learned, as no gradient flows to it" if value.requires_grad else ""
        raise TypeError(f"{name}: expected a Python number, got a Tensor{given}{learned}")
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt, Real)):
        given = type(value).__name__
        of_numpy = "; torch.compile takes NumPy's numbers for arrays: pass a float" if given == "ndarray" else ""
        raise TypeError(f"{name}: expected a number, got {given}{of_numpy}")
    wanted = "a finite number above 0" if positive else "a finite number of at least 0"
    # float() would raise too, but torch.compile takes that error for one of its own.
    if isinstance(value, Rational) and not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name}: expected {wanted}, got one that no float can hold")
    number = value if isinstance(value, torch.SymFloat) else float(value)
    if not 0.0 <= number < math.inf or (positive and number == 0.0):
        raise ValueError(f"{name}: expected {wanted}, got {number}")
    return number


def check_fraction(name: str, value: float) -> float:
    """Check a number from 0 to below 1. Return it as a float."""
    value = check_scalar(name, value)
    if not value < 1.0:
        raise ValueError(f"{name}: expected a number from 0 to below 1, got {value}")
    return value


def check_share(name: str, value: float) -> float:
    """Check a number from 0 to 1. Return it as a float."""
    value = check_scalar(name, value)
    if value > 1.0:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")
    return value


def check_count(name: str, value: int, least: int) -> None:
    check_index(name, value)
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_num_classes(name: str, value: int | None, most: int | None = None, of: str = "") -> None:
    if value is not None:
        check_count(name, value, 2)
        if most is not None and value > most:
            raise ValueError(f"{name}: expected at most the {most} classes of {of}, got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        given = repr(value) if isinstance(value, str) else type(value).__name__  # not all numbers of a Tensor
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {given}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_index(name: str, value: int, wanted: str = "an int") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected {wanted} of 64 bits, got {value}")


def is_dtensor(value: Any) -> bool:
    if value is None or type(value) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # a DTensor exists only after this import
    return module is not None and isinstance(value, module.DTensor)


def check_tensor(name: str, value: Any, wanted: str = "a Tensor") -> Tensor:
    """Check that a value is a strided Tensor in the memory of this process."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")
    if is_dtensor(value):
        raise TypeError(
            f"{name}: expected {wanted} that is no DTensor, got one; pass its to_local(), for what this process has, "
            "or its full_tensor()"
        )
    if value.is_nested:
        raise TypeError(f"{name}: expected {wanted}, got a nested one; pad it, and let ignore_index or weight mask it")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected {wanted} of layout torch.strided, got {value.layout}; pass its to_dense()")
    return value


def check_logits(name: str, logits: Tensor | None) -> Tensor:
    logits = check_tensor(name, logits)
    if logits.dtype not in _LOGIT_DTYPES:
        raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16 logits, got {logits.dtype}")
    if logits.dim() == 0:
        raise ValueError(f"{name}: expected logits of shape (..., C), got a scalar")
    return logits


def check_teacher_detached(teacher_logits: Tensor | None, student_logits: Tensor) -> None:
    if teacher_logits is not None and carries_gradient(teacher_logits):
        swapped = "" if carries_gradient(student_logits) else ", while student_logits do not: are the two swapped?"
        raise ValueError(
            "teacher_logits: expected logits that do not require grad, since no backend gives the teacher a gradient; "
            f"got some that do{swapped or '.'} Run the teacher under torch.no_grad() or pass teacher_logits.detach(). "
            "If part of the teacher must learn, such as a temperature that is a parameter, do not detach, since that "
            "stops its gradient: write that loss in PyTorch"
        )


def check_process_group(name: str, value: Any) -> None:
    """Check for None, or a group of an initialised torch.distributed."""
    if value is None:
        return
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            f"{name}: expected None while torch.distributed is not initialised, got {type(value).__name__}; call "
            "torch.distributed.init_process_group first"
        )
    if not isinstance(value, distributed.ProcessGroup):
        raise TypeError(
            f"{name}: expected torch.distributed.group.WORLD or another ProcessGroup that this process belongs to, or "
            f"None, got {type(value).__name__}"
        )


def check_class_dim(name: str, value: int | None) -> None:
    if value is not None:
        check_index(name, value, "an int or None")


def class_dimension(student_logits: Tensor, class_dim: int | None, target: Tensor | None = None) -> int:
    """Return the dimension of the classes, from 0: ``class_dim``, or the last one if it is None.

    Raises:
        TypeError: ``class_dim`` is no int.
        ValueError: The logits have no such dimension, or ``class_dim`` is None for four or more dimensions.
    """
    dims = student_logits.dim()
    if class_dim is None:
        if dims < 4:
            return dims - 1
        shape = tuple(student_logits.shape)
        raise ValueError(
            f"class_dim: expected the dimension of the classes, which logits of four or more dimensions need: "
            f"class_dim=1 for (N, C, H, W), as in F.cross_entropy, class_dim=-1 for (N, H, W, C); got None for "
            f"student_logits of shape {shape}{_fits(shape, target)}"
        )
    check_class_dim("class_dim", class_dim)
    if not -dims <= class_dim < dims:
        raise ValueError(
            f"class_dim: expected from {-dims} to {dims - 1} for student_logits of shape "
            f"{tuple(student_logits.shape)}, got {class_dim}"
        )
    return class_dim % dims


def padding_hint(student: tuple[int, ...], teacher: tuple[int, ...], dim: int) -> str:
    """Return the end of a message: what to do if logits differ in nothing but the number of classes."""
    alike = len(student) == len(teacher) and rows_shape(student, dim) == rows_shape(teacher, dim)
    return "; if the last classes are padding, leave them out with a slice or num_classes" if alike else ""


def rows_shape(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """Return the shape of the rows of logits: ``shape`` without the dimension ``dim`` of the classes."""
    return (*shape[:dim], *shape[dim + 1 :])


def as_rows(logits: Tensor, dim: int) -> Tensor:
    """View logits with their classes in ``dim`` as (N, C), or copy them if the classes are not innermost in memory."""
    if logits.dim() == 2 and dim == 1:
        return logits  # a view would cost a backward pass of its own
    shape = logits.shape
    return logits.movedim(dim, -1).reshape(math.prod(rows_shape(shape, dim)), shape[dim])  # -1 fails without classes


def _fits(shape: tuple[int, ...], given: Any, name: str = "target") -> str:
    """Return the end of a message: the ``class_dim`` that fits class indices, or a weight per row, if any does."""
    wanted = tuple(given.shape) if isinstance(given, Tensor) and len(shape) >= 3 else None
    fitting = [
        dim
        for dim in range(len(shape))
        if wanted == rows_shape(shape, dim)
        or (name == "target" and wanted == (*shape[:dim], 1, *shape[dim + 1 :]))  # indices may keep a dimension of 1
    ]
    return f"; the {name}'s shape {wanted} fits class_dim={' or '.join(map(str, fitting))}" if fitting else ""


def flatten(
    student_logits: Tensor,
    other_logits: Tensor | None,
    other_name: str | None,
    target: Tensor | None,
    class_dim: int | None = None,
    labels: bool = True,
) -> Rows:
    """Check logits and their target, and view them as rows. This copies if the classes are not innermost in memory.

    Without ``labels`` the target may be None, and every row gets class 0. Without an ``other_name`` there are no other
    logits.

    Raises:
        TypeError: An argument is no Tensor or has an unsupported dtype.
        ValueError: Shapes or devices disagree, there are fewer than two classes, or a target requires grad.
    """
    check_logits("student_logits", student_logits)
    other = None if other_name is None else check_logits(other_name, other_logits)
    if labels or target is not None:
        check_tensor("target", target)
    shape = student_logits.shape
    dim = class_dimension(student_logits, class_dim, target)
    num_classes, rows = shape[dim], rows_shape(shape, dim)
    if num_classes < 2:
        where = "the last dimension" if dim == len(shape) - 1 else f"dimension {dim}"
        raise ValueError(f"student_logits: expected at least 2 classes in {where}, got shape {tuple(shape)}")
    if other is not None and other.shape != shape:
        padded = padding_hint(tuple(shape), tuple(other.shape), dim) if other_name == "teacher_logits" else ""
        raise ValueError(
            f"{other_name}: expected the shape of student_logits, {tuple(shape)}, got {tuple(other.shape)}{padded}"
        )
    device = student_logits.device
    if other is not None and other.device != device:
        raise ValueError(f"{other_name}: expected the device of student_logits, {device}, got {other.device}")
    if target is None:
        target = torch.zeros(rows, dtype=torch.int64, device=device)
    else:
        target = check_target(target, tuple(shape), dim, device)
    if len(shape) == 2 and dim == 1:
        return Rows(student_logits, other, target, rows)
    student = as_rows(student_logits, dim)
    if other is not None:
        other = student if other is student_logits else as_rows(other, dim)
    return Rows(student, other, target_rows(target, dim), rows)


def check_target(target: Tensor, shape: tuple[int, ...], dim: int, device: torch.device) -> Tensor:
    """Check a target for logits of this ``shape`` with the classes in ``dim``. Return int64 class indices of the rows'
    shape, or probabilities of the logits' shape."""
    if target.device != device:
        raise ValueError(f"target: expected the device of student_logits, {device}, got {target.device}")
    if target.dtype in INDEX_DTYPES:
        rows = rows_shape(shape, dim)
        if target.shape != rows:
            # (N, 1) indices are common in data loaders; published code reads them as soft labels of class 0.
            if target.shape != (*shape[:dim], 1, *shape[dim + 1 :]):
                raise ValueError(
                    f"target: expected class indices of shape {tuple(rows)} for logits of shape {shape} with "
                    f"the classes in dimension {dim}, got {tuple(target.shape)}{_fits(shape, target)}"
                    f"{_ONE_HOT if target.shape == shape else ''}"
                )
            target = target.squeeze(dim)
        return target if target.dtype == torch.int64 else target.to(torch.int64)
    if target.dtype not in _LOGIT_DTYPES:
        raise TypeError(
            "target: expected integer class indices or floating-point probabilities, got "
            f"{target.dtype}{_ONE_HOT if target.shape == shape else ''}"
        )
    if target.shape != shape:
        raise ValueError(
            f"target: expected class probabilities of shape {shape}, got {target.dtype} of shape "
            f"{tuple(target.shape)} (class indices are integers){_moved(shape, target, dim)}"
        )
    if carries_gradient(target):
        raise ValueError("target: expected probabilities that do not require grad; pass target.detach()")
    return target


def target_rows(target: Tensor, dim: int) -> Tensor:
    """View a checked target as ``(N,)`` indices, or as ``(N, C)`` probabilities."""
    return as_rows(target, dim) if target.is_floating_point() else target.reshape(-1)


def _moved(shape: tuple[int, ...], target: Tensor, dim: int) -> str:
    """Return the end of a message: the dimension where probabilities have their classes, if only that is wrong."""
    rest = rows_shape(shape, dim)
    for at in range(target.dim()):
        if tuple(target.shape) == (*rest[:at], shape[dim], *rest[at:]):
            return (
                f"; its classes seem to be in dimension {at}, and the logits have them in dimension {dim}: pass "
                f"target.movedim({at}, {dim})"
            )
    return ""


def flatten_dense(dense_logits: Tensor, student_logits: Tensor, rows: Rows) -> Tensor:
    """Check the logits of the positions ``(..., P, C)``, and view them as ``(N, P, C)``; ``...`` is the rows' shape."""
    check_logits("dense_logits", dense_logits)
    shape, wanted = dense_logits.shape, (*rows.shape, rows.student_logits.shape[1])
    if len(shape) != len(wanted) + 1 or shape[:-2] != wanted[:-1] or shape[-1] != wanted[-1] or shape[-2] == 0:
        expected = ", ".join(map(str, (*wanted[:-1], "P", wanted[-1])))
        raise ValueError(f"dense_logits: expected shape ({expected}) with P at least 1, got {tuple(shape)}")
    if dense_logits.device != student_logits.device:
        raise ValueError(
            f"dense_logits: expected the device of student_logits, {student_logits.device}, got {dense_logits.device}"
        )
    return dense_logits if len(shape) == 3 else dense_logits.reshape(-1, *shape[-2:])


def flatten_weight(
    weight: Tensor | None, rows: tuple[int, ...], shape: tuple[int, ...], num_classes: int, device: torch.device
) -> Tensor | None:
    """Check a weight per row, and view it as ``(N,)``; a boolean mask becomes 0 and 1. ``rows`` is the rows' shape in
    logits of this ``shape``.

    Raises:
        TypeError: The weight is no Tensor, or has an integer dtype.
        ValueError: The shape or device is wrong, it requires grad, or, on the CPU, a weight is negative or not finite.
    """
    if weight is None:
        return None
    check_tensor("weight", weight, "a Tensor with one weight per row, or None")
    if weight.dtype not in (*_LOGIT_DTYPES, torch.bool):
        raise TypeError(
            "weight: expected float64, float32, float16 or bfloat16 weights or a boolean mask, got "
            f"{weight.dtype}; pass weight.bool() if it is a mask"
        )
    if weight.shape != rows:
        of_classes = "; a weight per class is not supported: index it by the target, weight=class_weight[target]"
        raise ValueError(
            f"weight: expected one per row, of shape {tuple(rows)}, got {tuple(weight.shape)}"
            f"{_fits(tuple(shape), weight, 'weight')}"
            f"{of_classes if weight.shape == (num_classes,) else ''}"
        )
    if weight.device != device:
        raise ValueError(f"weight: expected the device of student_logits, {device}, got {weight.device}")
    if carries_gradient(weight):
        raise ValueError(
            "weight: expected weights that do not require grad; they get no gradient: pass weight.detach()"
        )
    if weight.dtype == torch.bool:
        return weight.reshape(-1).to(torch.float32)
    if readable(weight):
        bad = ~((weight >= 0) & (weight < math.inf))
        if bool(bad.any()):
            raise ValueError(f"weight: expected finite numbers of at least 0, got {float(weight[bad][0])}")
    return weight.reshape(-1)
