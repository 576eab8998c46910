"""What a call asks for, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


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
_NONE = [0.0] * _PLACES["temperature"]


def in_order(own: Mapping[str, float], temperature: float, ce_weight: float, label_smoothing: float) -> list[float]:
    """The fields of :class:`HyperParameters` from a loss's own and those that all losses have. To make the tuple by
    keywords takes a microsecond, of a call's thirty; the op makes it once."""
    numbers = [*_NONE, temperature, ce_weight, label_smoothing]
    for name, value in own.items():
        numbers[_PLACES[name]] = value
    return numbers
