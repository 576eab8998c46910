"""What a call asks for, by name."""

from __future__ import annotations

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
