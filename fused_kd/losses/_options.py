"""The check of every hyper-parameter by its name: modules make it when they are made, functions at each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fused_kd import backends, reference
from fused_kd.core import checks

#: Returns a number as a float.
Check = Callable[[str, Any], Any]

_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("alpha", "beta", "gamma", "mu", "power", "ce_weight"), checks.check_scalar),
    **dict.fromkeys(("correct", "label_smoothing"), checks.check_fraction),
    **dict.fromkeys(("logit_standardization", "square"), checks.check_flag),
    "temperature": lambda name, value: checks.check_scalar(name, value, positive=True),
    "rank": lambda name, value: checks.check_choice(name, value, reference.RANKS),
    "reduction": lambda name, value: checks.check_choice(name, value, checks.REDUCTIONS),
    "ignore_index": checks.check_index,
    "process_group": checks.check_process_group,
    "class_dim": checks.check_class_dim,
    "backend": lambda _, value: backends.check_name(value),
}


def checked(numbers: Mapping[str, float], settings: Mapping[str, Any]) -> dict[str, float]:
    """The numbers as floats, after the checks of all, in their order."""
    floats = {}
    for name, value in numbers.items():
        floats[name] = _CHECKS[name](name, value)
    for name, value in settings.items():
        _CHECKS[name](name, value)
    return floats


def check_options(options: Mapping[str, Any], own: Mapping[str, Check]) -> None:
    """Raise what the function would; ``own`` are the checks of a loss that differ. A schedule is left to the calls."""
    for name, value in options.items():
        if not callable(value):
            (own.get(name) or _CHECKS[name])(name, value)
