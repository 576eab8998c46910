"""What most modules are: hyper-parameters, and the function that takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn


class Criterion(nn.Module):
    """Hyper-parameters as attributes, and a function that takes them as keywords."""

    _function: ClassVar[Callable[..., Any]]

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self._names = tuple(name for name in options if name not in ("self", "__class__"))
        for name in self._names:
            setattr(self, name, options[name])

    def _call(self, *tensors: Tensor | None, return_parts: bool) -> Any:
        options = {name: getattr(self, name) for name in self._names}
        return type(self)._function(*tensors, **options, return_parts=return_parts)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)
