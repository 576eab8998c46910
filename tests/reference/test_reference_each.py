"""What the reference's losses have each to itself: WSLD's weights, limits of Jensen–Shannon, votes, DIST's
columns; label smoothing, logit standardization and the decomposition."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference_cases import LOSSES, gradient, loss_of, make, mixed, teacher_loss

from fused_kd import reference

INF = float("inf")


def wsld_by_hand(student, teacher, target, standardize=False):
    """The weight u of each row, and what it weighs."""
    if standardize:
        student, teacher = reference.standardize_logits(student), reference.standardize_logits(teacher)
    ce = [F.cross_entropy(logits, target, reduction="none") for logits in (student, teacher)]
    soft = 2.5 * 4 * F.cross_entropy(student / 2, (teacher / 2).softmax(1), reduction="none")
    return 1 - (-ce[0] / (ce[1] + 1e-7)).exp(), soft


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("probabilities", [False, True])
def test_wsld_weighs_by_the_cross_entropies_of_the_label_as_given(probabilities, standardize):
    student, teacher, target = make()
    target = mixed() if probabilities else target
    loss, grad = gradient("wsld", student, teacher, target, reduction="none", logit_standardization=standardize)
    student.requires_grad_()
    u, soft = wsld_by_hand(student, teacher, target, standardize)
    torch.testing.assert_close(loss, u * soft)
    torch.testing.assert_close(grad, torch.autograd.grad((u.detach() * soft).sum(), student)[0])


def test_wsld_where_the_label_is_ruled_out():
    """A weight of 1 if the student does so, whatever the teacher does, and of 0 if the teacher alone does."""
    student, teacher, target = make(3)
    student[:2, 0], teacher[1:, 0] = -INF, -INF
    loss, _ = reference.wsld_loss(student, teacher, torch.zeros_like(target), reduction="none")
    expected = 10 * F.cross_entropy(student[1, 1:] / 2, (teacher[1, 1:] / 2).softmax(0))
    assert loss[0] == INF and loss[2] == 0
    torch.testing.assert_close(loss[1], expected)


@pytest.mark.parametrize("name", ["kd", "dkd", "js", "dist"])
def test_the_teacher_itself_is_the_minimum(name):
    student, _, target = make()
    loss, grad = gradient(name, student, student, target)
    assert abs(loss) < 1e-5 and grad.abs().max() < 1e-5  # the 1e-8 of DIST's denominator


@pytest.mark.parametrize("gap", [1.0, 800.0])
def test_two_classes_have_no_non_target_term(gap):
    student, teacher, target = make(5, 2, scale=gap, dtype=torch.float32)
    for loss in (reference.dkd_loss, reference.nkd_loss):
        _, parts = loss(student, teacher, target, reduction="none")
        assert not parts.non_target.any() and parts.target.any()
    for wanted in ("nkd_non_target", "dkd_non_target"):
        leaf = student.clone().requires_grad_()
        part = getattr(reference.decompose(leaf, teacher, target), wanted)
        assert part == 0 and not part.requires_grad
    loss, grad = gradient("zipf_ls", student, teacher, target)
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
def test_label_smoothing_is_pytorchs(probabilities, epsilon):
    student, teacher, target = make()
    target = mixed() if probabilities else target.index_fill(0, torch.tensor(2), -100)
    options = {"ce_weight": 0.7, "label_smoothing": epsilon}
    expected = 0.7 * F.cross_entropy(student, target, label_smoothing=epsilon)
    everything = [loss_of(name, student, teacher, target, **options)[1] for name in LOSSES]
    everything.append(reference.uskd_loss(student, teacher, target, **options)[1])
    for parts in everything:
        torch.testing.assert_close(parts.ce, expected)


def test_standardization():
    student, _, _ = make()
    expected = (student - student.mean(1, keepdim=True)) / (student.std(1, keepdim=True) + 1e-7)
    torch.testing.assert_close(reference.standardize_logits(student), expected)
    wider = torch.cat([student[:, :2], torch.full((6, 3), -INF).double(), student[:, 2:]], dim=1)
    result = reference.standardize_logits(wider)
    torch.testing.assert_close(result[:, [0, 1, 5, 6, 7, 8, 9]], expected)
    assert (result[:, 2:5] == -INF).all()

    constant = torch.full((1, 4), 3.0, requires_grad=True)
    result = reference.standardize_logits(constant)
    assert not result.any()
    assert torch.autograd.grad(result[0, 1], constant)[0].isfinite().all()
    for logits in (torch.tensor([[2.0, -INF]]), torch.tensor([[-INF, -INF]])):  # one class possible, none
        assert torch.equal(reference.standardize_logits(logits), torch.where(logits == -INF, -INF, 0.0))


@teacher_loss
def test_standardized_distillation_with_plain_cross_entropy(name):
    student, teacher, target = make(scale=5.0)
    loss, parts = loss_of(name, student, teacher, target, ce_weight=0.7, logit_standardization=True)
    standard = [reference.standardize_logits(logits) for logits in (student, teacher)]
    by_hand, _ = loss_of(name, *standard, target)
    torch.testing.assert_close(loss, by_hand + 0.7 * F.cross_entropy(student, target))
    torch.testing.assert_close(parts.ce, 0.7 * F.cross_entropy(student, target))
    # Nothing of a shift or a scale of either is left.
    moved, _ = loss_of(name, 3 * student + 1, teacher / 2 - 4, target, logit_standardization=True)
    torch.testing.assert_close(moved, by_hand, rtol=1e-5, atol=1e-5)


def test_js_limits():
    student, teacher, target = make()
    js = partial(reference.js_loss, temperature=2.0)
    forward, _ = reference.kd_loss(student, teacher, target, temperature=2.0)
    backward, _ = reference.kd_loss(teacher, student, target, temperature=2.0)
    for beta, weight, expected in ((0.0, 1.0, forward), (1.0, 1.0, backward), (1e-6, 1e-6, forward)):
        torch.testing.assert_close(js(student, teacher, target, beta=beta)[0] / weight, expected, rtol=1e-4, atol=0)
    close_to_one, _ = js(student, teacher, target, beta=1 - 1e-6)
    torch.testing.assert_close(close_to_one / 1e-6, backward, rtol=1e-4, atol=0)
    for beta in (0.0, 1.0):
        student = student.detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, b=beta: js(x, teacher, target, beta=b)[0], student)
    symmetric = [js(*pair, target, beta=0.5)[0] for pair in ((student, teacher), (teacher, student))]
    torch.testing.assert_close(*symmetric)


def test_js_towards_a_teacher_that_rules_a_class_out():
    student, teacher, target = make()
    teacher[1, 0] = -INF
    rows = {b: reference.js_loss(student, teacher, target, beta=b, reduction="none")[0] for b in (0.0, 0.5, 1.0)}
    assert rows[0.0].isfinite().all() and rows[0.5].isfinite().all()
    assert rows[1.0].isfinite().tolist() == [True, False, True, True, True, True] and rows[1.0][1] == INF
    student[1, 0] = -INF  # now both do
    loss, _ = reference.js_loss(student, teacher, target, beta=1.0)
    assert loss.isfinite()


def test_zipf_ranks_by_votes():
    dense = F.one_hot(torch.tensor([[0, 0, 0, 1, 1, 2, 2, 3]]), 6).double()  # votes 3 2 2 1 0 0: ranks 1 2 2 4 5 5
    student, target = torch.zeros(1, 6, dtype=torch.float64), torch.tensor([1])
    weights = torch.tensor([1, 1 / 2, 1 / 4, 1 / 5, 1 / 5], dtype=torch.float64)
    for power in (1.0, 0.5):
        z = weights**power / (weights**power).sum()
        loss, parts = reference.zipf_ls_loss(student, dense, target, power=power)
        torch.testing.assert_close(loss, 0.1 * (z * (z * 5).log()).sum())
        assert parts.distillation == loss
    # Two targets: 1 and 4 are left out.
    target = torch.tensor([[0.0, 0.6, 0.0, 0.0, 0.4, 0.0]])
    z = weights[:4] / weights[:4].sum()
    loss, _ = reference.zipf_ls_loss(student, dense, target, beta=1.0)
    torch.testing.assert_close(loss, (z * (z * 4).log()).sum())


def test_dist_gives_every_row_the_column_term():
    student, teacher, target = make()
    target[3] = -100
    _, parts = reference.dist_loss(student, teacher, target, beta=0.5, gamma=3.0, reduction="none")
    _, mean = reference.dist_loss(student, teacher, target, beta=0.5, gamma=3.0)
    expected = torch.where(target == -100, 0.0, mean.intra)
    torch.testing.assert_close(parts.intra, expected)
    kept = torch.tensor([0, 1, 2, 4, 5])
    p, q = student[kept].softmax(1), teacher[kept].softmax(1)
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p.T, q.T, strict=True)]
    torch.testing.assert_close(mean.intra, 3 * (1 - torch.stack(correlations).mean()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_decomposition_rebuilds_the_losses(temperature, reduction):
    student, teacher, target = make()
    target[4] = -100
    options = {"temperature": temperature, "reduction": reduction}
    parts = reference.decompose(student, teacher, target, **options)
    nkd, _ = reference.nkd_loss(student, teacher, target, gamma=1.5, **options)
    dkd, _ = reference.dkd_loss(student, teacher, target, alpha=0.7, beta=3.0, **options)
    kd, _ = reference.kd_loss(student, teacher, target, **options)
    torch.testing.assert_close(parts.nkd_target + 1.5 * parts.nkd_non_target, nkd)
    torch.testing.assert_close(0.7 * parts.dkd_binary + 3.0 * parts.dkd_non_target, dkd)
    # KD is its cross entropy less the teacher's entropy.
    own = reference.decompose(teacher, teacher, target, **options)
    torch.testing.assert_close(parts.kd_target + parts.kd_non_target - own.kd_target - own.kd_non_target, kd)
    # KD = binary + (1 − q_y) non-target, the observation that DKD starts from.
    if reduction == "none":
        rest = 1 - (teacher / temperature).softmax(1).gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(parts.dkd_binary + rest * parts.dkd_non_target, kd)


def test_decomposition_gradients():
    student, teacher, target = make(3, 4)
    target[1] = -100
    run = partial(reference.decompose, teacher_logits=teacher, target=target, temperature=2.0)
    assert torch.autograd.gradcheck(lambda x: tuple(run(x)), student.requires_grad_())
    ignored = reference.decompose(student, teacher, torch.full_like(target, -100))
    assert not any(ignored) and not torch.autograd.grad(sum(ignored), student)[0].any()
    student, teacher, target = make(4, 5, dtype=torch.float16)
    student[0, target[0]], teacher[1, (target[1] + 1) % 5], student[2, (target[2] + 1) % 5] = 6e4, 6e4, 6e4
    student.requires_grad_()
    parts = reference.decompose(student, teacher, target)
    assert torch.stack(parts).isfinite().all() and torch.autograd.grad(sum(parts), student)[0].isfinite().all()
