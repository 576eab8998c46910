"""Heads whose products a CPU makes in bfloat16: as exact as F.linear and eager code, also on a CPU without them."""

import pytest
import torch
from torch.nn import functional as F

import fused_kd
from fused_kd import Head, reference
from fused_kd.backends import heads
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES

ROWS, CLASSES, WIDTH, OTHER = 60, 9001, 48, 32  # more classes than are converted at a time
OPTIONS = {"dist": {"gamma": 0.0}}


@pytest.fixture(autouse=True)
def rounded(monkeypatch):
    monkeypatch.setattr(heads, "multiplies_bfloat16", lambda: True)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for width in (WIDTH, OTHER):
        made += [torch.randn(*size, generator=generator) for size in ((ROWS, width), (CLASSES, width), (CLASSES,))]
        made[-2] *= 2 / width**0.5
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    target[3] = -100
    return [each.bfloat16() for each in made], target


def run(function, loss, given, target, of_logits, **options):
    """The loss of each row, and the gradients of a head's tensors in float64."""
    leaves = [each.clone().requires_grad_() for each in given[:3]]
    both = [of_logits(*leaves), of_logits(*given[3:])]
    value = function(*both[: 1 if loss == "tf_kd" else 2], target, **OPTIONS.get(loss, {}), ce_weight=0.5, **options)
    rows = value[0] if isinstance(value, tuple) else value
    return [each.double() for each in (rows.detach(), *torch.autograd.grad(rows.sum() / ROWS, leaves))]


@pytest.mark.parametrize("chunk_rows", (7, None))
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_errors(loss, chunk_rows):
    given, target = tensors()
    eager, fused = getattr(reference, LOSSES[loss].function), getattr(fused_kd, LOSSES[loss].function)
    wide = [each.double() for each in given]
    exact = run(eager, loss, wide, target, F.linear, reduction="none")
    rounded = run(eager, loss, given, target, F.linear, reduction="none")
    found = run(fused, loss, given, target, lambda *of: Head(*of, chunk_rows=chunk_rows), reduction="none")
    for ours, eagers, wanted in zip(found, rounded, exact, strict=True):
        # Each chunk's gradient of the weight is rounded, and there are nine of them.
        assert (ours - wanted).norm() <= 1.5 * (eagers - wanted).norm() + 1e-6 * wanted.norm()


def test_the_logits_are_those_of_a_linear_layer():
    """To the bit, with and without a bias; so is the loss."""
    given, target = tensors()
    for biased in (3, 2):
        student, teacher = given[:biased], given[3 : 3 + biased]
        found = fused_kd.nkd_loss(Head(*student), Head(*teacher), target)
        assert found == fused_kd.nkd_loss(F.linear(*student), F.linear(*teacher), target)


def test_what_is_not_rounded():
    """With a softcap, and where a tensor is no bfloat16, products accumulate in float32 and nothing is rounded."""
    given, target = tensors()
    wide = [each.double() for each in given]
    for softcap, dtype in ((30.0, torch.bfloat16), (None, torch.float32)):
        student = Head(given[0].to(dtype), *given[1:3], softcap=softcap)
        exact = Head(*wide[:3], softcap=softcap)
        values = [
            fused_kd.nkd_loss(each, teacher, target, backend=backend)
            for each, teacher, backend in (
                (student, Head(*given[3:5], given[5], softcap=50.0), "native"),
                (exact, Head(*wide[3:], softcap=50.0), "reference"),
            )
        ]
        torch.testing.assert_close(values[0].double(), values[1], rtol=2e-6, atol=0.0)


def test_autocast():
    """Weights and their gradients stay in float32, and are rounded as a linear layer under autocast rounds them."""
    given, target = tensors()
    results = []
    for of_logits in (F.linear, Head):
        leaves = [each.float().requires_grad_() for each in given[:3]]
        with torch.autocast("cpu", torch.bfloat16):
            value = fused_kd.nkd_loss(of_logits(*leaves), of_logits(*(each.float() for each in given[3:])), target)
        results.append((value, *torch.autograd.grad(value, leaves)))
    assert results[0][0] == results[1][0]
    for wanted, ours in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - wanted).norm() <= 2 * torch.finfo(torch.bfloat16).eps * wanted.norm()
