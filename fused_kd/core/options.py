"""What a call asks for, by name, and room for what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class HyperParameters(NamedTuple):
    """What scales the terms of a loss, by the names that its function has; a loss reads those that it has.

    An op takes them as numbers in this order. ``csrc/common/hyper_parameters.h`` has the same fields.
    """

    alpha: float = 0.0
    beta: float = 0.0
    gamma: float = 0.0
    mu: float = 0.0
    correct: float = 0.0
    power: float = 0.0
    temperature: float = 1.0
    ce_weight: float = 0.0
    label_smoothing: float = 0.0


_PLACES = {name: place for place, name in enumerate(HyperParameters._fields)}
_DEFAULTS = [*HyperParameters()]


def in_order(named: Mapping[str, float]) -> list[float]:
    """The fields of :class:`HyperParameters`, of which those that are not named keep their defaults. To make the tuple
    by keywords takes a microsecond, of a call's thirty; the op makes it once."""
    numbers = _DEFAULTS.copy()
    for name, value in named.items():
        numbers[_PLACES[name]] = value
    return numbers


class Options(NamedTuple):
    """What a backend is asked for beside tensors; of the last five an op reads those that it has.

    ``wanted`` says of which logits the gradient is, ``scales`` what it is stored times. With ``over`` a row loss of the
    C++ core writes it over the student's logits, which are contiguous then.
    """

    hyper: HyperParameters
    ignore_index: int
    reduction: str
    wanted: tuple[bool, ...]
    scales: tuple[float, ...]
    loss: str = ""
    standardize: bool = False
    rank: str = "normalized"
    square: bool = True
    over: bool = False


def outputs(
    student: Tensor, want: bool, parts: int, reduction: str, dtype: torch.dtype, over: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for what an op gives: the loss and its parts, the student's gradient, empty where it is not wanted, and its
    norm. Tuples for shapes and no loop: a torch.Size alone takes a microsecond of a call's thirty."""
    rows = (student.shape[0],) if reduction == "none" else ()
    if want:
        gradient = student if over else torch.empty_like(student, memory_format=torch.contiguous_format)
    else:
        gradient = student.new_empty(0)
    return (
        student.new_empty(rows, dtype=dtype),
        student.new_empty((parts, *rows), dtype=dtype),
        gradient,
        student.new_empty((), dtype=dtype),
    )


def pair_outputs(
    student: Tensor, other: Tensor, wanted: tuple[bool, ...], parts: int, reduction: str, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """As :func:`outputs`, of an op with two gradients: those, and then their norms."""
    loss, all_parts, gradient, norm = outputs(student, wanted[0], parts, reduction, dtype)
    more = torch.empty_like(other, memory_format=torch.contiguous_format) if wanted[1] else other.new_empty(0)
    return loss, all_parts, gradient, more, norm, torch.empty_like(norm)
