"""What is measured beside the cases of each loss: what a call costs at the least, bfloat16 beside float32, a training
step in which the logits come from a product."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.forms.spec import BASELINE, COMPILED, OURS, Loss, LossFunction, Provider
from benchmarks.measure import agreement, machine, measured, timing
from benchmarks.measure.cases import Case, make_inputs
from benchmarks.measure.measured import Progress, TimeCalls

SMALLEST = (1, 10)  # next to no work, so that what is left is what a call costs
LONG_ROWS = (128, 21841)
FLOAT32, BFLOAT16 = "float32", "bfloat16"
STEP_ROWS, STEP_FEATURES, STEP_CLASSES = 256, 512, (1000, 21841)
STEP_PROVIDERS = (BASELINE, COMPILED, "cross_entropy", OURS)
NO_LOSS = "none"
STEP_TOLERANCE = 1e-3  # of the weight's gradient, which is a product: only what a wrong loss gives is beyond it


def fixed_cost(
    loss: Loss, providers: Sequence[Provider], device: str, seed: int, time_calls: TimeCalls, progress: Progress
) -> dict[str, Any]:
    compared = [provider for provider in providers if provider.name in ("cross_entropy", OURS)]
    return measured.measure(loss, Case(*SMALLEST, FLOAT32, device), compared, seed, time_calls, progress)


def bfloat16(loss: Loss, device: str, seed: int, time_calls: TimeCalls, progress: Progress) -> dict[str, Any]:
    """fused_kd in bfloat16 and in float32, in turn."""
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
    """A linear layer, whose logits a loss gets, and what it is trained with."""

    hidden: Tensor  # it requires grad, as the network before the layer is trained as well
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
    """The layer gives logits with a spread of about 2 beside those that a case of this size has for the teacher."""
    inputs = make_inputs(Case(STEP_ROWS, classes, FLOAT32, device), seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(STEP_ROWS, STEP_FEATURES, generator=generator)
    weight = torch.randn(classes, STEP_FEATURES, generator=generator) * (2 / math.sqrt(STEP_FEATURES))
    made = [tensor.to(device).requires_grad_() for tensor in (hidden, weight, torch.zeros(classes))]
    return Step(made[0], made[1], made[2], inputs.other_logits, inputs.target)


def _run_step(step: Step, function: LossFunction | None, given: Tensor, device: str, samples: timing.Samples) -> None:
    """One step, and in it what the loss takes: its forward and backward passes, from the logits to their gradient.

    The step is cut at the logits, so that this is timed where it happens: their difference to a step without a loss
    would be a few per cent of a long product's own unsteadiness. Without a function the layer's backward pass gets a
    gradient that is there already.
    """
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    logits = F.linear(step.hidden, step.weight, step.bias)
    gradient: Tensor | None = given
    if function is not None:
        wait()
        began = time.perf_counter()
        leaf = logits.detach().requires_grad_()
        function(leaf, step.teacher_logits, step.target).backward()  # type: ignore[no-untyped-call]
        gradient = leaf.grad
        wait()
        samples.loss.append(time.perf_counter() - began)
    logits.backward(gradient)  # type: ignore[no-untyped-call]
    wait()
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
        except Exception as error:  # a line of the report, as in a case
            text = f"{type(error).__name__}: {machine.without_paths(str(error))}"
            entry |= {"status": "failed", "reason": text[:300]}
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
