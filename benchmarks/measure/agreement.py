"""Compares a provider's loss and gradients with the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.forms.spec import Loss, LossFunction, Provider
from benchmarks.forms.uskd import LabelSum, Swaps
from benchmarks.measure.cases import Case, Inputs

# Far above rounding in each dtype, far below what a wrong formula gives.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}
CHUNK_ELEMENTS = 2**25  # per part of the float64 reference, so that a billion logits fit into memory

_T = TypeVar("_T")


def tolerance(loss: Loss, case: Case, provider: Provider) -> float:
    """Largest accepted error; float32's for a form that accumulates in float32, as storage rounding is excused."""
    if case.dtype == "float64" or (provider.as_published and case.dtype != "float32"):
        return TOLERANCE[case.dtype]
    return TOLERANCE["float32"] * max(1.0, case.classes / loss.long_row)


@dataclass(frozen=True)
class Errors:
    """Largest errors against float64, relative to the loss and to the largest entry of the gradient.

    Some deviations are not errors of a form and are excused:

    * A divergence from a teacher is a small difference of large terms. Rounding each term once, by half a unit in the
      last place of the form's dtype, loses digits however carefully the terms are added up.
    * In a loss that ranks, near-equal keys may exchange ranks. Non-target entries, which have the ranks, are compared
      with the largest entry among them: a target's is many times larger.
    * PyTorch's ``log_softmax`` sums a long row's labels with rounding errors, in forms that use it.

    With two gradients the larger error counts.
    """

    loss: float
    loss_beyond_rounding: float  # less the effect of rounding each term once
    gradient: float
    beyond_rounding: float  # of the gradient, less the rounding of each entry to the dtype of the logits

    def within(self, tolerance: float) -> bool:
        return self.loss_beyond_rounding <= tolerance and self.beyond_rounding <= tolerance  # NaN is not


def run_once(function: LossFunction, inputs: Inputs, grad_output: float = 1.0) -> Tensor:
    """Run one forward and backward pass; leave the gradients in the inputs."""
    inputs.drop_gradients()
    value = function(*inputs[:3])
    value.backward(torch.full_like(value, grad_output))  # type: ignore[no-untyped-call]
    return value.detach()


class _Exact(NamedTuple):
    """Contribution of some rows to the mean over all rows."""

    loss: Tensor
    magnitude: Tensor  # sum of the loss's terms' magnitudes, 0 if they all have one sign
    gradients: list[Tensor]


class _Largest:
    """Largest deviation in each group of entries, relative to the group's largest exact entry."""

    def __init__(self, rounds_to: torch.dtype | None, scale: float) -> None:
        self.groups: dict[str, np.ndarray[Any, Any]] = {}
        self.rounds_to, self.scale = rounds_to, scale

    def add(self, group: str, deviation: Tensor, exact: Tensor) -> None:
        beyond = deviation
        if self.rounds_to is not None:
            finfo = torch.finfo(self.rounds_to)
            rounding = 0.51 * finfo.eps * exact.abs() + finfo.smallest_normal * finfo.eps / self.scale
            beyond = deviation - deviation.clamp(-rounding, rounding)
        found = np.array([float(tensor.abs().max()) for tensor in (deviation, beyond, exact)])
        # numpy's maximum keeps a NaN, Python's may lose it.
        self.groups[group] = np.maximum(self.groups.get(group, 0.0), found)

    def relative(self) -> tuple[float, float]:
        deviation, beyond = np.max([group[:2] / group[2] for group in self.groups.values()], axis=0)
        return float(deviation), float(beyond)


