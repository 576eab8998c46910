"""The Triton kernels of the losses with a top-k teacher, against the reference."""

import pytest
import torch

from fused_kd.backends import triton as backend
from fused_kd.reference import topk
from tests.support.topk_cases import FUSED, assert_same, assert_within_eager_error, check_impossible_labels, make, run

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(backend.unavailable("cpu") is not None, reason=str(backend.unavailable("cpu"))),
]

MORE = [
    {},
    {"temperature": 3.0},
    {"temperature": 2.0, "ce_weight": 0.6, "label_smoothing": 0.1, "weighted": True, "gradient_scale": 4.0},
    {"temperature": 2.0, "ce_weight": 0.6, "label_smoothing": 0.1, "weighted": True, "labels": True},
]


def _thorough(cases, often):
    """Mark similar cases as thorough, except those that every run takes: they are slow on the interpreter."""
    return [case if often(*case) else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("loss", "rest", "more"),
    _thorough(
        [(loss, rest, more) for loss, rest in FUSED for more in range(len(MORE))],
        lambda loss, rest, more: more == 2 or loss == "nkd" or (more == 3 and rest in ("drop", "bucket")),
    ),
)
def test_a_loss_is_the_reference(loss, rest, more):
    more = MORE[more]
    for seed, (classes, k, pads) in enumerate([(7, 3, 0), (2, 1, 0), (9, 9, 0), (9, 8, 3), (600, 64, 0)]):
        assert_same(backend, make(loss, rest, classes, k, pads=pads, seed=seed, **more))


@pytest.mark.parametrize(
    ("loss", "rest", "dtype"),
    _thorough(
        [(loss, rest, dtype) for loss, rest in FUSED for dtype in (torch.float32, torch.bfloat16, torch.float16)],
        lambda loss, rest, dtype: dtype == torch.float32 or rest == "bucket",
    ),
    ids=str,
)
def test_as_exact_as_eager(loss, rest, dtype):
    for more in MORE[2:]:
        assert_within_eager_error(backend, make(loss, rest, 1501, 32, rows=3, **more), dtype)
    if dtype == torch.float32:
        assert_within_eager_error(backend, make(loss, rest, 501, 8, rows=3, spread=30.0, temperature=3.0), dtype)


@pytest.mark.parametrize(
    ("loss", "rest", "temperature"),
    _thorough(
        [(loss, rest, temperature) for loss, rest in FUSED for temperature in (1.0, 2.0)],
        lambda loss, rest, temperature: temperature == 2.0 or loss == "nkd",
    ),
)
def test_classes_that_cannot_occur(loss, rest, temperature):
    problem = make(loss, rest, 210, 5, rows=7, temperature=temperature, ce_weight=0.5)
    student, target = problem.student, problem.target
    student[0, ::3] = -torch.inf
    student[2, problem.indices[2, 0]] = -torch.inf
    student[3, target[3]] = -torch.inf
    student[4, target[4]] = -torch.inf
    if loss != "dkd":  # infinite, and at the target eager's gradient is 0 where it is alone, by DKD's binary term
        student[5, torch.arange(210) != target[5]] = -torch.inf
    student[6, 0] = -torch.inf
    assert_same(backend, problem)
    assert (run(backend, problem)[2][student == -torch.inf] == 0).all()


@pytest.mark.parametrize(("loss", "rest"), [("nkd", "bucket"), ("wsld", "uniform")])
def test_labels_of_classes_that_cannot_occur(loss, rest):
    check_impossible_labels(backend, loss, rest, 210)


@pytest.mark.parametrize("rest", topk.RESTS)
def test_nan_stays_in_its_row(rest):
    """What the CPU refuses is a row of NaN on a GPU: a repeated kept class, or an invalid one."""
    problem = make("nkd", rest, 60, 5, rows=10, temperature=2.0)
    student, indices, target = problem.student, problem.indices, problem.target
    clean = run(backend, problem)
    outside = next(j for j in range(60) if j not in indices[2] and j != target[2])
    student[2, outside] = student[3, indices[3, 0]] = student[4, target[4]] = torch.nan
    problem.log_probs[5, 1] = torch.nan
    indices[6, 0], indices[7, 0], target[8] = indices[6, 1], 60, 60
    found = run(backend, problem)
    bad = [2, 3, 4, 5, 6, 7, 8]
    assert found[0][bad].isnan().all() and found[2][bad].isnan().all()
    for place, (ours, exact) in enumerate(zip(found, clean, strict=True)):
        of_rows = (each.T if place == 1 else each for each in (ours, exact))
        assert torch.equal(*(each[[0, 1, 9]] for each in of_rows))


@pytest.mark.parametrize(("loss", "rest"), FUSED)
def test_pads_alone(loss, rest):
    """With renormalization, a row without kept classes is NaN. With another rest, all classes are rest."""
    problem = make(loss, rest, 60, 5, rows=4, temperature=2.0)
    problem.indices[2] = -1
    if rest != "renormalize":
        assert_same(backend, problem)
        return
    value, _, gradient = run(backend, problem)
    assert value.isnan().tolist() == [False, False, True, False]
    assert gradient.isnan().all(dim=1).tolist() == [False, False, True, False]
    assert not gradient[[0, 1, 3]].isnan().any()


def test_rows_that_do_not_count_and_none_at_all():
    problem = make("dkd", "bucket", 40, 4, weighted=True, ce_weight=1.0, temperature=2.0)
    for row in (1, 4):
        problem.student[row], problem.log_probs[row], problem.indices[row] = torch.nan, torch.nan, 99
    loss, parts, gradient = run(backend, problem)
    for row in (1, 4):
        assert loss[row] == 0 and (parts[:, row] == 0).all() and (gradient[row] == 0).all()
    without = run(backend, problem._replace(options=problem.options._replace(wanted=(False,))))
    assert without[2] is None and torch.equal(without[0], loss)
    empty = problem._replace(factors=None, **{
        name: getattr(problem, name)[:0] for name in ("student", "log_probs", "indices", "target")
    })  # fmt: skip
    assert run(backend, empty)[2].shape == (0, 40)


def test_columns_with_a_stride_and_logits_far_from_zero():
    problem = make("kd", "uniform", 300, 7, temperature=2.0, ce_weight=1.0, label_smoothing=0.1)
    assert_same(backend, problem._replace(student=(problem.student + 5e6).T.contiguous().T), tolerance=1e-7)
    assert_within_eager_error(backend, problem._replace(student=problem.student + 1024.0), torch.float32)


@pytest.mark.parametrize(
    ("loss", "rest"), _thorough(FUSED, lambda loss, rest: (loss, rest) in (("nkd", "bucket"), ("kd", "uniform")))
)
def test_pieces_of_rows_are_the_row(loss, rest):
    """A piece without a class, a piece far below the other, and a piece of one column, kept in some rows only."""
    problem = make(loss, rest, 150, 12, rows=6, pads=1, **MORE[2])
    problem.student[3, :40] -= 3000.0
    problem.student[4, 0] = torch.nan
    for widths in ((40, 110), (1, 0, 149)):
        assert_same(backend, problem, widths=widths)
    assert_within_eager_error(backend, make(loss, rest, 150, 12, **MORE[2]), torch.bfloat16, widths=(70, 80))
