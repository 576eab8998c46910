"""Errors of a head's loss and gradients against float64, and as multiples of what the eager form with logits has."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.sources.call import run_once
from benchmarks.sources.case import Case, Inputs, make_inputs
from benchmarks.sources.forms import BARE, Form, Run, eager, smaller

#: Of the mean of the rows, of the hidden states' gradient and of the weight's.
WHAT = ("loss", "hidden", "weight")


def _values(run: Run, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    inputs.drop_gradients()
    kept: list[torch.Tensor] = []

    def keeping() -> torch.Tensor | None:
        value = run()
        if value is not None:
            kept.append(value.detach().double())
        return value

    run_once(keeping)
    gradients = [leaf.grad.double() for leaf in inputs.trained() if leaf.grad is not None]
    inputs.drop_gradients()
    return kept[0], *gradients


def _errors(found: tuple[torch.Tensor, ...], truth: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Largest, relative to the largest entry."""
    return {
        name: float((ours - true).abs().max() / true.abs().max())
        for name, ours, true in zip(WHAT, found, truth, strict=True)
    }


def relative_errors(form: Form, case: Case) -> dict[str, Any] | None:
    """On fewer rows and classes if there are many; None of what computes no loss. An eager form that is right by
    chance has half a unit in the last place of what it computes in."""
    if form.name in BARE:
        return None
    case = smaller(case)
    inputs = make_inputs(case)
    exact = inputs.double()
    truth = _values(eager(form.loss, exact), exact)
    own = _errors(_values(form.make(inputs, case), inputs), truth)
    plain = _errors(_values(eager(form.loss, inputs), inputs), truth)
    least = torch.finfo(case.accumulating).eps / 2
    half = 4 * torch.finfo(inputs.hidden.dtype).eps
    few = {"loss": 16 * least, "hidden": half, "weight": half}  # units in the last place beyond the eager form's error
    return {
        "rows": case.rows,
        "classes": case.classes,
        **own,
        "over_eager": {name: own[name] / max(plain[name], least) for name in WHAT},
        "within": all(own[name] <= plain[name] + few[name] for name in WHAT),
    }
