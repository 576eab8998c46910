"""A repeated call is not planned or bound again (fused_kd/backends/triton/replay.py); results are the
same."""

from __future__ import annotations

import threading

import pytest
import torch

import fused_kd
from fused_kd import autograd, check, repeated
from fused_kd.backends.triton.plans import rows
from fused_kd.core.catalogue import LOSSES
from fused_kd.core.options import HyperParameters, Options

replay = pytest.importorskip("fused_kd.backends.triton.replay")


@pytest.fixture
def planned(gpu, monkeypatch):
    """The names of the kernels that Triton's JIT launches, per call."""
    calls = []
    run = replay.launching.run

    def noted(launches, device):
        calls.append([launch.kernel for launch in launches])
        return run(launches, device)

    monkeypatch.setattr(replay, "_kept", {})
    monkeypatch.setattr(replay.launching, "run", noted)
    return calls


def step(loss, tensors, **options):
    return check.evaluate("triton", *tensors, options, loss=loss)


def make(loss, seed, rows=5, classes=100, dtype=torch.float32, **case):
    return check.Case(dtype, rows, classes, {}, seed=seed, loss=loss, **case).inputs("cpu")


def assert_reference(loss, tensors, ours, **options):
    exact = check.evaluate(
        "reference", *(t.double() if t.is_floating_point() else t for t in tensors), options, loss=loss
    )
    for value, wanted in zip(ours, exact, strict=True):
        assert check.relative_error(value, wanted, 2.0) < 1e-4


@pytest.mark.parametrize("loss", LOSSES)
def test_the_second_call_is_not_planned(planned, loss):
    """New values at new addresses: the same kernels, and the right results."""
    for seed in range(3):
        tensors = make(loss, seed)
        assert_reference(loss, tensors, step(loss, tensors))
        if seed == 0:
            first = len(planned)
        assert len(planned) == first > 0


@pytest.fixture
def recalled(monkeypatch):
    """Calls of Triton are known by an earlier one, as on a GPU. Gives their op's functions."""
    run, functions = autograd.run_function, []

    def noted(function, arguments, *further):
        functions.append(function)
        return run(function, arguments, *further)

    monkeypatch.setattr(repeated, "_known", {})
    monkeypatch.setattr(repeated, "on_gpu", lambda logits: True)
    monkeypatch.setattr(autograd, "run_function", noted)
    return functions


@pytest.mark.parametrize("loss", LOSSES)
def test_the_third_call_only_launches(planned, recalled, loss):
    """The first is checked, and the second looks whether its launches are all that there is to do."""
    for seed in range(4):
        tensors = make(loss, seed)
        assert_reference(loss, tensors, step(loss, tensors))
    repeats = [type(function) is replay.Repeat for function in recalled]
    assert repeats == [False, False, True, True]


def test_a_function_that_does_more_than_launch_is_not_replaced():
    """Or one whose tensors are not all arguments or results."""
    student, teacher, target = make("nkd", 0)
    options = Options(HyperParameters(gamma=1.5), -100, "mean", (True,), (1.0,), "nkd")

    def plain(student, teacher, target):
        return rows.row_loss(student, teacher, target, None, None, options)

    def writes(*given):
        results = plain(*given)
        results[-1].mul_(2.0)
        return results

    def copies(student, teacher, target):
        return plain(student, teacher.clone(), target)

    def returns_another(*given):
        loss, *others = plain(*given)
        return loss + 1.0, *others

    def twice(*given):
        plain(*given)
        return plain(*given)

    plain(student, teacher, target)
    for function, whole in ((plain, True), (writes, False), (copies, False), (returns_another, False), (twice, False)):
        _, repeat = replay.trace(function, (student, teacher, target))
        assert (repeat is not None) == whole
    assert replay.trace(plain, (student, student, target))[1] is None
    others = make("nkd", 1)
    _, repeat = replay.trace(plain, (student, teacher, target))
    assert all(torch.equal(a, b) for a, b in zip(repeat(*others), plain(*others), strict=True))


