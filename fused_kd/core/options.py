"""The options of a call, and memory for its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class HyperParameters(NamedTuple):
    """The hyper-parameters of all losses, by their names in the functions. Each loss reads its own.

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
    """Return the fields of :class:`HyperParameters` in order, with defaults for missing names. Building the tuple from
    keywords would take one of a call's thirty microseconds; the op builds it once."""
    numbers = _DEFAULTS.copy()
    for name, value in named.items():
        numbers[_PLACES[name]] = value
    return numbers


class Options(NamedTuple):
    """The arguments of a backend besides tensors. An op ignores those of the last five that it does not have.

    ``wanted`` says which logits get a gradient. ``scales`` are the factors of the stored gradients. With ``in_place`` a
    row loss of the C++ core writes the gradient over the student's logits, which must be contiguous. ``padding`` is the
    number of columns of zeros that a row loss's gradient has after its classes.
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
    in_place: bool = False
    padding: int = 0


def empty_gradient(logits: Tensor, padding: int = 0) -> Tensor:
    """Allocate a gradient of rows of logits, with ``padding`` more columns."""
    if padding:
        return logits.new_empty((logits.shape[0], logits.shape[1] + padding))
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def outputs(
    student: Tensor, want: bool, parts: int, reduction: str, dtype: torch.dtype, in_place: bool = False,
    padding: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate an op's results: the loss, its parts, the student's gradient (empty if not wanted) and its norm. Shapes
    are tuples, without a loop: a torch.Size alone takes one of a call's thirty microseconds."""
    rows = (student.shape[0],) if reduction == "none" else ()
    if not want:
        gradient = student.new_empty(0)
    elif in_place:
        gradient = student
    else:
        gradient = empty_gradient(student, padding)
    return (
        student.new_empty(rows, dtype=dtype),
        student.new_empty((parts, *rows), dtype=dtype),
        gradient,
        student.new_empty((), dtype=dtype),
    )


def pair_outputs(
    student: Tensor, other: Tensor, wanted: tuple[bool, ...], parts: int, reduction: str, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """As :func:`outputs`, for an op with two gradients: both gradients, then both norms."""
    loss, all_parts, gradient, norm = outputs(student, wanted[0], parts, reduction, dtype)
    more = empty_gradient(other) if wanted[1] else other.new_empty(0)
    return loss, all_parts, gradient, more, norm, torch.empty_like(norm)
