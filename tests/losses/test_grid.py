"""Loss and gradient over dtypes and shapes, within the eager form's own error against float64 (fused_kd/check.py)."""

import pytest
import torch

import fused_kd
from fused_kd import check
from fused_kd.core.catalogue import LOSSES

# Around the vector lengths, the block of a row (128 vectors), and the sizes that people train with.
CLASSES = (2, 3, 10, 100, 1000, 1001, 4096, 21841, 128256)
DTYPES = pytest.mark.parametrize("dtype", check.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def affordable(backend, rows, classes):
    """Triton's interpreter runs a row of 1000 classes in about as long as the GPU runs a million of them."""
    name, device = backend
    return name != "triton" or device == "cuda" or (rows <= 7 and classes <= 1001)


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_far_from_zero(fused, native, loss):
    """A row's logits lie around 1000, where float32 has four decimals: what is computed from them is relative."""
    name, device = fused
    if check.backends.unavailable(name, device, loss):
        pytest.skip("no kernel")
    for chosen in native.instruction_sets() if name == "native" and device == "cpu" else ("auto",):
        native.instruction_set = native.instruction_set if chosen == "auto" else chosen
        for options in check.OPTIONS[loss]:
            for classes in (2, 33):
                student, other, target = check.Case(torch.float32, 7, classes, options, loss=loss).inputs(device)
                outcome = check.compare_inputs(name, student + 1000, other - 1000, target, options, loss=loss)
                assert outcome.passed, (chosen, options, classes, outcome)


@DTYPES
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("rows", (0, 1, 7, 77))
def test_within_budget(fused, dtype, rows, classes):
    if not affordable(fused, rows, classes):
        pytest.skip("too slow under Triton's interpreter")
    if rows * classes > 1_000_000 and dtype in (torch.float64, torch.float16):
        pytest.skip("the other two dtypes cover this size")
    name, device = fused
    options = check.OPTIONS["nkd"] if rows == 7 else check.OPTIONS["nkd"][:1]
    for option in options:
        case = check.Case(dtype, rows, classes, option)
        outcome = check.compare(name, case, device)
        assert outcome.passed, (case, outcome)


@DTYPES
@pytest.mark.parametrize("temperature", (1.0, 3.0))
def test_probability_targets(fused, dtype, temperature):
    name, device = fused
    for classes in (3, 100, 1001):
        case = check.Case(dtype, 7, classes, {"temperature": temperature, "ce_weight": 1.0}, soft=True)
        outcome = check.compare(name, case, device)
        assert outcome.passed, (case, outcome)


@DTYPES
def test_saturated_rows(fused, dtype):
    """Gaps of hundreds between logits: the target far above the rest, and far below."""
    name, device = fused
    for classes in (3, 10, 1000):
        case = check.Case(dtype, 7, classes, {"ce_weight": 1.0}, spread=100.0)
        outcome = check.compare(name, case, device)
        assert outcome.passed, (case, outcome)


@pytest.mark.parametrize("student_dtype", check.DTYPES)
@pytest.mark.parametrize("teacher_dtype", check.DTYPES)
def test_mixed_dtypes(fused, student_dtype, teacher_dtype):
    name, device = fused
    student, teacher, target = check.Case(torch.float64, 7, 100, {}).inputs(device)
    outcome = check.compare_inputs(
        name, student.to(student_dtype), teacher.to(teacher_dtype), target, {"temperature": 2.0}
    )
    assert outcome.passed, outcome


@DTYPES
@pytest.mark.parametrize("layout", ("transposed", "sliced", "every_other_class", "offset", "expanded_teacher"))
def test_strides(fused, dtype, layout):
    name, device = fused
    student, teacher, target = check.Case(dtype, 7, 101, {}).inputs(device)
    if layout == "transposed":
        student, teacher = student.t().contiguous().t(), teacher.t().contiguous().t()
    elif layout == "sliced":
        student, teacher = student[:, 3:93], teacher[:, 2:92]
        target = torch.where(target >= 0, target % 90, target)
    elif layout == "every_other_class":
        student, teacher = student[:, ::2], teacher[:, ::2]
        target = torch.where(target >= 0, target % 51, target)
    elif layout == "offset":
        student, teacher, target = student[1::2], teacher[1::2], target.repeat_interleave(2)[3:10:2][:3]
    else:
        teacher = teacher[:1].expand(7, 101)
    outcome = check.compare_inputs(name, student, teacher, target, {"ce_weight": 0.5})
    assert outcome.passed, outcome


@DTYPES
def test_grad_output_of_any_stride(fused, dtype):
    """Of sum().backward() the incoming gradient has stride 0, of a transposed use any other."""
    name, device = fused
    student, teacher, target = check.Case(dtype, 8, 50, {}).inputs(device)
    wide = torch.rand(8, 3, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for grad_output in (wide[:1, 0].expand(8), wide[:, 1], wide[:, 2].flip(0)):
        # Powers of two: the stored gradient is rounded to its dtype once, and scaling it adds no second rounding.
        grad_output = torch.exp2(torch.floor(4 * grad_output))
        outcome = check.compare_inputs(name, student, teacher, target, {"reduction": "none"}, grad_output)
        assert outcome.passed, outcome


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_any_grad_output_costs_half_precision_one_more_rounding(fused, dtype):
    name, device = fused
    student, teacher, target = check.Case(dtype, 8, 50, {}).inputs(device)
    options = {"reduction": "none"}
    grad_output = torch.rand(8, device=device)
    _, stored = check.evaluate(name, student, teacher, target, options, torch.ones(8, device=device))
    _, scaled = check.evaluate(name, student, teacher, target, options, grad_output)
    rounded = (stored.float() * grad_output[:, None]).to(dtype)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds. A float16 gradient is kept multiplied by a power of two
    # and has digits where the one returned is subnormal: there they are a step apart.
    cut = name == "triton" and device == "cpu" and dtype == torch.bfloat16
    limits = torch.finfo(dtype)
    atol = limits.smallest_normal * limits.eps if dtype == torch.float16 else 0.0
    torch.testing.assert_close(scaled.float(), rounded.float(), rtol=limits.eps if cut else 0.0, atol=atol)
    assert check.compare_inputs(name, student, teacher, target, options, torch.ones(8, device=device)).passed


def test_leading_dimensions(fused):
    name, device = fused
    student = torch.randn(2, 3, 20, device=device, requires_grad=True)
    teacher = torch.randn(2, 3, 20, device=device)
    target = torch.randint(20, (2, 3), device=device)
    loss = fused_kd.nkd_loss(student, teacher, target, reduction="none", backend=name)
    assert loss.shape == (2, 3)
    flat = fused_kd.nkd_loss(student.reshape(6, 20), teacher.reshape(6, 20), target.reshape(6), reduction="none")
    torch.testing.assert_close(loss.reshape(6), flat)
    single = fused_kd.nkd_loss(student[0, 0], teacher[0, 0], target[0, 0], reduction="none", backend=name)
    torch.testing.assert_close(single, loss[0, 0])
    parts = fused_kd.nkd_loss(student, teacher, target, reduction="none", backend=name, return_parts=True)[1]
    assert parts.target.shape == (2, 3)


@pytest.mark.large
def test_more_than_two_to_the_31_elements():
    """Offsets are 64-bit: the last rows of a bfloat16 matrix of 2^31 + elements are like those of a small one."""
    classes, rows = 128256, 16800
    generator = torch.Generator().manual_seed(0)
    student = torch.empty(rows, classes, dtype=torch.bfloat16).normal_(generator=generator)
    teacher = student.flip(1).contiguous() if rows < 100 else student  # one matrix is 4.3 GB
    target = torch.randint(classes, (rows,), generator=generator)
    student.requires_grad_()
    assert student.numel() > 2**31
    fused_kd.nkd_loss(student, teacher.detach(), target, reduction="sum").backward()
    tail = student[-3:].detach().clone().requires_grad_()
    fused_kd.nkd_loss(tail, tail.detach(), target[-3:], reduction="sum").backward()
    assert torch.equal(student.grad[-3:], tail.grad)


def certain_networks(name, classes, gap):
    """A student that is certain of class 1 and a teacher that is certain of class 2."""
    generator = torch.Generator().manual_seed(0)
    rows = 5 if name == "triton" else 100
    student, teacher = torch.randn(2, rows, classes, generator=generator)
    student[:, 1] += gap * (1 + torch.rand(rows, generator=generator))
    teacher[:, 2] += gap * (1 + torch.rand(rows, generator=generator))
    return student, teacher, torch.zeros(rows, dtype=torch.int64)


@pytest.mark.parametrize("gap", (20.0, 60.0, 1000.0, 6e4))
@pytest.mark.parametrize("classes", (5, 1001))
def test_reverse_kl_of_a_certain_student(fused, classes, gap):
    """Its slope is as large as the gap. Where the student is certain of a class, p = 1 leaves no gradient, and one unit
    in p's last place would leave as much of the slope."""
    name, device = fused
    inputs = (each.to(device) for each in certain_networks(name, classes, gap))
    outcome = check.compare_inputs(name, *inputs, {"beta": 1.0}, loss="js")
    assert outcome.passed, outcome


@pytest.mark.parametrize("beta", (1e-4, 1e-3, 0.3, 0.7, 0.999, 0.9999))
def test_rounded_weights_of_js(fused, beta):
    """The mixture's weights sum to 1: a rounding error of their sum would be one of the loss, which is small here."""
    name, device = fused
    inputs = (each.to(device) for each in certain_networks(name, 37, 60.0))
    outcome = check.compare_inputs(name, *inputs, {"beta": beta}, loss="js")
    assert outcome.passed, outcome


@pytest.mark.parametrize("beta", (2e-8, 1e-9))
def test_a_weight_of_js_below_the_rounding_of_1(fused, beta):
    """It is not 0: then m would be p alone, and the loss as large as the gap, or infinite."""
    name, device = fused
    student, teacher, _ = (each.to(device) for each in certain_networks(name, 37, 1000.0))
    found = fused_kd.js_loss(student, teacher, beta=beta, backend=name)
    exact = fused_kd.js_loss(student.double(), teacher.double(), beta=beta, backend="reference")
    assert abs(found.double() - exact) <= torch.finfo(torch.float32).eps / 2
