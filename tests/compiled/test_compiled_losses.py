"""Every loss as Triton compiles it, bound and launched by Triton's own JIT: values, gradients, and edge cases in which
its interpreter differs."""

from __future__ import annotations

import math

import pytest
import torch

import fused_kd
from fused_kd import check
from fused_kd.core.catalogue import LOSSES

BF16, FLOAT = torch.bfloat16, torch.float32
INF, NAN = math.inf, math.nan
#: Held on chip, and walked.
REGIMES = (1000, 9000)


def compare(loss, dtype, classes, rows=3, **case):
    options = case.pop("options", check.OPTIONS[loss][0])
    outcome = check.compare("triton", check.Case(dtype, rows, classes, options, loss=loss, **case))
    assert outcome.passed, f"{loss} of {rows}×{classes} {dtype}: {outcome}"


def test_all_losses_in_one_process_in_mixed_order(gpu):
    """Triton refuses a launch if a kernel sees other globals than an earlier one; so every loss follows others."""
    for dtype in (BF16, FLOAT):
        for classes in REGIMES:
            for loss in LOSSES:
                compare(loss, dtype, classes)
    for loss in reversed(LOSSES):  # launched once more, after all others
        compare(loss, FLOAT, 1000)


@pytest.mark.parametrize("gpu", [80, 100], indirect=True, ids=["sm_80", "sm_100"])
@pytest.mark.parametrize("loss", ["nkd", "dist", "zipf_ls", "uskd"])
def test_other_gpus(gpu, loss):
    for dtype, classes in ((BF16, 1000), (FLOAT, 9000)):
        compare(loss, dtype, classes)


@pytest.mark.parametrize("loss", LOSSES)
def test_schedule_and_contraction(gpu, loss):
    """Warps in reverse order, approximations at their worst, fused products and sums: all that a GPU may do."""
    from tools.ptx import Options

    gpu.options = Options(schedule="backward", noise=1.0, fuse=True)
    compare(loss, FLOAT, 1001)


def gradient_of(loss, student, *others, backend="triton", grad_output=None, **options):
    student = student.detach().clone().requires_grad_()
    value = getattr(fused_kd, LOSSES[loss].function)(student, *others, backend=backend, **options)
    value.backward(torch.ones_like(value) if grad_output is None else grad_output)
    return value.detach(), student.grad


def inputs(loss, rows, classes, dtype=FLOAT, spread=2.0):
    case = check.Case(dtype, rows, classes, {}, spread=spread, loss=loss)
    student, other, target = case.inputs("cpu")
    return student, *([] if loss == "tf_kd" else [other]), target


@pytest.mark.parametrize(("classes", "width"), [(1000, 1024), (1001, 1008), (9000, 9008), (9001, 9016), (9003, 9008)])
@pytest.mark.parametrize("loss", ["nkd", "kd", "js", "dist"])
def test_padding(gpu, loss, classes, width):
    """The padding holds NaN; its gradient is 0, and the rows' gradients begin where their logits do."""
    *logits, target = inputs(loss, 3, width)
    target = target.clamp(max=classes - 1)
    exact = gradient_of(loss, *(x[:, :classes].double() for x in logits), target, backend="reference")
    for x in logits:
        x[:, classes:] = NAN
    value, gradient = gradient_of(loss, *logits, target, num_classes=classes)
    for ours, wanted in ((value, exact[0]), (gradient[:, :classes], exact[1])):
        assert check.relative_error(ours, wanted, 2.0) < 1e-5
    assert not gradient[:, classes:].any()


COLUMNS = {
    "one row": lambda x: x[:1],
    "equal rows": lambda x: x[:1].repeat(4, 1),
    "nearly equal rows": lambda x: x[:1] + 1e-6 * x[1:5],
    "a constant column": lambda x: torch.cat([torch.zeros_like(x[:5, :1]), x[:5, 1:]], 1),
}


