"""The comparison of backends with the reference in float64, for ``python -m fused_kd check`` and the tests.

The allowed error of a backend in each dtype is the error of the eager reference itself, run in that dtype on the same
rows, plus a few units in the last place of the accumulating dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_kd
from fused_kd import backends, reference
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES

#: The exponential is within 2 ulp, a sum of a hundred terms a lane about as much; float64 is compared with float64.
_SLACK_ULPS = {torch.float32: 4, torch.float64: 64}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Options that make every term count in the gradients, for losses whose defaults do not, or that have more to vary.
_OWN_OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "nkd": ({}, {"temperature": 3.0, "gamma": 3.5}, {"ce_weight": 1.0}),
    "uskd": (
        {"beta": 1.0, "mu": 1.0},
        {"beta": 1.0, "mu": 1.0, "rank": "cls_kd", "square": False},
        {"beta": 1.0, "mu": 1.0, "rank": "final", "ce_weight": 1.0},
    ),
    "dkd": ({}, {"temperature": 1.0, "beta": 0.5}, {"ce_weight": 1.0}),
    "wsld": ({}, {"temperature": 1.0}, {"ce_weight": 1.0, "temperature": 3.0}),
    "tf_kd": ({}, {"temperature": 1.0, "correct": 0.9}, {"ce_weight": 1.0}),
    "js": ({}, {"temperature": 2.0, "beta": 0.1}, {"ce_weight": 1.0, "beta": 1.0}),
    "dist": ({}, {"temperature": 4.0}, {"ce_weight": 1.0, "beta": 0.5}),
    "zipf_ls": ({"beta": 1.0}, {"beta": 1.0, "power": 0.5}, {"beta": 1.0, "ce_weight": 1.0}),
}
OPTIONS = {loss: _OWN_OPTIONS.get(loss, ({}, {"temperature": 1.0}, {"ce_weight": 1.0})) for loss in LOSSES}


class Case(NamedTuple):
    """One comparison. ``spread`` is the standard deviation of the logits. ``soft`` asks for probability targets,
    ``weighted`` for row weights from 0 to 2. ``offset`` is added to the logits of the student, for USKD to both.

    Rounding may swap classes with nearly equal keys, and USKD would then be a different function. So its student's
    logits are multiples of 1/8 and the weak ones exactly half of them: keys are equal or well apart.
    """

    dtype: torch.dtype
    rows: int
    classes: int
    options: dict[str, Any]
    spread: float = 3.0
    soft: bool = False
    seed: int = 0
    loss: str = "nkd"
    weighted: bool = False
    offset: float = 0.0

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.rows, self.classes)
        student, other = (torch.randn(shape, generator=generator) * self.spread for _ in range(2))
        if self.loss == "uskd":
            student = (student * 8).round() / 8
        student = (student + self.offset).to(self.dtype)
        if self.loss == "uskd":
            other = student / 2
        target = torch.randint(self.classes, (self.rows,), generator=generator)
        if self.soft:  # as with mixup
            second = torch.randint(self.classes, (self.rows,), generator=generator)
            one_hot = torch.nn.functional.one_hot
            target = 0.7 * one_hot(target, self.classes).float() + 0.3 * one_hot(second, self.classes).float()
        elif self.rows > 2:
            target[1] = -100
        if self.loss == "zipf_ls":
            other = torch.randn((self.rows, 4, self.classes), generator=generator)
        return student.to(device, self.dtype), other.to(device, self.dtype), target.to(device)


class Outcome(NamedTuple):
    """Relative errors against float64, with the budget of each."""

    loss: float
    loss_budget: float
    gradient: float
    gradient_budget: float

    @property
    def passed(self) -> bool:
        return self.loss <= self.loss_budget and self.gradient <= self.gradient_budget


def cases(quick: bool = False, loss: str = "nkd") -> Iterator[Case]:
    """Yield cases for every dtype: numbers of classes, hyper-parameters, rows that are saturated or far from zero, and
    probability targets."""
    # If the weak logits underflow, classes tie in float32 but not in float64.
    first, saturated = OPTIONS[loss][0], 12.0 if loss == "uskd" else 60.0
    sizes = ((7, 2), (7, 10), (7, 1000)) if quick else ((7, 2), (7, 3), (77, 10), (77, 1000), (7, 1001), (7, 21841))
    for dtype in DTYPES:
        for rows, classes in sizes:
            for options in OPTIONS[loss]:
                yield Case(dtype, rows, classes, options, loss=loss)
            yield Case(dtype, rows, classes, {**first, "ce_weight": 1.0}, soft=True, loss=loss)
            yield Case(dtype, rows, classes, first, spread=saturated, loss=loss)
            yield Case(dtype, rows, classes, first, offset=1000.0, loss=loss)
            yield Case(dtype, rows, classes, {**first, "ce_weight": 1.0}, loss=loss, weighted=True)
        if not quick:
            yield Case(dtype, 3, 128256, first, loss=loss)


def evaluate(
    backend: str,
    student_logits: Tensor,
    other_logits: Tensor,
    target: Tensor,
    options: dict[str, Any],
    grad_output: Tensor | None = None,
    loss: str = "nkd",
) -> tuple[Tensor, ...]:
    """Return the loss and the gradients for an incoming gradient: of the student's logits, for USKD also of the weak
    ones."""
    leaves = [student_logits.detach().requires_grad_()]
    if loss == "uskd":
        leaves.append(other_logits.detach().requires_grad_())
    others = [leaves[1]] if loss == "uskd" else [] if loss == "tf_kd" else [other_logits]
    value = getattr(fused_kd, LOSSES[loss].function)(leaves[0], *others, target, backend=backend, **options)
    value.backward(grad_output)
    gradients = [leaf.grad for leaf in leaves]
    assert None not in gradients
    return value.detach(), *(gradient for gradient in gradients if gradient is not None)


def relative_error(value: Tensor, exact: Tensor, order: float = 0.1) -> float:
    """Return the largest error relative to the largest exact magnitude.

    A gradient's entries are differences of terms of order 1, or 1/N for a mean. If they cancel in every row, even the
    float64 reference has no digits left. So the magnitude counts as at least ``order`` (or ``order`` / N).
    """
    if exact.numel() == 0:
        return 0.0
    error, magnitude = (value.double() - exact.double()).abs(), exact.double().abs().max()
    if exact.dim() == 2:
        magnitude = magnitude.clamp(min=order / exact.shape[0])
    share = torch.where(error == 0, 0.0, error / magnitude)
    return float(share.max()) if not bool(share.isnan().any()) else math.inf


def compare(backend: str, case: Case, device: str = "cpu") -> Outcome:
    """Run one case on a backend, on the reference in the same dtype, and on the reference in float64."""
    options = case.options
    if case.weighted:
        options = {**options, "weight": torch.linspace(0.0, 2.0, case.rows, device=device)}
    return compare_inputs(backend, *case.inputs(device), options, loss=case.loss)


def compare_inputs(
    backend: str,
    student: Tensor,
    other: Tensor,
    target: Tensor,
    options: dict[str, Any],
    grad_output: Tensor | None = None,
    loss: str = "nkd",
) -> Outcome:
    """As :func:`compare`, for given inputs."""
    exact_output = grad_output.double() if grad_output is not None else None
    exact_target = target.double() if target.is_floating_point() else target
    exact = evaluate("reference", student.double(), other.double(), exact_target, options, exact_output, loss)
    eager = evaluate("reference", student, other, target, options, grad_output, loss)
    ours = evaluate(backend, student, other, target, options, grad_output, loss)
    accumulate = reference.accumulation_dtype(student, other)
    slack = _SLACK_ULPS[accumulate] * torch.finfo(accumulate).eps
    # A pointwise loss's gradient is a difference of larger terms: T times a slope over a row's deviation, or T times
    # the logarithm of a quotient. In DIST of two classes the correlation is 1 or -1, and only rounding is left. The
    # same holds for a saturated row, where eager gets 0 by luck.
    row = ROW_LOSSES.get(loss)
    order = row.slope * options.get("temperature", 1.0) if row and "pointwise" in row.needs else 0.1
    errors = [relative_error(a, b, order) for a, b in zip(ours, exact, strict=True)]
    budgets = [relative_error(a, b, order) + slack for a, b in zip(eager, exact, strict=True)]
    if accumulate == torch.float64 and (loss in ("uskd", "tf_kd", "zipf_ls") or options.get("label_smoothing")):
        # Eager PyTorch sums a smoothed label vector by vector. At 21841 classes, against 80 bits, its weak gradient of
        # USKD is 390 ulp off (the kernels' 5), and Tf-KD's loss and gradient are 180 and 320 ulp off (the kernels' 3
        # and 1). Zipf's labels are as many equal numbers. The worst case is half an ulp per step of 4 classes.
        more = student.shape[1] / 8 * torch.finfo(torch.float64).eps
        budgets = [*budgets[:2], budgets[2] + more] if loss == "uskd" else [budget + more for budget in budgets]
    if backend == "triton" and student.device.type == "cpu" and student.dtype == torch.bfloat16:
        # Triton's interpreter truncates bfloat16, an error of up to one unit in the last place. A GPU rounds.
        budgets[1:] = [max(budget, torch.finfo(torch.bfloat16).eps + slack) for budget in budgets[1:]]
    gradient, gradient_budget = max(zip(errors[1:], budgets[1:], strict=True), key=lambda pair: pair[0] / pair[1])
    return Outcome(errors[0], budgets[0], gradient, gradient_budget)


def runnable(device: str, loss: str) -> list[str]:
    """Return the fused backends that can run a loss on a device."""
    fused = (name for name in backends.BACKENDS if name != "reference")
    return [name for name in fused if backends.unavailable(name, device, loss) is None]
