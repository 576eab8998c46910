"""Errors of a head's loss and gradients against float64, and as multiples of the errors of the eager form on logits."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.sources.call import run_once
from benchmarks.sources.case import Case, Inputs, make_inputs
from benchmarks.sources.forms import BARE, Form, Run, eager, smaller

#: The mean over the rows, the hidden states' gradient and the weight's.
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
    """Largest errors, relative to the largest entry."""
    return {
        name: float((ours - true).abs().max() / true.abs().max())
        for name, ours, true in zip(WHAT, found, truth, strict=True)
    }


def relative_errors(form: Form, case: Case) -> dict[str, Any] | None:
    """Errors on a smaller case; None for a form that computes no loss.

    An eager form that is right by chance counts as off by half a unit in the last place of its accumulating dtype.
    """
    if form.name in BARE:
        return None
    case = smaller(case)
    inputs = make_inputs(case)
    exact = inputs.double()
    truth = _values(eager(form.loss, exact), exact)
    own = _errors(_values(form.make(inputs, case), inputs), truth)
    plain = _errors(_values(eager(form.loss, inputs), inputs), truth)
    least = torch.finfo(case.accumulating).eps / 2
    few = 4 * torch.finfo(inputs.hidden.dtype).eps
    allowed = {"loss": 16 * least, "hidden": few, "weight": few}  # beyond the eager form's error
    return {
        "rows": case.rows,
        "classes": case.classes,
        **own,
        "over_eager": {name: own[name] / max(plain[name], least) for name in WHAT},
        "within": all(own[name] <= plain[name] + allowed[name] for name in WHAT),
    }
