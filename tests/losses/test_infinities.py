"""What every loss's docstring says of infinities and NaN, on every backend that runs here."""

import inspect

import pytest
import torch
from loss_cases import HERE, INF, function, make, mixed, run
from test_row_weight import PLACES

import fused_kd
from fused_kd.core.catalogue import LOSSES

NAN = float("nan")
here = pytest.mark.parametrize("place", HERE, ids="-".join)
everywhere = pytest.mark.parametrize("place", PLACES, ids="-".join)


def rows(loss, device):
    """Targets 0 to 5, one a row, so that class 8 is never one."""
    student, others, _ = make(loss, device=device)
    return student, others, torch.arange(6, device=device)


def one_by_one(place, student, others, target, **options):
    """As :func:`loss_cases.run`, of USKD too, by rows."""
    loss, name, _ = place
    if loss != "uskd":
        value, _, gradient = run(loss, name, student, others, target, reduction="none", **options)
        return value, gradient
    leaf = student.clone().requires_grad_()
    value = function(loss)(leaf, *others, target, reduction="none", backend=name, **options)
    value.sum().backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("loss", LOSSES)
def test_every_docstring_has_it(loss):
    text = inspect.getdoc(function(loss))
    sections = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections.index("Infinities and NaN:") + 1 == sections.index("Shape:")
    words = " ".join(text.split())
    assert "A student's logit of -inf is a class that cannot occur: its probability and its gradient are 0" in words
    assert "makes the loss and the gradient of its row NaN" in words
    assert max(map(len, text.splitlines())) <= 120


@everywhere
def test_a_class_that_the_student_rules_out(place):
    loss = place[0]
    student, others, target = rows(loss, place[2])
    student[:, 8] = -INF
    value, gradient = one_by_one(place, student, others, target)
    infinite = loss in ("nkd", "kd", "dkd", "wsld", "tf_kd")
    assert (value == INF).all() if infinite else value.isfinite().all()
    assert not gradient[:, 8].any()
    assert gradient.isfinite().all()


OFF = {"nkd": {"gamma": 0.0}, "uskd": {"beta": 0.0}, "dkd": {"alpha": 0.0, "beta": 0.0}, "wsld": {"alpha": 0.0}}
OFF |= {"dist": {"beta": 0.0, "gamma": 0.0}, "zipf_ls": {"beta": 0.0}}


@pytest.mark.parametrize("place", [place for place in PLACES if place[0] in OFF], ids="-".join)
def test_a_term_of_weight_0_is_off_at_the_lowest_finite_logits(place):
    """As a mask has them: a sum over two of them is infinite in float32."""
    student, others, target = rows(place[0], place[2])
    student, others = student.float(), [other.float() for other in others]
    student[:, 6:] = torch.finfo(torch.float32).min
    options = OFF[place[0]] | {"ce_weight": 1.0}
    value, gradient = one_by_one(place, student, others, target, **options)
    exact, of_exact = one_by_one((place[0], "reference", place[2]), student, others, target, **options)
    assert exact.isfinite().all()
    torch.testing.assert_close((value, gradient), (exact, of_exact))


@here
def test_one_that_both_rule_out_is_not_there(place):
    loss = place[0]
    if loss in ("tf_kd", "zipf_ls", "dist"):
        pytest.skip("without a teacher, or with a mean over all classes")
    student, (teacher,), target = rows(loss, place[2])
    student[:, 8] = teacher[:, 8] = -INF
    value, gradient = one_by_one(place, student, [teacher], target, ce_weight=0.5)
    expected, wanted = one_by_one(place, student[:, :8], [teacher[:, :8]], target, ce_weight=0.5)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, :8], wanted)
    assert not gradient[:, 8].any()


@here
def test_one_that_the_teacher_rules_out(place):
    loss = place[0]
    if loss in ("tf_kd", "zipf_ls"):
        pytest.skip("there is no teacher")
    student, (teacher,), target = rows(loss, place[2])
    teacher[:, 8] = -INF
    value, gradient = one_by_one(place, student, [teacher], target)
    assert value.isfinite().all() and gradient.isfinite().all()
    expected, wanted = one_by_one(place, student, [teacher.clamp(min=-1e4)], target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, wanted)


