"""DIST of rows that do not vary, or hardly: there the correlation's derivative is 1e8, so that the least difference
between the probabilities of equal logits, the target's among them, shows. Jensen-Shannon has no such point.

Expected is the reference in float64 of the same numbers.
"""

from __future__ import annotations

import pytest
import torch

import fused_kd
from fused_kd import dist_loss, js_loss

ROWS = 24
#: Wide enough for a sum of rounded numbers, and nothing that 1e8 has multiplied.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=["native", "triton"])
def backend(request):
    """Each instruction set's build of the core, one after the other, or Triton's interpreter; as a function to loop
    over."""
    if request.param == "native":
        native = request.getfixturevalue("native")

        def each():
            for name in native.instruction_sets():
                native.instruction_set = name
                yield "native"

        return each
    from fused_kd.backends import triton

    if triton.unavailable("cpu") is not None:
        pytest.skip("Triton does not run here")
    if request.node.callspec.params.get("classes") == 2500:
        pytest.skip("too slow under Triton's interpreter")
    return lambda: ["triton"]


def make(classes, flat, dtype, value=1.7):
    """Student and teacher, the sides named by ``flat`` constant along each row, and targets from first to last."""
    generator = torch.Generator().manual_seed(classes)
    student, teacher = torch.randn(2, ROWS, classes, generator=generator, dtype=torch.float64)
    for name, logits in (("student", student), ("teacher", teacher)):
        if name in flat:
            logits[:] = value
            logits[::2] = 0.0
    target = torch.randint(classes, (ROWS,), generator=generator)
    target[:4] = torch.tensor([0, 1, classes - 2, classes - 1])
    return student.to(dtype), teacher.to(dtype), target


def run(loss, student, teacher, target, backend, **options):
    """The first part and the gradient."""
    student = student.detach().requires_grad_()
    value, parts = loss(student, teacher, target, backend=backend, return_parts=True, **options)
    value.sum().backward()
    return parts[0], student.grad


def compare(backend, loss, student, teacher, target, tolerance=None, **options):
    tolerance = TOLERANCE[student.dtype] if tolerance is None else tolerance
    exact_target = target.double() if target.is_floating_point() else target
    part, gradient = run(loss, student.double(), teacher.double(), exact_target, "reference", **options)
    largest = float(gradient.abs().max())
    for name in backend():
        ours, our_gradient = run(loss, student, teacher, target, name, **options)
        of_part = min(tolerance, 1e-5)  # half types are accumulated in float32
        torch.testing.assert_close(ours.double(), part, rtol=of_part, atol=of_part)
        torch.testing.assert_close(our_gradient.double(), gradient, rtol=tolerance, atol=tolerance * max(largest, 1.0))


@pytest.mark.parametrize("flat", ("student", "teacher", "student and teacher"))
@pytest.mark.parametrize("classes", (2, 10, 45, 1000, 2500))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gamma", (0.0, 1e-3))
def test_constant_rows(backend, flat, classes, dtype, gamma):
    student, teacher, target = make(classes, flat, dtype)
    compare(backend, dist_loss, student, teacher, target, gamma=gamma, beta=1e-3)  # a gradient that float16 holds


@pytest.mark.parametrize("flat", ("student", "teacher", "student and teacher"))
@pytest.mark.parametrize(
    "options",
    (
        {"reduction": "none"},
        {"weight": torch.linspace(0.0, 2.0, ROWS), "gamma": 0.0},
        {"temperature": 4.0, "gamma": 0.0},
        {"ce_weight": 0.5, "label_smoothing": 0.1, "gamma": 0.0},
        {"logit_standardization": True, "gamma": 0.0, "beta": 1e-9},
        {"logit_standardization": True, "ce_weight": 0.5, "temperature": 2.0, "gamma": 0.0, "beta": 1e-9},
    ),
    ids=lambda options: ", ".join(options),
)
@pytest.mark.parametrize("labels", ("indices", "probabilities"))
def test_constant_rows_with_options(backend, flat, options, labels):
    student, teacher, target = make(33, flat, torch.float32)
    if labels == "probabilities":
        target = 0.9 * torch.nn.functional.one_hot(target, 33).float() + 0.1 / 33
    compare(backend, dist_loss, student, teacher, target, **{"beta": 0.01, **options})


@pytest.mark.parametrize("classes", (10, 1000, 2500))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("step", (1e-3, -1e-3, 0.1, -0.1, 30.0))
@pytest.mark.parametrize("at", ("target", "another"))
def test_constant_but_for_one_class(backend, classes, dtype, step, at):
    """What is left is a difference of the size of ``step``, of numbers rounded as such."""
    student, teacher, target = make(classes, "student", dtype)
    student[torch.arange(ROWS), target if at == "target" else (target + 1) % classes] += step
    tolerance = TOLERANCE[dtype] * max(1.0, 0.1 / abs(step))
    compare(backend, dist_loss, student, teacher, target, tolerance, gamma=0.0, beta=0.01)


@pytest.mark.parametrize("classes", (10, 1000, 2500))
@pytest.mark.parametrize("spread", (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3))
def test_rows_that_hardly_vary(backend, classes, spread):
    student, teacher, target = make(classes, "", torch.float64)
    student, teacher = (1.7 + spread * student).float(), (spread * teacher).float()
    tolerance = 1e-5 * max(1.0, 0.1 / spread)
    compare(backend, dist_loss, student, teacher, target, tolerance, gamma=0.0, beta=0.01)


def test_classes_that_cannot_occur(backend):
    """The others' probabilities are equal, though the row is not constant."""
    student, teacher, target = make(1000, "student and teacher", torch.float32)
    student[:, 500] = teacher[:, 500] = teacher[:, 501] = float("-inf")
    target[target == 500] = 499
    compare(backend, dist_loss, student, teacher, target, gamma=0.0)


@pytest.mark.parametrize("flat", ("student", "teacher", "student and teacher"))
@pytest.mark.parametrize("beta", (0.5, 1.0))
def test_jensen_shannon(backend, flat, beta):
    student, teacher, target = make(45, flat, torch.float32)
    compare(backend, js_loss, student, teacher, target, beta=beta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flat", ["student", "teacher", "both"])
@pytest.mark.parametrize("classes", [10, 100, 2500])
def test_rows_that_are_alike_have_columns_without_variation(backend, classes, flat, dtype):
    """A head of zeros with a bias, and labels that differ: a row's sum must not tell which class is its target."""
    student, teacher, target = make(classes, "", dtype)
    for name, logits in (("student", student), ("teacher", teacher)):
        if flat in (name, "both"):
            logits[:] = 3 * logits[0]
    target[4:8] = int(student[0].argmax())
    compare(backend, dist_loss, student, teacher, target)


@pytest.mark.parametrize("labels", ["smoothed", "mixed"])
@pytest.mark.parametrize("loss", ["kd", "dkd", "js"])
def test_z_scores_of_constant_rows_leave_the_cross_entropy_its_labels(backend, loss, labels):
    """Their gradients are 1e7 times as large, and cancel where student and teacher agree."""
    function = getattr(fused_kd, f"{loss}_loss")
    student, teacher, target = torch.zeros(4, 10), torch.zeros(4, 10), torch.tensor([3, 0, 9, 5])
    if labels == "mixed":
        target = 0.7 * torch.eye(10)[target] + 0.3 * torch.eye(10)[(target + 2) % 10]
    options = {"ce_weight": 1.0, "label_smoothing": 0.1 if labels == "smoothed" else 0.0, "logit_standardization": True}
    compare(backend, function, student, teacher, target, tolerance=1e-6, **options)
