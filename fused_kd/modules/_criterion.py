"""What most modules are: hyper-parameters, and the function that takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fused_kd import _options


class Criterion(nn.Module):
    """Hyper-parameters as attributes, and a function that takes them as keywords.

    One that is callable is called without arguments, each time that the loss is, for its value then. All others are
    checked here, and all at each call, as attributes may be changed.
    """

    _function: ClassVar[Callable[..., Any]]
    _own_checks: ClassVar[Mapping[str, _options.Check]] = {}  # of hyper-parameters that mean something else elsewhere
    _further: ClassVar[tuple[str, ...]] = ()  # arguments of __init__ that the function does not take

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self._names = tuple(name for name in options if name not in ("self", "__class__", *self._further))
        _options.check_options({name: options[name] for name in self._names}, self._own_checks)
        for name in self._names:
            setattr(self, name, options[name])

    def _call(self, *tensors: Tensor | None, weight: Tensor | None, return_parts: bool) -> Any:
        options = {name: self._value(name) for name in self._names}
        return type(self)._function(*tensors, **options, weight=weight, return_parts=return_parts)

    def _value(self, name: str) -> Any:
        value = getattr(self, name)
        return value() if callable(value) else value

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in self._names}
        return ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)
