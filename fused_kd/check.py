"""Compares every backend that runs here with the reference in float64: ``python -m fused_kd check``, and the tests.

What a backend may deviate is not a matter of taste: in each dtype it is the deviation of the eager reference itself,
run in that dtype on the same rows, plus a few units in the last place of the accumulating dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_kd
from fused_kd import backends, reference

__all__ = ["Case", "Outcome", "cases", "compare"]

#: The exponential is within 2 ulp, a sum of a hundred terms a lane about as much; float64 is compared with float64.
_SLACK_ULPS = {torch.float32: 4, torch.float64: 64}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPTIONS: tuple[dict[str, float], ...] = ({}, {"temperature": 3.0, "gamma": 3.5}, {"ce_weight": 1.0})


class Case(NamedTuple):
    """One comparison. ``spread`` is the standard deviation of the logits, ``soft`` asks for probability targets."""

    dtype: torch.dtype
    rows: int
    classes: int
    options: dict[str, Any]
    spread: float = 3.0
    soft: bool = False
    seed: int = 0

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.rows, self.classes)
        student, teacher = (torch.randn(shape, generator=generator) * self.spread for _ in range(2))
        target = torch.randint(self.classes, (self.rows,), generator=generator)
        if self.soft:  # as mixup makes them
            other = torch.randint(self.classes, (self.rows,), generator=generator)
            one_hot = torch.nn.functional.one_hot
            target = 0.7 * one_hot(target, self.classes).float() + 0.3 * one_hot(other, self.classes).float()
        elif self.rows > 2:
            target[1] = -100
        return student.to(device, self.dtype), teacher.to(device, self.dtype), target.to(device)


class Outcome(NamedTuple):
    """Relative errors against float64, and what each may be."""

    loss: float
    loss_budget: float
    gradient: float
    gradient_budget: float

    @property
    def passed(self) -> bool:
        return self.loss <= self.loss_budget and self.gradient <= self.gradient_budget


def cases(quick: bool = False) -> Iterator[Case]:
    """Every dtype over regimes of the number of classes, hyper-parameters, saturated rows and probability targets."""
    sizes = ((7, 2), (7, 10), (7, 1000)) if quick else ((7, 2), (7, 3), (77, 10), (77, 1000), (7, 1001), (7, 21841))
    for dtype in DTYPES:
        for rows, classes in sizes:
            for options in OPTIONS:
                yield Case(dtype, rows, classes, options)
            yield Case(dtype, rows, classes, {"ce_weight": 1.0}, soft=True)
            yield Case(dtype, rows, classes, {}, spread=60.0)
        if not quick:
            yield Case(dtype, 3, 128256, {})


def evaluate(
    backend: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    options: dict[str, Any],
    grad_output: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of the student's logits, for an incoming gradient."""
    student = student_logits.detach().requires_grad_()
    loss = fused_kd.nkd_loss(student, teacher_logits, target, backend=backend, **options)
    loss.backward(grad_output)
    assert student.grad is not None
    return loss.detach(), student.grad


def relative_error(value: Tensor, exact: Tensor) -> float:
    """The largest error as a share of the largest exact magnitude.

    A gradient's entries are differences of terms of order 1, or 1/N for a mean. Where they cancel in every row the
    float64 reference has no digits left itself, so the magnitude counts as a tenth of that order at least.
    """
    if exact.numel() == 0:
        return 0.0
    error, magnitude = (value.double() - exact.double()).abs(), exact.double().abs().max()
    if exact.dim() == 2:
        magnitude = magnitude.clamp(min=0.1 / exact.shape[0])
    share = torch.where(error == 0, 0.0, error / magnitude)
    return float(share.max()) if not bool(share.isnan().any()) else math.inf


def compare(backend: str, case: Case, device: str = "cpu") -> Outcome:
    """Run one case on a backend, on the reference in the same dtype, and on the reference in float64."""
    student, teacher, target = case.inputs(device)
    return compare_inputs(backend, student, teacher, target, case.options)


def compare_inputs(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: dict[str, Any],
    grad_output: Tensor | None = None,
) -> Outcome:
    """As :func:`compare`, for given inputs."""
    exact_output = grad_output.double() if grad_output is not None else None
    exact_target = target.double() if target.is_floating_point() else target
    exact = evaluate("reference", student.double(), teacher.double(), exact_target, options, exact_output)
    eager = evaluate("reference", student, teacher, target, options, grad_output)
    ours = evaluate(backend, student, teacher, target, options, grad_output)
    accumulate = reference.accumulation_dtype(student, teacher)
    slack = _SLACK_ULPS[accumulate] * torch.finfo(accumulate).eps
    loss, gradient = (relative_error(a, b) for a, b in zip(ours, exact, strict=True))
    loss_budget, gradient_budget = (relative_error(a, b) + slack for a, b in zip(eager, exact, strict=True))
    if backend == "triton" and student.device.type == "cpu" and student.dtype == torch.bfloat16:
        # Triton's interpreter cuts bfloat16 off, by up to a unit in the last place, where a GPU rounds.
        gradient_budget = max(gradient_budget, torch.finfo(torch.bfloat16).eps + slack)
    return Outcome(loss, loss_budget, gradient, gradient_budget)


def runnable(device: str) -> list[str]:
    """The fused backends that can run on a device."""
    kind = torch.device(device).type
    return [name for name in backends.BACKENDS if name != "reference" and backends.unavailable(name, kind) is None]
