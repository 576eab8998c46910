"""The fused losses with a top-k teacher, against the reference."""

import pytest
import torch

from fused_kd.backends import native
from fused_kd.backends import topk as fused_topk
from fused_kd.core.rows import TopKPiece
from fused_kd.reference import topk
from tests.support import topk_cases
from tests.support.topk_cases import FUSED, assert_same, assert_within_eager_error, make, run

pytestmark = pytest.mark.skipif(native.unavailable("cpu") is not None, reason="without the C++ core")


@pytest.fixture(params=native.instruction_sets() or [""])
def kernels(request, monkeypatch):
    monkeypatch.setattr(native, "instruction_set", request.param)
    return native


SIZES = [(7, 3, {}), (2, 1, {}), (9, 9, {}), (9, 8, {"pads": 3}), (2049, 64, {}), (4097, 1, {}), (300, 299, {})]
MORE = [
    {},
    {"temperature": 3.0},
    {"temperature": 2.0, "ce_weight": 0.6, "label_smoothing": 0.1, "weighted": True, "gradient_scale": 4.0},
]
LABELS = [{"labels": True, "ce_weight": 0.6}, MORE[2] | {"labels": True}]


@pytest.mark.parametrize("more", MORE + LABELS, ids=["plain", "T", "all", "labels", "all labels"])
@pytest.mark.parametrize(("loss", "rest"), FUSED)
def test_a_loss_is_the_reference(kernels, loss, rest, more):
    for seed, (classes, k, sizes) in enumerate(SIZES):
        assert_same(kernels, make(loss, rest, classes, k, seed=seed, **sizes, **more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("loss", "rest"), FUSED)
def test_as_exact_as_eager(kernels, loss, rest, dtype):
    for more in MORE + LABELS:
        assert_within_eager_error(kernels, make(loss, rest, 3001, 32, **more), dtype)
    assert_within_eager_error(kernels, make(loss, rest, 501, 8, spread=30.0, temperature=2.0), dtype)


@pytest.mark.parametrize(("loss", "rest"), FUSED)
def test_nothing_is_left(kernels, loss, rest):
    """u = 0, or the log-probabilities sum to more than 1. At another T, a share of 1e-16 depends on rounding."""
    assert_same(kernels, make(loss, rest, 50, 5, left=0.0))
    assert_same(kernels, make(loss, rest, 50, 5, left=-0.5, temperature=2.0, ce_weight=1.0))


@pytest.mark.parametrize(("loss", "rest"), FUSED)
def test_logits_far_from_zero(kernels, loss, rest):
    problem = make(loss, rest, 2500, 7, temperature=2.0, ce_weight=1.0, label_smoothing=0.1)
    assert_same(kernels, problem._replace(student=problem.student + 5e6), tolerance=1e-7)
    narrow = problem._replace(student=problem.student + 1024.0)
    assert_within_eager_error(kernels, narrow, torch.float32)
    problem = make(loss, rest, 2500, 7, **LABELS[1])
    assert_same(kernels, problem._replace(student=problem.student + 5e6), tolerance=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("loss", "rest"), FUSED)
def test_classes_that_cannot_occur(kernels, loss, rest, temperature):
    """In the rest, among the kept classes, at a target in K or not, and everywhere but at the target."""
    problem = make(loss, rest, 2100, 5, rows=7, temperature=temperature, ce_weight=0.5)
    student, target, indices = problem.student, problem.target, problem.indices
    student[0, ::3] = -torch.inf
    student[2, indices[2, 0]] = -torch.inf
    student[3, target[3]] = -torch.inf
    student[4, target[4]] = -torch.inf
    if loss != "dkd":  # infinite, and at the target eager's gradient is 0 where it is alone, by DKD's binary term
        student[5, torch.arange(2100) != target[5]] = -torch.inf
    student[6, 2048:] = -torch.inf
    assert_same(kernels, problem)
    gradient = run(kernels, problem)[2]
    assert (gradient[student == -torch.inf] == 0).all()
    assert_within_eager_error(kernels, problem._replace(student=student.clamp(min=-1e4)), torch.float32)


@pytest.mark.parametrize(("loss", "rest"), FUSED)
def test_labels_of_classes_that_cannot_occur(kernels, loss, rest):
    topk_cases.check_impossible_labels(kernels, loss, rest, 2100)


@pytest.mark.parametrize(("loss", "rest"), FUSED)
def test_nan_stays_in_its_row(kernels, loss, rest):
    """NaN in the rest, among the kept classes, at a target in K or not, or in the teacher; and an infinite logit."""
    problem = make(loss, rest, 2100, 5, rows=9, temperature=2.0)
    student, indices, target = problem.student, problem.indices, problem.target
    clean = run(kernels, problem)
    outside = [next(j for j in range(2100) if j not in indices[i] and j != target[i]) for i in range(9)]
    bad = [2, 3, 4, 5, 6, 7]
    for row, at in zip(bad, (outside[2], indices[3, 0], target[4], target[5]), strict=False):
        student[row, at] = torch.nan
    problem.log_probs[6, 1], student[7, outside[7]] = torch.nan, torch.inf
    found = run(kernels, problem)
    assert found[0][bad].isnan().all() and found[2][bad].isnan().all()
    for place, (ours, exact) in enumerate(zip(found, clean, strict=True)):
        of_rows = (each.T if place == 1 else each for each in (ours, exact))
        assert torch.equal(*(each[[0, 1, 8]] for each in of_rows))


@pytest.mark.parametrize("more", MORE, ids=["plain", "T", "all"])
@pytest.mark.parametrize(("loss", "rest"), FUSED)
def test_pieces_of_rows_are_the_row(kernels, loss, rest, more):
    """A wide piece, a narrow one, one without a class; rows in which a piece has no finite logit, or a NaN."""
    for seed, (classes, k, sizes) in enumerate(SIZES):
        problem = make(loss, rest, classes, k, seed=seed, **sizes, **more)
        for widths in ((classes, 0), (1, classes - 1), (classes // 2, 0, classes - classes // 2)):
            assert_same(kernels, problem, widths=widths)
    problem = make(loss, rest, 2500, 40, rows=7, **more)
    if loss != "dkd":  # as in test_classes_that_cannot_occur
        problem.student[2, :1000] = -torch.inf
    problem.student[3, problem.target[3]] = -torch.inf
    problem.student[4, problem.indices[4, 0]] = torch.nan
    problem.log_probs[5, 0] = torch.nan
    assert_same(kernels, problem, widths=(1000, 1500))
    far = problem._replace(student=torch.cat([problem.student[:, :1000] - 3000.0, problem.student[:, 1000:]], 1))
    assert_same(kernels, far, widths=(1000, 500, 1000))
    for dtype in (torch.float32, torch.bfloat16):
        assert_within_eager_error(kernels, make(loss, rest, 2500, 40, **more), dtype, widths=(1000, 1500))


def test_errors_of_pieces(kernels):
    """Every piece raises the error, whichever has the class."""
    for name, value in (("indices", 40), ("indices", -2), ("target", 41)):
        problem = make("nkd", "bucket", 40, 4)
        getattr(problem, name).view(5, -1)[3, 0] = value
        for start in (0, 20):
            piece = TopKPiece(start, 40, pytest.fail)
            with pytest.raises(IndexError, match=f"{name}: expected class.* 0 to 39.* got {value}"):
                fused_topk.row_loss(kernels, problem.student[:, start : start + 20], *problem[1:], piece)


@pytest.mark.parametrize("rest", topk.RESTS)
def test_rows_that_do_not_count_are_not_looked_at(kernels, rest):
    problem = make("nkd", rest, 40, 4, weighted=True, ce_weight=1.0)
    for row in (1, 4):  # ignored, of weight 0
        problem.student[row], problem.log_probs[row], problem.indices[row] = torch.nan, torch.nan, 99
    loss, parts, gradient = run(kernels, problem)
    for row in (1, 4):
        assert loss[row] == 0 and (parts[:, row] == 0).all() and (gradient[row] == 0).all()
    assert loss[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("rest", topk.RESTS)
def test_no_rows_and_no_gradient(kernels, rest):
    problem = make("kd", rest, 3000, 4, temperature=2.0, ce_weight=1.0)
    without = run(kernels, problem._replace(options=problem.options._replace(wanted=(False,))))
    assert without[2] is None
    for ours, exact in zip(without[:2], run(kernels, problem)[:2], strict=True):
        assert torch.equal(ours, exact)
    empty = problem._replace(
        **{name: getattr(problem, name)[:0] for name in ("student", "log_probs", "indices", "target")}
    )
    loss, parts, gradient = run(kernels, empty)
    assert loss.shape == (0,) and parts.shape == (3, 0) and gradient.shape == (0, 3000)


@pytest.mark.parametrize(
    ("loss", "rest"), [("kd", "bucket"), ("nkd", "uniform"), ("wsld", "drop"), ("js", "renormalize")]
)
def test_threads_long_rows_and_strides_change_nothing(kernels, loss, rest):
    """A gradient beyond 8 MB is written past the caches."""
    problem = make(loss, rest, 30000, 16, rows=72, temperature=2.0, ce_weight=1.0).to(torch.float32)
    before = [each.clone() for each in problem[:3]]
    long = run(kernels, problem)
    few = problem._replace(student=problem.student[:6], log_probs=problem.log_probs[:6], indices=problem.indices[:6],
                           target=problem.target[:6])  # fmt: skip
    strided = few._replace(student=few.student.T.contiguous().T)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        many = run(kernels, problem)
    finally:
        torch.set_num_threads(threads)
    for whole, again, part, other in zip(long, many, run(kernels, few), run(kernels, strided), strict=True):
        assert torch.equal(whole, again) and torch.equal(part, other)
        assert torch.equal(whole[:, :6] if whole.shape[0] == 3 else whole[:6], part)
    assert all(map(torch.equal, before, problem[:3]))


def test_logits_and_log_probabilities_of_two_dtypes(kernels):
    problem = make("nkd", "bucket", 500, 7, temperature=2.0)
    mixed = problem._replace(log_probs=problem.log_probs.float(), student=problem.student.bfloat16())
    exact = topk_cases.expected(mixed._replace(student=mixed.student.double(), log_probs=mixed.log_probs.double()))
    for ours, right in zip(run(kernels, mixed), exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-2, atol=1e-5)
    loss, _, gradient = run(kernels, mixed._replace(log_probs=problem.log_probs))
    assert loss.dtype == torch.float64 and gradient.dtype == torch.bfloat16


def test_what_is_wrong_is_named(kernels):
    problem = make("nkd", "drop", 40, 4)
    twice = problem.indices.clone()
    twice[2, 0] = twice[2, 1]
    with pytest.raises(ValueError, match=r"indices: expected each class once in a row, got .* twice in row 2"):
        run(kernels, problem._replace(indices=twice))
    for wrong in (40, -2):
        outside = problem.indices.clone()
        outside[3, 1] = wrong
        with pytest.raises(IndexError, match=rf"indices: .* from 0 to 39, or -1 for a pad, got {wrong} in row 3"):
            run(kernels, problem._replace(indices=outside))
    problem.target[0] = 40
    with pytest.raises(IndexError, match=r"target: .* got 40"):
        run(kernels, problem)


@pytest.mark.parametrize(
    ("loss", "rest"), [("js", "uniform"), ("js", "drop"), ("dist", "renormalize"), ("tf_kd", "drop")]
)
def test_what_has_no_kernel_says_so(loss, rest):
    with pytest.raises((NotImplementedError, ValueError), match=r"rest: |loss: "):
        run(native, make(loss, rest, 10, 3))


def test_jensen_shannon_at_its_ends(kernels):
    assert_same(kernels, make("js", "bucket", 600, 5, beta=1.0, temperature=2.0))
    problem = make("js", "drop", 600, 5, beta=0.0, temperature=2.0)
    as_kd = problem._replace(options=problem.options._replace(loss="kd"))
    for ours, exact in zip(run(kernels, problem), run(kernels, as_kd), strict=True):
        assert torch.equal(ours, exact)
