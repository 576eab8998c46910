"""The check of every hyper-parameter by its name, for modules, which make it when they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fused_kd import backends, reference
from fused_kd.core import checks

Check = Callable[[str, Any], object]


def _unnamed(check: Callable[[Any], object]) -> Check:
    """One that knows the name itself."""
    return lambda _, value: check(value)


_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("alpha", "beta", "gamma", "mu", "power", "ce_weight"), checks.check_scalar),
    **dict.fromkeys(("correct", "label_smoothing"), checks.check_fraction),
    **dict.fromkeys(("logit_standardization", "square"), checks.check_flag),
    "temperature": lambda name, value: checks.check_scalar(name, value, positive=True),
    "rank": lambda name, value: checks.check_choice(name, value, reference.RANKS),
    "reduction": _unnamed(checks.check_reduction),
    "ignore_index": _unnamed(checks.check_ignore_index),
    "process_group": _unnamed(checks.check_process_group),
    "class_dim": _unnamed(checks.check_class_dim),
    "backend": _unnamed(backends.check_name),
}


def check_options(options: Mapping[str, Any], own: Mapping[str, Check]) -> None:
    """Raise what the function would; ``own`` are the checks of a loss that differ. A schedule is left to the calls."""
    for name, value in options.items():
        if not callable(value):
            (own.get(name) or _CHECKS[name])(name, value)
