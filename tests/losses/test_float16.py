"""Gradients stored in float16: the bounds that the power of two they are stored times comes from, and what has none."""

import itertools

import pytest
import torch
from loss_cases import FUSED, function, make, run

from fused_kd.core import stored
from fused_kd.core.catalogue import ROW_LOSSES
from fused_kd.core.options import HyperParameters

TEACHERS = ("nkd", "kd", "dkd", "wsld", "js", "dist")
#: Losses whose gradient has no bound but what the logits make it.
UNBOUNDED = [(loss, {"logit_standardization": True}) for loss in TEACHERS]
UNBOUNDED += [("dist", {}), ("dist", {"weight": True}), ("js", {"beta": 1.0})]
SLOW_BUT_RUN = [("kd", "logit_standardization"), ("dist",)]
unbounded = pytest.mark.parametrize(
    ("place", "options"),
    [(place, options) for place in FUSED for loss, options in UNBOUNDED if place[0] == loss],
    ids=lambda value: "-".join(map(str, value.items() if isinstance(value, dict) else value)),
)


def train(loss, backend, device, options, steps):
    """A small model under autocast with GradScaler, whose head starts at zero: steps skipped, and every loss."""
    torch.manual_seed(0)
    x = torch.randn(16, 8, device=device)
    teacher = x @ torch.randn(8, 6, device=device)
    body, head = torch.nn.Linear(8, 12), torch.nn.Linear(12, 6)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    model = torch.nn.Sequential(body, torch.nn.Tanh(), head).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    scaler = torch.amp.GradScaler(device)
    skipped, losses = 0, []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            logits = model(x)
        assert logits.dtype == torch.float16
        value = function(loss)(logits, teacher.half(), teacher.argmax(1), backend=backend, **options)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
        losses.append(value.item())
    return skipped, losses


@unbounded
def test_a_head_that_starts_at_zero_trains(place, options):
    """Constant logits have a gradient of 1e7 and more, which a GradScaler's first scales take beyond the format."""
    loss, name, device = place
    both = loss == "dist" and "logit_standardization" in options  # 1e7 times 1e8
    if name == "triton" and device == "cpu" and (both or (loss, *options) not in SLOW_BUT_RUN):
        pytest.skip("seconds in the interpreter; the kernels' gradients are compared below")
    if "weight" in options:
        options = {"weight": torch.linspace(0.5, 2.0, 16, device=device)}
    steps = 60 if both else 45
    skipped, losses = train(loss, name, device, options, steps)
    expected, exact = train(loss, "reference", device, options, steps)
    # DIST divides by 1e-8 and what rounding has left of a constant row's deviation.
    assert abs(skipped - expected) <= (3 if loss == "dist" else 1)
    assert expected < (50 if both else 30)
    # Of what the reference has gained, nearly all.
    assert losses[0] - losses[-1] > 0.8 * (exact[0] - exact[-1]) > 0


@unbounded
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
def test_gradients_fit_whatever_their_size(place, options, spread):
    """z-scores and correlations divide by the deviation of the logits; what comes in brings it back into the format."""
    loss, name, device = place
    if "logit_standardization" not in options:
        spread = min(spread, 3.0)  # else the probabilities are 0 and 1, and nothing is left of a gradient
    student, others, target = make(loss, dtype=torch.float16, device=device, scale=spread)
    if "weight" in options:
        options = {"weight": torch.linspace(0.5, 2.0, 6, device=device)}
    leaf = student.double().requires_grad_()
    value = function(loss)(leaf, *(other.double() for other in others), target, backend="reference", **options)
    (exact,) = torch.autograd.grad(value, leaf)
    scale = 2.0 ** (13 - torch.frexp(exact.abs().max()).exponent)
    leaf = student.requires_grad_()
    value = function(loss)(leaf, *others, target, backend=name, **options)
    (ours,) = torch.autograd.grad(value, leaf, scale.to(value.dtype))
    torch.testing.assert_close(ours.double(), exact * scale, rtol=2.0**-9, atol=2e-3 * 2.0**13)


@unbounded
def test_without_a_gradient(place, options):
    """The bound that there is not is not asked for."""
    loss, name, device = place
    student, others, target = make(loss, dtype=torch.float16, device=device)
    if "weight" in options:
        options = {"weight": torch.linspace(0.5, 2.0, 6, device=device)}
    for reduction in ("mean", "none"):
        ours, exact = (
            function(loss)(student, *others, target, backend=each, reduction=reduction, **options)
            for each in (name, "reference")
        )
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_bounds(loss):
    """Of gradients in float64, for logits from nearly equal to far apart."""
    for first, second, temperature in itertools.product((0.0, 0.3, 0.9999), (0.0, 2.0), (0.5, 4.0)):
        own = dict(zip(ROW_LOSSES[loss].own, (first, second), strict=False))
        bound = ROW_LOSSES[loss].bound(HyperParameters(**own, temperature=temperature))
        for scale in (1e-3, 0.3, 3.0, 30.0, 300.0):
            student, others, target = make(loss, rows=200, classes=3, scale=scale)
            gradient = run(loss, "reference", student, others, target, reduction="sum", temperature=temperature, **own)[
                2
            ]
            assert gradient.abs().max() <= bound * (1 + 1e-12), (own, temperature, scale)


def test_what_has_no_bound():
    ones = HyperParameters(beta=1.0, gamma=1.0)
    assert ROW_LOSSES["js"].bound(ones) == ROW_LOSSES["dist"].bound(ones) == torch.inf


def test_what_is_stored_uses_the_range_of_float16():
    """Its largest finite entry is just below 2^15, and neither inf, NaN nor 0 counts or changes."""
    for largest in (1e-30, 3e-6, 1.0, 1e8, 3e37):
        gradient = torch.tensor([[largest, -largest / 1024, 0.0], [torch.nan, torch.inf, -torch.inf]])
        kept, norm = stored.to_half(gradient.clone(), torch.tensor(0.5))
        assert kept.dtype == torch.float16
        assert largest < 1e-18 or 2.0**14 <= kept[0, 0] < 2.0**15
        torch.testing.assert_close(
            kept.double() * norm / 0.5, gradient.double(), equal_nan=True, rtol=2.0**-11, atol=1e-25
        )
    for empty in (torch.zeros(0, 3), torch.zeros(2, 3)):
        kept, norm = stored.to_half(empty.clone(), torch.tensor(0.5))
        assert kept.shape == empty.shape and not kept.any() and norm.isfinite()
