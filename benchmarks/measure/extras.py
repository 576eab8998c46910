"""Extra measurements: the fixed cost of a call, bfloat16 against float32, and a training step with a linear layer."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.forms.spec import BASELINE, COMPILED, OURS, Loss, LossFunction, Provider
from benchmarks.measure import agreement, machine, measured, timing
from benchmarks.measure.cases import Case, make_inputs
from benchmarks.measure.measured import Progress, TimeCalls

SMALLEST = (1, 10)  # almost no arithmetic, so the time is the fixed cost of a call
LONG_ROWS = (128, 21841)
FLOAT32, BFLOAT16 = "float32", "bfloat16"
STEP_ROWS, STEP_FEATURES, STEP_CLASSES = 256, 512, (1000, 21841)
STEP_PROVIDERS = (BASELINE, COMPILED, "cross_entropy", OURS)
NO_LOSS = "none"
STEP_TOLERANCE = 1e-3  # of the weight's gradient: above a product's rounding, below the error of a wrong loss


def fixed_cost(
    loss: Loss, providers: Sequence[Provider], device: str, seed: int, time_calls: TimeCalls, progress: Progress
) -> dict[str, Any]:
    compared = [provider for provider in providers if provider.name in ("cross_entropy", OURS)]
    return measured.measure(loss, Case(*SMALLEST, FLOAT32, device), compared, seed, time_calls, progress)


def bfloat16(loss: Loss, device: str, seed: int, time_calls: TimeCalls, progress: Progress) -> dict[str, Any]:
    """Time fused_kd in bfloat16 and float32, in turn."""
    entries, calls = [], {}
    provider = loss.provider(OURS)
    timed = timing.timer(device)
    for dtype in (FLOAT32, BFLOAT16):
        progress(f"verifying {dtype}", 0.0)
        case = Case(*LONG_ROWS, dtype, device)
        inputs = make_inputs(case, seed, loss.trains_other, loss.positions)
        entry, function = measured.prepare(agreement.Judge(loss, inputs), case, provider)
        entries.append({**entry, "dtype": dtype})
        if function is not None:
            calls[dtype] = partial(timed, function, inputs)
    times = time_calls(calls, progress=lambda share: progress("timing", share)) if calls else {}
    for entry in entries:
        if entry["dtype"] in times:
            entry["times"] = times[entry["dtype"]]
    rows, classes = LONG_ROWS
    about = {"loss": loss.name, "title": loss.title, "rows": rows, "classes": classes, "device": device}
    return {**about, "providers": entries}


class Step(NamedTuple):
    """A linear layer that makes the student's logits, and its inputs."""

    hidden: Tensor  # requires grad: the network before the layer is trained too
    weight: Tensor
    bias: Tensor
    teacher_logits: Tensor
    target: Tensor

    def trained(self) -> tuple[Tensor, ...]:
        return (self.hidden, self.weight, self.bias)

    def drop_gradients(self) -> None:
        for tensor in self.trained():
            tensor.grad = None


def _make_step(classes: int, device: str, seed: int) -> Step:
    """Student logits with a standard deviation of about 2; the teacher's are those of a case of this size."""
    inputs = make_inputs(Case(STEP_ROWS, classes, FLOAT32, device), seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(STEP_ROWS, STEP_FEATURES, generator=generator)
    weight = torch.randn(classes, STEP_FEATURES, generator=generator) * (2 / math.sqrt(STEP_FEATURES))
    made = [tensor.to(device).requires_grad_() for tensor in (hidden, weight, torch.zeros(classes))]
    return Step(made[0], made[1], made[2], inputs.other_logits, inputs.target)


def _run_step(step: Step, function: LossFunction | None, given: Tensor, device: str, samples: timing.Samples) -> None:
    """Time one step and, within it, the loss: its forward and backward passes, from the logits to their gradient.

    Detached logits allow timing the loss inside the step. The difference to a step without a loss would be a few per
    cent of a long product's time and drown in its variation. Without a function the layer gets the gradient ``given``.
    """
    timing.synchronize(device)
    start = time.perf_counter()
    logits = F.linear(step.hidden, step.weight, step.bias)
    gradient: Tensor | None = given
    if function is not None:
        timing.synchronize(device)
        began = time.perf_counter()
        leaf = logits.detach().requires_grad_()
        function(leaf, step.teacher_logits, step.target).backward()  # type: ignore[no-untyped-call]
        gradient = leaf.grad
        timing.synchronize(device)
        samples.loss.append(time.perf_counter() - began)
    logits.backward(gradient)  # type: ignore[no-untyped-call]
    timing.synchronize(device)
    samples.both.append(time.perf_counter() - start)
    step.drop_gradients()


def training_step(
    loss: Loss,
    providers: Sequence[Provider],
    classes: int,
    device: str,
    seed: int,
    time_calls: TimeCalls,
    progress: Progress,
) -> dict[str, Any]:
    torch._dynamo.reset()
    step = _make_step(classes, device, seed)
    given = torch.full((STEP_ROWS, classes), 1e-3, device=device)
    expected = _weight_gradient(step, loss.provider("reference").build())
    entries: list[dict[str, Any]] = [{"name": NO_LOSS, "status": "ok", "reason": None}]
    calls = {NO_LOSS: partial(_run_step, step, None, given, device)}
    for provider in providers:
        if provider.name not in STEP_PROVIDERS:
            continue
        progress(f"verifying {provider.name}", 0.0)
        entry: dict[str, Any] = {"name": provider.name, "status": "ok", "reason": None}
        try:
            reason = provider.unavailable(device)
            if reason:
                entry |= {"status": "unavailable", "reason": machine.without_paths(reason)}
            else:
                function = provider.build()
                found = _weight_gradient(step, function)
                off = float((found - expected).abs().max() / expected.abs().max())
                if provider.same_loss and not off <= STEP_TOLERANCE:
                    entry |= {"status": "wrong", "reason": f"the weight's gradient is off by {off:.1e}"}
        except Exception as error:  # reported in the result, as in a case
            entry |= {"status": "failed", "reason": machine.describe(error)}
        entries.append(entry)
        if entry["status"] == "ok":
            calls[provider.name] = partial(_run_step, step, function, given, device)
    times = time_calls(calls, progress=lambda share: progress("timing", share))
    for entry in entries:
        if entry["name"] in times:
            entry["times"] = times[entry["name"]]
    about = {"loss": loss.name, "rows": STEP_ROWS, "features": STEP_FEATURES, "classes": classes}
    return {**about, "dtype": FLOAT32, "device": device, "providers": entries}


def _weight_gradient(step: Step, function: LossFunction) -> Tensor:
    step.drop_gradients()
    logits = F.linear(step.hidden, step.weight, step.bias)
    function(logits, step.teacher_logits, step.target).backward()  # type: ignore[no-untyped-call]
    gradient = step.weight.grad
    step.drop_gradients()
    assert gradient is not None
    return gradient
