"""Properties that hold for any logits, found out by hypothesis."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_kd import check

BACKENDS = [*(name for name in check.runnable("cpu", "nkd") if name != "triton"), "reference"]


@st.composite
def problems(draw):
    rows, classes = draw(st.integers(1, 5)), draw(st.integers(2, 40))
    seed, spread = draw(st.integers(0, 2**31)), draw(st.sampled_from((0.0, 0.1, 1.0, 5.0, 30.0)))
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * spread for _ in "st")
    target = torch.randint(classes, (rows,), generator=generator)
    options = {
        "gamma": draw(st.floats(0, 4)),
        "temperature": draw(st.sampled_from((0.5, 1.0, 4.0))),
        "ce_weight": draw(st.sampled_from((0.0, 1.0))),
        "reduction": draw(st.sampled_from(("mean", "sum"))),
    }
    return draw(st.sampled_from(BACKENDS)), student, teacher, target, options


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(-50, 50))
def test_adding_a_constant_to_a_row_changes_nothing(problem, constant):
    backend, student, teacher, target, options = problem
    loss, gradient = check.evaluate(backend, student, teacher, target, options)
    moved, moved_gradient = check.evaluate(backend, student + constant, teacher - constant, target, options)
    torch.testing.assert_close(moved, loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved_gradient, gradient, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_permuting_classes_permutes_the_gradient(problem, random):
    backend, student, teacher, target, options = problem
    order = list(range(student.shape[1]))
    random.shuffle(order)
    place = torch.tensor([order.index(j) for j in range(len(order))])
    loss, gradient = check.evaluate(backend, student, teacher, target, options)
    moved, moved_gradient = check.evaluate(backend, student[:, order], teacher[:, order], place[target], options)
    torch.testing.assert_close(moved, loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved_gradient, gradient[:, order], rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_each_rows_gradient_sums_to_zero(problem):
    backend, student, teacher, target, options = problem
    _, gradient = check.evaluate(backend, student, teacher, target, options)
    torch.testing.assert_close(gradient.sum(1), torch.zeros_like(gradient[:, 0]), rtol=0, atol=1e-9)