@here
def test_jensen_shannon_at_its_ends(place):
    loss = place[0]
    if loss != "js":
        pytest.skip("it has no mixture")
    student, (teacher,), target = rows(loss, place[2])
    ruled_out = student.clone(), teacher.clone()
    for logits in ruled_out:
        logits[:, 8] = -INF
    for beta, infinite in ((0.0, (True, False)), (1.0, (False, True)), (0.01, (False, False)), (0.99, (False, False))):
        found = [
            one_by_one(place, *pair, target, beta=beta)[0]
            for pair in ((ruled_out[0], [teacher]), (student, [ruled_out[1]]))
        ]
        assert [bool((value == INF).all()) for value in found] == list(infinite)
        assert all((value == INF).all() or value.isfinite().all() for value in found)


@everywhere
def test_the_cross_entropy_at_a_label_that_is_ruled_out(place):
    loss = place[0]
    student, others, target = rows(loss, place[2])
    student[:, 8] = -INF
    soft = mixed(device=place[2])
    by_ce = []
    for labels, options in ((target, {}), (target, {"label_smoothing": 0.1}), (soft, {}), (target.clamp(8, 8), {})):
        value, parts = function(loss)(
            student, *others, labels, ce_weight=1.0, return_parts=True, reduction="none", backend=place[1], **options
        )
        by_ce.append((parts.ce == INF).all().item())
        assert not value.isnan().any()
    assert by_ce == [False, True, True, True]


@everywhere
@pytest.mark.parametrize("bad", (NAN, INF))
def test_a_nan_or_plus_infinity_is_its_rows(place, bad):
    loss = place[0]
    for which in range(2 if loss not in ("tf_kd", "zipf_ls") else 1):
        for column in (2, 8):  # the target's, and another
            student, others, target = rows(loss, place[2])
            (student if which == 0 else others[0])[2, column] = bad
            coupled = loss == "dist" or (loss == "uskd" and which == 0)
            value, gradient = one_by_one(place, student, others, target)
            spoilt = [True] * 6 if coupled else [row == 2 for row in range(6)]
            assert value.isnan().tolist() == spoilt
            assert gradient.isnan().all(1).tolist() == spoilt and gradient.isnan().any(1).tolist() == spoilt
            if loss == "dist":
                value, gradient = one_by_one(place, student, others, target, gamma=0.0)
                assert value.isnan().tolist() == gradient.isnan().any(1).tolist() == [row == 2 for row in range(6)]
            target[2] = -100
            value, gradient = one_by_one(place, student, others, target)
            assert not value.isnan().any() and not gradient.isnan().any() and not gradient[2].any() and value[2] == 0


@here
def test_zipfs_ranking_leaves_a_class_out(place):
    """By hand: the votes rank all classes; then what is a target or cannot occur goes, and the rest sums to 1."""
    loss, name, device = place
    if loss != "zipf_ls":
        pytest.skip("it does not rank")
    student, _, target = rows(loss, device)
    counts = torch.tensor([3, 5, 0, 2, 4, 1, 0, 0, 6])  # of class 0 to 8: ranks 4, 2, 7, 5, 3, 6, 7, 7, 1
    ranks = torch.tensor([4.0, 2, 7, 5, 3, 6, 7, 7, 1], dtype=torch.float64)
    positions = torch.nn.functional.one_hot(torch.arange(9).repeat_interleave(counts), 9).double()
    dense = positions.expand(6, *positions.shape).to(device)
    for gone in ([8], [8, 6], [0, 8]):
        logits = student.clone()
        logits[:, gone] = -INF
        leaf = logits.clone().requires_grad_()
        value = function(loss)(leaf, dense, target, beta=1.0, power=1.5, reduction="none", backend=name)
        value[1:].sum().backward()
        assert not leaf.grad[:, gone].any()
        for row in range(1, 6):
            kept = [j for j in range(9) if j not in gone and j != row]
            z = ranks[kept] ** -1.5 / (ranks[kept] ** -1.5).sum()
            log_p = logits[row, kept].cpu().log_softmax(0)
            torch.testing.assert_close(value[row].cpu().detach(), (z * (z.log() - log_p)).sum())
            torch.testing.assert_close(leaf.grad[row, kept].cpu(), log_p.exp() - z)


def test_wsld_of_a_label_that_the_teacher_excludes(backend):
    """CE(teacher) is infinite, so u is 0 and the row has no distillation, whatever the student says of the class."""
    student = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]], requires_grad=True)
    teacher = torch.tensor([[1.0, -torch.inf, 0.5, -torch.inf]])
    for target in (torch.tensor([[0.4, 0.6, 0.0, 0.0]]), torch.tensor([1])):
        loss = fused_kd.wsld_loss(student, teacher, target, backend=backend[0])
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss == 0 and not gradient.any()
