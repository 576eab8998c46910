"""The checks of all hyper-parameters, by name. Modules run them at construction, functions at each call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from fused_kd import backends, reference
from fused_kd.core import checks
from fused_kd.core.transforms import carries_gradient, readable

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
else:
    Unpack = dict  # only type checkers read the overloads

Parts = TypeVar("Parts", bound=tuple[Tensor, ...])

#: Returns a number as a float.
Check = Callable[[str, Any], Any]


class Common(NamedTuple):
    """The arguments that all losses take. An ordinary call has a tuple of them, since naming them takes time."""

    weight: Tensor | None
    normalizer: float | Tensor | None
    class_dim: int | None
    num_classes: int | None
    backend: str
    return_parts: bool


class LossOptions(TypedDict, total=False):
    """Keyword arguments of every loss, in its overloads."""

    ce_weight: float
    label_smoothing: float
    ignore_index: int
    reduction: str
    weight: Tensor | None
    normalizer: float | Tensor | None
    class_dim: int | None
    backend: str


class RowOptions(LossOptions, total=False):
    """Further ones of a row loss."""

    temperature: float
    num_classes: int | None


class TeacherOptions(RowOptions, total=False):
    """Further ones of a loss with a teacher."""

    logit_standardization: bool


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
    "num_classes": checks.check_num_classes,
    "backend": lambda _, value: backends.check_name(value),
}


def checked(
    numbers: Mapping[str, float], settings: Mapping[str, Any], common: Common | None = None
) -> dict[str, float]:
    """Check everything in order. Return the numbers as floats."""
    floats = {name: _CHECKS[name](name, value) for name, value in numbers.items()}
    for name, value in settings.items():
        _CHECKS[name](name, value)
    if common is not None:
        backends.check_name(common.backend)
        checks.check_flag("return_parts", common.return_parts)
    return floats


def check_options(options: Mapping[str, Any], own: Mapping[str, Check]) -> None:
    """Raise the function's errors early. ``own`` are the checks that differ in a loss. The calls check schedules."""
    for name, value in options.items():
        if not callable(value):
            (own.get(name) or _CHECKS[name])(name, value)


def normalized_weight(
    weight: Tensor | None, normalizer: float | Tensor, settings: dict[str, Any], target: Tensor
) -> Tensor:
    """Return row weights (N,) divided by ``normalizer``, and set the reduction in ``settings`` to "sum".

    Row weights are factors of the parts and the gradient anyway, so this costs no pass over the gradient. With a
    normalizer of 0 no row counts.

    Raises:
        TypeError: ``normalizer`` is neither a number nor a Tensor of real numbers.
        ValueError: It has a dimension, requires grad, is below 0 or on another device; or the reduction is no mean.
    """
    if settings["reduction"] != "mean":
        raise ValueError(
            f"normalizer: expected None unless reduction is 'mean', whose divisor it replaces; reduction is "
            f"{settings['reduction']!r}"
        )
    if isinstance(normalizer, Tensor):
        checks.check_tensor("normalizer", normalizer)
        if normalizer.is_complex() or normalizer.dtype == torch.bool:
            raise TypeError(f"normalizer: expected a real number, got {normalizer.dtype}")
        if normalizer.device not in (torch.device("cpu"), target.device):
            places = f"cpu or that of student_logits, {target.device}"
            raise ValueError(f"normalizer: expected the device {places}, got {normalizer.device}")
        if normalizer.dim() != 0 or carries_gradient(normalizer):
            raise ValueError(
                "normalizer: expected a number, or a Tensor without dimensions that does not require grad, got one of "
                f"shape {tuple(normalizer.shape)}{' that does' if normalizer.requires_grad else ''}"
            )
        if readable(normalizer):
            checks.check_scalar("normalizer", float(normalizer))
    else:
        normalizer = checks.check_scalar("normalizer", normalizer)
    settings["reduction"] = "sum"
    dtype = reference.widest_dtype(target)
    rows = target.new_ones(target.shape[:1], dtype=dtype) if weight is None else weight.to(dtype)
    # A copy to a GPU would wait, or a CUDA graph would read its source again. PyTorch passes CPU scalars by value.
    divisor = rows.new_ones(()) * (normalizer.to(dtype) if isinstance(normalizer, Tensor) else normalizer)
    return torch.where(divisor == 0, 0.0, rows / divisor)


def first_classes(name: str, logits: Tensor, class_dim: int | None, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return logits as rows, and a view of these in the logits' form, without the padding after their classes."""
    dim = checks.class_dimension(checks.check_logits(name, logits), class_dim)
    shape = logits.shape
    checks.check_num_classes("num_classes", num_classes, shape[dim], name)
    rows = checks.as_rows(logits, dim)
    if rows is logits:
        return logits, logits[:, :num_classes]
    return rows, rows[:, :num_classes].reshape(*checks.rows_shape(shape, dim), num_classes).movedim(-1, dim)


def returned(
    loss: Tensor, parts: Iterable[Tensor] | None, parts_type: type[Parts], shape: tuple[int, ...], reduction: str
) -> Tensor | tuple[Tensor, Parts]:
    """Return a function's result: the loss, with its parts unless they are None. With ``reduction="none"`` they get the
    rows' ``shape``."""
    all_parts = [] if parts is None else [*parts]
    if reduction == "none" and len(shape) != 1:
        loss, *all_parts = (each.reshape(shape) for each in (loss, *all_parts))
    return loss if parts is None else (loss, parts_type(*all_parts))