class Judge:
    """Compares loss and gradients (mean over the rows) with the float64 reference on the same, rounded inputs.

    The reference takes the rows in parts, to save memory. If one part holds all rows, its results are kept for the next
    provider.
    """

    def __init__(self, loss: Loss, inputs: Inputs) -> None:
        self.loss, self.inputs = loss, inputs
        self.rows, classes = inputs.student_logits.shape
        step = max(1, CHUNK_ELEMENTS // (classes * max(1, loss.positions)))
        if loss.whole_batch:
            step = self.rows
        self.parts = [slice(start, start + step) for start in range(0, self.rows, step)]
        self._kept: dict[object, object] = {}
        self.batch_sums: Tensor | None = None
        if loss.batch_sums is not None:
            student, target = inputs.student_logits.detach(), inputs.target
            sums = [loss.batch_sums(student[part].double(), target[part]) for part in self.parts]
            self.batch_sums = torch.stack(sums).sum(0)

    def errors(self, provider: Provider, function: LossFunction) -> Errors:
        student = self.inputs.student_logits
        # As a GradScaler does: in float16 a gradient divided by the number of rows would underflow.
        scale = 2.0 ** math.ceil(math.log2(self.rows)) if student.dtype == torch.float16 else 1.0
        value = run_once(function, self.inputs, scale)
        gradients = [logits.grad for logits in self.inputs.trained()]
        self.inputs.drop_gradients()
        expected = torch.zeros((), dtype=torch.float64, device=student.device)
        magnitude = torch.zeros_like(expected)
        half = student.dtype in (torch.float16, torch.bfloat16)
        largest = _Largest(student.dtype if half and not provider.as_published else None, scale)
        for part in self.parts:
            exact = self._once(("exact", part.start), lambda part=part: self._exact(part))  # type: ignore[misc]
            expected += exact.loss
            magnitude += exact.magnitude
            for name, gradient, right in zip(("student", "other"), gradients, exact.gradients, strict=False):
                if gradient is None:
                    raise RuntimeError(f"the provider left no gradient on the {name} logits")
                deviation = gradient[part].double() / scale - right
                if name == "other" and self.loss.label_sum is not None and provider.log_softmax:
                    label_sum: LabelSum = self._once(("sum", part.start), lambda part=part: self._label_sum(part))  # type: ignore[misc]
                    deviation -= self._explained_by_sum(deviation, label_sum)
                if name == "other" or self.loss.swaps is None:
                    largest.add(name, deviation, right)
                    continue
                key = ("swaps", part.start, provider.as_published)
                swaps: Swaps = self._once(key, lambda part=part: self._swaps(part, provider.as_published))  # type: ignore[misc]
                explained = deviation.clamp(swaps.below / self.rows, swaps.above / self.rows)
                expected += (explained * swaps.loss_per_gradient).sum()
                deviation -= explained
                largest.add("student", deviation.masked_fill(~swaps.is_target, 0.0), right)
                others = (each.masked_fill(swaps.is_target, 0.0) for each in (deviation, right))
                largest.add("non-targets", *others)
        computes_in = student.dtype if provider.as_published else torch.promote_types(student.dtype, torch.float32)
        deviation = (value.double() - expected).abs()
        beyond = (deviation - torch.finfo(computes_in).eps / 2 * magnitude).clamp(min=0.0)  # keeps a NaN
        relative, relative_beyond = (float(part / expected.abs()) for part in (deviation, beyond))
        return Errors(relative, relative_beyond, *largest.relative())

    def _explained_by_sum(self, deviation: Tensor, label_sum: LabelSum) -> Tensor:
        along = label_sum.direction
        off = (deviation * along).sum(1, keepdim=True) / along.square().sum(1, keepdim=True)  # least squares
        limit = label_sum.limit / self.rows
        return off.clamp(-limit, limit) * along  # keeps a NaN

    def _once(self, key: object, make: Callable[[], _T]) -> _T:
        if len(self.parts) > 1:
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[return-value]

    def _exact(self, part: slice) -> _Exact:
        pair = [logits.detach()[part].double().requires_grad_(logits.requires_grad) for logits in self.inputs[:2]]
        loss = self.loss.reference_sum(pair[0], pair[1], self.inputs.target[part], self.batch_sums) / self.rows
        loss.backward()  # type: ignore[no-untyped-call]
        magnitude = torch.zeros_like(loss)
        if self.loss.magnitude is not None:
            magnitude = self.loss.magnitude(pair[0].detach(), pair[1], self.inputs.target[part]) / self.rows
        return _Exact(loss.detach(), magnitude, [logits.grad for logits in pair if logits.grad is not None])

    def _swaps(self, part: slice, as_published: bool) -> Swaps:
        assert self.loss.swaps is not None
        student, other = (logits.detach()[part] for logits in self.inputs[:2])
        return self.loss.swaps(student.double(), other.double(), self.inputs.target[part], student.dtype, as_published)

    def _label_sum(self, part: slice) -> LabelSum:
        assert self.loss.label_sum is not None
        other = self.inputs.other_logits.detach()[part]
        return self.loss.label_sum(other.double(), other.dtype)