@pytest.mark.parametrize("known", [False, True])
def test_what_a_plan_looks_at_makes_another_one(planned, request, known):
    if known:
        request.getfixturevalue("recalled")
    student, teacher, target = make("nkd", 0)
    target = torch.tensor([3, 17, 5, 99, 0])
    wide, shifted = torch.randn(5, 120), torch.randn(501)[1:].view(5, 100)
    probabilities = torch.softmax(torch.randn(5, 100), 1)
    kinds = [
        ((student, teacher, target), {}),
        ((student, teacher, target), {"gamma": 2.0}),
        ((student, teacher, target), {"temperature": 2.0}),
        ((student, teacher, target), {"reduction": "sum"}),
        ((student, teacher, target), {"ignore_index": 3}),
        ((student, teacher, target), {"weight": torch.rand(5)}),
        ((student[:4], teacher[:4], target[:4]), {}),
        ((student, wide[:, :100], target), {}),
        ((wide, wide[:, :104], target), {"num_classes": 100}),
        ((wide, wide[:, :104], target), {"num_classes": 101}),
        ((student, shifted, target), {}),  # not a multiple of 16 bytes
        ((student, teacher.bfloat16(), target), {}),
        ((student, teacher, torch.softmax(teacher, 1)), {}),
        ((student, student.clone(), target), {}),
        ((student, probabilities, probabilities), {"ce_weight": 1.0}),  # one tensor in two places, and then two
        ((student, teacher, probabilities), {"ce_weight": 1.0}),
    ]
    thrice = [kind for kind in kinds for _ in range(3)]
    for tensors, options in (*thrice, *reversed(kinds)):
        assert_reference("nkd", tensors, step("nkd", tensors, **options), **options)
    forward = [kernels for kernels in planned if kernels != ["scale_rows"]]
    assert len(forward) == len(kinds) - 1  # a copy of the student is a teacher as any other


def test_one_tensor_for_both(planned):
    """A student that is its own teacher has one place in the plan; another teacher has its own."""
    student, teacher, target = make("nkd", 0)
    options = Options(HyperParameters(gamma=1.5), -100, "mean", (True,), (1.0,), "nkd")
    for pair in ((student, student), (student, teacher), (student, student), (teacher, student)):
        loss = rows.row_loss(*pair, target, None, None, options)[0]
        wanted = fused_kd.nkd_loss(*pair, target, backend="reference")
        assert abs(loss - wanted) < 1e-5 * wanted.abs().clamp(min=1.0)


def test_nothing_is_held(planned):
    """A kept plan holds no tensor: a batch is freed when the user releases it."""
    for _ in range(2):
        step("dist", make("dist", 0))
    for kept in replay._kept.values():
        for launch in kept.steps:
            assert not any(isinstance(argument, torch.Tensor) for argument in launch.arguments)
            assert all(launch.arguments[where] is None for where, _which in launch.tensors)


def test_forgets_rather_than_grows(planned, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 4)
    tensors = make("nkd", 0)
    for gamma in range(1, 8):
        assert_reference("nkd", tensors, step("nkd", tensors, gamma=float(gamma)), gamma=float(gamma))
        assert len(replay._kept) <= 4


def test_a_plan_of_parts_of_tensors_is_not_kept(planned):
    """PyTorch sorts long rows, a part of the batch at a time."""
    tensors = make("uskd", 0, classes=5000, rows=2)
    for _ in range(2):
        assert_reference("uskd", tensors, step("uskd", tensors))
    assert sum("write_keys" in kernels for kernels in planned) == 2


def test_two_threads(planned):
    """Both use the same kept plan, with their own tensors."""
    batches = [make("nkd", seed) for seed in range(2)]
    wanted = [step("nkd", batch) for batch in batches]
    wrong = []

    def work(batch, values):
        found = [step("nkd", batch) for _ in range(10)]
        wrong.extend(a for each in found for a, b in zip(each, values, strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=work, args=each) for each in zip(batches, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