@pytest.mark.parametrize("classes", [50, 9001])
@pytest.mark.parametrize("columns", COLUMNS)
def test_columns_that_hardly_vary(gpu, columns, classes):
    """A sum of squared rounding errors must not be negative: its root was NaN if the compiler contracted p - mean."""
    student, teacher = torch.randn(2, 6, classes)
    student, teacher = COLUMNS[columns](student), COLUMNS[columns](teacher)
    target = torch.randint(classes, (len(student),))
    loss, gradient = gradient_of("dist", student, teacher, target)
    exact, exact_gradient = gradient_of("dist", student.double(), teacher.double(), target, backend="reference")
    assert torch.isfinite(gradient).all()
    assert abs(loss - exact) < 1e-5
    if columns == "a constant column":  # of the others the derivative is 1e8 times roundings
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("classes", [64, 1000, 5000])
def test_equal_keys(gpu, classes):
    """Equal logits rank by class, wherever the compiler computes a key."""
    student = torch.randint(3, (4, classes)).float()
    weak, target = student / 2, torch.tensor([0, 1, classes - 1, -100])
    ours = gradient_of("uskd", student, weak, target, beta=1.0)
    exact = gradient_of("uskd", student.double(), weak.double(), target, beta=1.0, backend="reference")
    for value, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "an odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "part of wider rows": lambda x: torch.cat([x.new_zeros(len(x), 3), x, x.new_zeros(len(x), 2)], 1)[:, 3:-2],
    "one row again and again": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("loss", ["nkd", "dist", "zipf_ls", "uskd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(gpu, loss, layout):
    """The interpreter, like a GPU, refuses a vector load from a misaligned address."""
    for classes in (40, 9000):
        student, *others, target = inputs(loss, 3, classes, BF16)
        given = LAYOUTS[layout](student)
        value, gradient = gradient_of(loss, given, *others, target)
        wanted, wanted_gradient = gradient_of(loss, given.contiguous(), *others, target)
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("incoming", [INF, NAN])
def test_ignored_rows_have_no_gradient_whatever_comes_in(gpu, loss, incoming):
    student, *others, target = inputs(loss, 3, 40)
    _, gradient = gradient_of(loss, student, *others, target, grad_output=torch.tensor(incoming))
    assert (gradient[target == -100] == 0).all()
    assert not torch.isfinite(gradient[target != -100]).all()
    _, weighted = gradient_of(
        loss, student, *others, target, weight=torch.tensor([0.0, 1.0, 1.0]), grad_output=torch.tensor(incoming)
    )
    assert (weighted[0] == 0).all()


@pytest.mark.parametrize("loss", ["nkd", "js", "dist", "uskd", "zipf_ls"])
def test_weighted_rows(gpu, loss):
    compare(loss, FLOAT, 100, rows=5, weighted=True)


@pytest.mark.parametrize("loss", ["nkd", "uskd"])
def test_float16_mean(gpu, loss):
    """Stored times a power of two, which the mean's divisor removes later."""
    compare(loss, torch.float16, 100, rows=5, options={**check.OPTIONS[loss][0], "ce_weight": 1.0})


@pytest.mark.parametrize("classes", [100, 5000])
def test_probability_targets(gpu, classes):
    for loss in ("nkd", "uskd"):
        compare(loss, BF16, classes, options={**check.OPTIONS[loss][0], "ce_weight": 1.0}, soft=True)


def test_no_kernel_does_what_no_program_should(gpu):
    """Races, unwritten shared memory and shuffles outside their mask fail a launch at once; that they do is tested in
    tests/ptx. Here: that something was launched at all."""
    compare("nkd", FLOAT, 100)
    assert gpu.launches and not gpu.problems


def test_equal_keys_in_float64(gpu):
    """The float64 exponential has branches, and what a compiler fuses between them can differ per element."""
    generator = torch.Generator().manual_seed(21)
    student = (torch.randn(9, 16, generator=generator, dtype=torch.float64) * 8).round() / 8
    target = torch.randint(16, (9,), generator=generator)
    ours = gradient_of("uskd", student, student / 2, target, beta=1.0)
    exact = gradient_of("uskd", student, student / 2, target, beta=1.0, backend="reference")
    for value, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-14)


def test_keys_of_subnormal_probabilities(gpu):
    """The hardware's exponential flushes them to 0, which would make them all equal."""
    weak = torch.tensor([[0.0, *(-102.0 + 2 * k for k in range(7)), -88.5]])
    student, target = torch.zeros_like(weak), torch.tensor([0])
    _, ours = gradient_of("uskd", student, weak, target, beta=1.0, rank="weak")
    _, exact = gradient_of("uskd", student, weak, target, beta=1.0, rank="weak", backend="reference")
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", REGIMES)
def test_reverse_kl_of_a_certain_student(gpu, classes):
    """Where p = 1, the slope and its mean must be equal to the bit, wherever the compiler contracts."""
    student, teacher = torch.randn(2, 3, classes, generator=torch.Generator().manual_seed(0))
    student[:, 1] += 1000.0
    teacher[:, 2] += 1300.0
    outcome = check.compare_inputs("triton", student, teacher, torch.zeros(3).long(), {"beta": 1.0}, loss="js")
    assert outcome.passed, outcome
