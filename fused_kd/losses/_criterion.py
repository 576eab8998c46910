"""Base classes of the modules: hyper-parameters, and the function that takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import update_wrapper
from numbers import Real
from types import FunctionType
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar, overload

from torch import Tensor, nn

from fused_kd.losses import _options
from fused_kd.sources import Logits, TeacherLogits

#: A hyper-parameter: a number, or a schedule: a callable without arguments that returns the number for each call.
Scheduled: TypeAlias = "float | Callable[[], float]"
Parts = TypeVar("Parts")


class Criterion(nn.Module):
    """Hyper-parameters as attributes, and a function that takes them as keywords.

    Each call of the loss calls a callable hyper-parameter for its current value. All others are checked here, and all
    of them again at each call, since attributes may change.
    """

    ce_weight: Scheduled
    label_smoothing: Scheduled
    ignore_index: int
    reduction: str
    backend: str
    class_dim: int | None

    _function: ClassVar[Callable[..., Any]]
    _own_checks: ClassVar[Mapping[str, _options.Check]] = {}  # for names that have another meaning in other losses
    _further: ClassVar[tuple[str, ...]] = ()  # arguments of __init__ that the function does not take

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self._names = tuple(name for name in options if name not in ("self", "__class__", *self._further))
        _options.check_options({name: options[name] for name in self._names}, self._own_checks)
        for name in self._names:
            setattr(self, name, options[name])

    def __init_subclass__(cls, **given: Any) -> None:
        """Give each module its own copy of a ``forward`` from this file, so that an error message of Python for a
        missing argument names the module."""
        super().__init_subclass__(**given)
        found: Any = cls.forward
        if "forward" not in vars(cls) and found.__module__ == __name__:
            own = FunctionType(found.__code__, found.__globals__, argdefs=found.__defaults__)
            own.__kwdefaults__ = found.__kwdefaults__
            update_wrapper(own, found).__qualname__ = f"{cls.__qualname__}.forward"
            setattr(cls, "forward", own)  # noqa: B010 - mypy allows no plain assignment to a method

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.compile takes a module's int for a constant, so that each new value would recompile the graph, and a
        # number of NumPy for an array.
        counts = name in ("ignore_index", "class_dim", "num_classes")
        number = isinstance(value, Real) and not isinstance(value, bool)
        if number and not counts and name in self.__dict__.get("_names", ()):
            with suppress(OverflowError):  # the call raises the error for a number that no float can hold
                value = float(value)
        super().__setattr__(name, value)

    def _call(self, *tensors: Any, **given: Any) -> Any:
        options = {name: self._value(name) for name in self._names}
        return type(self)._function(*tensors, **options, **given)

    def _value(self, name: str) -> Any:
        value = getattr(self, name)
        return value() if callable(value) else value

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in self._names}
        return ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)


class TeacherCriterion(Criterion, Generic[Parts]):
    """A loss with a teacher and targets. ``Parts`` is the type of the parts."""

    temperature: Scheduled
    logit_standardization: bool
    num_classes: int | None

    @overload
    def forward(
        self, student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor, *, weight: Tensor | None = ...,
        normalizer: float | Tensor | None = ..., return_parts: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor, *, weight: Tensor | None = ...,
        normalizer: float | Tensor | None = ..., return_parts: Literal[True],
    ) -> tuple[Tensor, Parts]: ...  # fmt: skip
    @overload
    def forward(
        self, student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor, *, weight: Tensor | None = ...,
        normalizer: float | Tensor | None = ..., return_parts: bool,
    ) -> Tensor | tuple[Tensor, Parts]: ...  # fmt: skip

    def forward(
        self, student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor, *, weight: Tensor | None = None,
        normalizer: float | Tensor | None = None, return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, Parts]:  # fmt: skip
        """The loss, or with ``return_parts=True`` ``(loss, parts)``; all arguments are as in the function."""
        return self._call(  # type: ignore[no-any-return]
            student_logits, teacher_logits, target, weight=weight, normalizer=normalizer, return_parts=return_parts
        )


class UnlabelledCriterion(TeacherCriterion[Parts]):
    """A loss with a teacher and optional targets."""

    @overload
    def forward(
        self, student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor | None = ..., *,
        weight: Tensor | None = ..., normalizer: float | Tensor | None = ..., return_parts: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor | None = ..., *,
        weight: Tensor | None = ..., normalizer: float | Tensor | None = ..., return_parts: Literal[True],
    ) -> tuple[Tensor, Parts]: ...  # fmt: skip
    @overload
    def forward(
        self, student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor | None = ..., *,
        weight: Tensor | None = ..., normalizer: float | Tensor | None = ..., return_parts: bool,
    ) -> Tensor | tuple[Tensor, Parts]: ...  # fmt: skip

    def forward(
        self, student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor | None = None, *,
        weight: Tensor | None = None, normalizer: float | Tensor | None = None, return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, Parts]:  # fmt: skip
        """The loss, or with ``return_parts=True`` ``(loss, parts)``; all arguments are as in the function."""
        return self._call(  # type: ignore[no-any-return]
            student_logits, teacher_logits, target, weight=weight, normalizer=normalizer, return_parts=return_parts
        )
