"""Measures a top-k teacher against the dense loss of the same logits, in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import cases, timing
from benchmarks.measure.machine import describe
from benchmarks.sources.forms import LOSSES
from fused_kd import TopK
from fused_kd.reference.topk import RESTS

DENSE = "dense"
BAR = 0.75  # largest accepted share of the dense loss's time

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    kept: int
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.kept} of {self.rows}×{self.classes} {self.dtype}"


def measure(case: Case, losses: list[str], seconds: float, min_rounds: int, progress: Progress) -> dict[str, Any]:
    """Measure one case: for each loss the dense form and each ``rest``, with errors, memory, time and time over the
    dense form's."""
    inputs = cases.make_inputs(cases.Case(case.rows, case.classes, case.dtype, case.device), case.seed)
    log_probs, indices = inputs.other_logits.float().log_softmax(1).topk(case.kept)
    entries, calls = [], {}
    timed = timing.timer(case.device)
    for loss in losses:
        for rest in (DENSE, *RESTS):
            progress(f"{loss}, {rest}: errors", 0.1)
            entry: dict[str, Any] = {"loss": loss, "rest": rest}
            entries.append(entry)
            try:
                entry |= _checked(loss, rest, inputs, (log_probs, indices))
            except Exception as error:  # reported in the result
                entry |= {"status": "failed", "reason": describe(error)}
                continue
            calls[loss, rest] = partial(timed, _function(loss, rest, (log_probs, indices)), inputs)
    samples = timing.time_in_turn(
        {f"{loss}:{rest}": call for (loss, rest), call in calls.items()},
        seconds,
        min_rounds,
        lambda share: progress("timing", 0.2 + 0.8 * share),
    )
    inputs.drop_gradients()
    medians = {name: median(sample.both) for name, sample in samples.items()}
    for entry in entries:
        name = f"{entry['loss']}:{entry['rest']}"
        if name in samples:
            entry["milliseconds"] = timing.quantiles(samples[name].both)
            if f"{entry['loss']}:{DENSE}" in medians:
                entry["over_dense"] = medians[name] / medians[f"{entry['loss']}:{DENSE}"]
    return {
        **asdict(case),
        "name": case.name,
        "teacher_bytes": {
            DENSE: inputs.other_logits.nbytes,
            "kept": log_probs.nbytes + indices.nbytes,
        },
        "forms": entries,
    }


def _function(loss: str, rest: str, kept: tuple[Tensor, Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    function = LOSSES[loss][0]
    if rest == DENSE:
        return function
    teacher = TopK(*kept, rest=rest)
    return lambda student, _, target: function(student, teacher, target)


def _checked(loss: str, rest: str, inputs: cases.Inputs, kept: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Errors against float64, and memory."""
    function = _function(loss, rest, kept)
    student, teacher, target = (each.detach() for each in inputs[:3])
    exact = student.double().requires_grad_()
    given: Any = teacher.double() if rest == DENSE else TopK(kept[0].double(), kept[1], rest=rest)
    truth = LOSSES[loss][0](exact, given, target, backend="reference")
    truth.backward()  # type: ignore[no-untyped-call]
    inputs.drop_gradients()
    found = function(*inputs[:3])
    found.backward()  # type: ignore[no-untyped-call]
    gradient, exact_gradient = inputs.student_logits.grad, exact.grad
    assert gradient is not None and exact_gradient is not None
    errors = {
        "loss": float((found.detach().double() - truth.detach()).abs() / truth.detach().abs()),
        "gradient": float((gradient.double() - exact_gradient).abs().max() / exact_gradient.abs().max()),
    }
    memory = timing.memory(function, inputs)
    inputs.drop_gradients()
    return {
        "status": "ok",
        "reason": None,
        "relative_errors": errors,
        "peak_bytes": max(0, memory.peak_bytes - torch.empty_like(student).nbytes),
    }


def missed(result: dict[str, Any]) -> list[str]:
    return [
        f"{entry['loss']}, {entry['rest']} at {case['name']}: {entry['over_dense']:.3g} of the dense loss's time, "
        f"the bar is {BAR:g}"
        for case in result["cases"]
        for entry in case["forms"]
        if entry["rest"] != DENSE and entry.get("over_dense", 0) > BAR
    ]
