"""The reference definitions of the losses besides NKD and USKD: values, gradients and what makes rows special."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_kd import reference

INF = float("inf")
CASES = json.loads((Path(__file__).parent / "data" / "published.json").read_text())["cases"]
CASES = [case for case in CASES if case["loss"] not in ("nkd", "uskd")]
TEACHER = {
    "nkd": partial(reference.nkd_loss, temperature=2.0),
    "kd": reference.kd_loss,
    "dkd": reference.dkd_loss,
    "wsld": reference.wsld_loss,
    "js": partial(reference.js_loss, beta=0.3, temperature=2.0),
    "dist": partial(reference.dist_loss, temperature=2.0),
}
ALONE = {"tf_kd": reference.tf_kd_loss, "zipf_ls": partial(reference.zipf_ls_loss, beta=1.0)}
LOSSES = {**TEACHER, **ALONE}
every_loss = pytest.mark.parametrize("name", LOSSES)
teacher_loss = pytest.mark.parametrize("name", TEACHER)


def make(rows=6, classes=7, scale=2.0, dtype=torch.float64, seed=0):
    """Student logits, a teacher's (or dense ones) and targets."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64).to(dtype)
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


def mixed(rows=6, classes=7):
    return torch.rand(rows, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)


def loss_of(name, student, teacher, target, **options):
    """The loss and its parts; for Zipf's smoothing the teacher's logits, cut and shifted, serve as five positions."""
    if name == "tf_kd":
        return LOSSES[name](student, target, **options)
    if name == "zipf_ls":
        teacher = torch.stack([teacher.roll(shift, 1) * (shift < 4) for shift in range(5)], dim=1)
    return LOSSES[name](student, teacher, target, **options)


def gradient(name, student, *arguments, **options):
    student = student.clone().requires_grad_()
    loss, _ = loss_of(name, student, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_matches_the_published_values(case):
    inputs = {
        key: torch.tensor(value, dtype=torch.int64 if key == "target" else torch.float64)
        for key, value in case["inputs"].items()
    }
    student = inputs["student_logits"].requires_grad_()
    teacher, target, params = inputs.get("teacher_logits"), inputs["target"], case["params"]
    if case["loss"] == "label_smoothing":
        # NKD with a teacher that gives its target nothing and gamma = 0 leaves the CE alone.
        hopeless = teacher.scatter(1, target.unsqueeze(1), -INF)
        loss, _ = reference.nkd_loss(
            student, hopeless, target, gamma=0.0, ce_weight=1.0, label_smoothing=params["epsilon"]
        )
    elif case["loss"] == "tf_kd_reg":
        loss, _ = reference.tf_kd_loss(
            student, target, correct=params["correct_prob"], temperature=params["temperature"]
        )
    elif case["loss"] == "zipf_ls":
        loss, _ = reference.zipf_ls_loss(student, inputs["dense_logits"], target, beta=1.0, **params)
    else:
        loss, _ = getattr(reference, case["loss"] + "_loss")(student, teacher, target, **params)
    loss.backward()
    tolerance = 1e-6 if "1e-6" in case["source"] else 1e-8
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    close(loss.item(), case["value"])
    close(student.grad, torch.tensor(case["grads"]["student_logits"], dtype=torch.float64))


def test_every_published_loss_has_a_case():
    wanted = {"kd", "dkd", "wsld", "dist", "label_smoothing", "tf_kd_reg", "zipf_ls"}
    assert {case["loss"] for case in CASES} == wanted


def naive(name, student, teacher, target):
    """The formulas of one row or batch, written down once more without care for extremes."""
    p, q = (student / 2).softmax(1), (teacher / 2).softmax(1)
    if name == "js":
        m = 0.3 * q + 0.7 * p
        return 4 * (0.3 * (q * (q / m).log()).sum(1) + 0.7 * (p * (p / m).log()).sum(1)).mean()
    if name == "dist":
        rows = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p, q, strict=True)])
        columns = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p.T, q.T, strict=True)])
        return 4 * (2 - rows.mean() - columns.mean())
    p, q = (student / 4).softmax(1), (teacher / 4).softmax(1)
    if name == "kd":
        return 16 * F.kl_div(p.log(), q, reduction="batchmean")
    others = F.one_hot(target, student.shape[1]) == 0
    b_s, b_t = ((x * ~others).sum(1) for x in (p, q))
    binary = b_t * (b_t / b_s).log() + (1 - b_t) * ((1 - b_t) / (1 - b_s)).log()
    rest_s, rest_t = ((x[others].view(len(x), -1) / 4).softmax(1) for x in (student, teacher))
    return 16 * (binary + 8 * (rest_t * (rest_t / rest_s).log()).sum(1)).mean()


@pytest.mark.parametrize("name", ["kd", "dkd", "js", "dist"])
def test_matches_a_naive_form(name):
    loss, _ = loss_of(name, *make())
    torch.testing.assert_close(loss, naive(name, *make()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize(
    "name, options",
    [(name, {}) for name in LOSSES if name != "wsld"]  # its weights are constants that finite differences would move
    + [(name, {"logit_standardization": True}) for name in TEACHER if name != "wsld"],
)
def test_gradcheck(name, options, probabilities):
    student, teacher, target = make(4, 5)
    target = mixed(4, 5) if probabilities else target.index_fill(0, torch.tensor(1), -100)
    options = {"ce_weight": 0.7, "label_smoothing": 0.1, "reduction": "none", **options}
    run = partial(loss_of, name, teacher=teacher, target=target, **options)
    assert torch.autograd.gradcheck(lambda x: run(x)[0], student.requires_grad_())


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


@every_loss
def test_a_row_of_probabilities_stands_for_its_largest(name):
    student, teacher, target = make()
    one_hot = F.one_hot(target, 7).double()
    options = {"ce_weight": 0.7, "label_smoothing": 0.1}
    torch.testing.assert_close(
        gradient(name, student, teacher, one_hot, **options), gradient(name, student, teacher, target, **options)
    )
    if name not in ("wsld", "zipf_ls"):  # the one reads the probabilities, the other has two targets
        soft = mixed()
        torch.testing.assert_close(
            gradient(name, student, teacher, soft), gradient(name, student, teacher, soft.argmax(1))
        )


@every_loss
def test_parts_and_reductions_add_up(name):
    arguments, options = make(), {"ce_weight": 0.7}
    arguments[2][2] = -100
    rows, row_parts = loss_of(name, *arguments, reduction="none", **options)
    assert rows.shape == (6,) and rows[2] == 0
    for reduction, expected in (("sum", rows.sum()), ("mean", rows.sum() / 5)):
        loss, parts = loss_of(name, *arguments, reduction=reduction, **options)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(sum(parts), loss)
    torch.testing.assert_close(sum(row_parts), rows)
    ce = F.cross_entropy(arguments[0], arguments[2], reduction="none")
    torch.testing.assert_close(row_parts.ce, 0.7 * ce)


@every_loss
def test_ignored_rows_are_as_if_absent(name):
    student, teacher, target = make()
    student[1], teacher[1], target[1] = torch.nan, INF, -100
    kept = torch.tensor([0, 2, 3, 4, 5])
    loss, grad = gradient(name, student, teacher, target, ce_weight=0.7)
    fewer, fewer_grad = gradient(name, student[kept], teacher[kept], target[kept], ce_weight=0.7)
    torch.testing.assert_close(loss, fewer)
    torch.testing.assert_close(grad, torch.zeros_like(grad).index_copy(0, kept, fewer_grad))
    assert gradient(name, student, teacher, torch.full_like(target, -100))[0] == 0
    assert not gradient(name, student, teacher, torch.full_like(target, -100))[1].any()
    assert gradient(name, student[:0], teacher[:0], target[:0])[0] == 0


@pytest.mark.parametrize("name", ["kd", "js", "dist"])
def test_targets_may_be_absent(name):
    student, teacher, target = make()
    loss, parts = loss_of(name, student, teacher, None, ignore_index=0)
    assert loss == loss_of(name, student, teacher, target)[0] and parts.ce == 0
    with pytest.raises(ValueError, match="ce_weight"):
        loss_of(name, student, teacher, None, ce_weight=1.0)


@every_loss
def test_nan_stays_in_its_row(name):
    student, teacher, target = make()
    clean = gradient(name, student, teacher, target, reduction="none")
    for broken in range(1 if name == "tf_kd" else 2):
        arguments = [student.clone(), teacher.clone(), target]
        arguments[broken][2, target[2]] = torch.nan
        loss, grad = gradient(name, *arguments, reduction="none")
        assert loss[2].isnan() and grad[2].isnan().all()
        if name == "dist":  # its second term is a mean over the batch
            assert loss.isnan().all()
            continue
        others = torch.tensor([0, 1, 3, 4, 5])
        assert torch.equal(loss[others], clean[0][others]) and torch.equal(grad[others], clean[1][others])


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("dist", "tf_kd")])  # those read C
def test_a_class_impossible_for_both_is_as_if_absent(name):
    student, teacher, target = make()
    target = torch.where(target == 3, 4, target)
    kept = torch.tensor([0, 1, 2, 4, 5, 6])
    if name == "zipf_ls":  # positions that never vote for the class: it ranks behind all that have votes
        dense = torch.stack([F.one_hot((target + shift) % 3, 7).double() for shift in (0, 1, 1)], dim=1)
        run = LOSSES[name]
        loss, _ = run(student.index_fill(1, torch.tensor(3), -INF), dense, target)
        fewer, _ = run(student[:, kept], dense[:, :, kept], torch.where(target > 3, target - 1, target))
        torch.testing.assert_close(loss, fewer)
        return
    full = [logits.index_fill(1, torch.tensor(3), -INF) for logits in (student, teacher)]
    for options in ({}, {"logit_standardization": True}):
        loss, grad = gradient(name, *full, target, **options)
        fewer_target = torch.where(target > 3, target - 1, target)
        fewer, fewer_grad = gradient(name, student[:, kept], teacher[:, kept], fewer_target, **options)
        torch.testing.assert_close(loss, fewer)
        torch.testing.assert_close(grad, torch.zeros_like(grad).index_copy(1, kept, fewer_grad))


@every_loss
@pytest.mark.parametrize("at_target", [False, True])
def test_a_class_impossible_for_the_student_only(name, at_target):
    student, teacher, target = make()
    column = target[1] if at_target else (target[1] + 1) % 7
    student[1, column] = -INF
    loss, grad = gradient(name, student, teacher, target, reduction="none")
    assert loss.isfinite().tolist() == [True, name in ("js", "dist", "zipf_ls"), *[True] * 4]
    assert loss[1] > 0
    assert grad[1, column] == 0 and grad.isfinite().all()


@teacher_loss
@pytest.mark.parametrize("at_target", [False, True])
def test_a_class_impossible_for_the_teacher_only(name, at_target):
    student, teacher, target = make()
    teacher[1, target[1] if at_target else (target[1] + 1) % 7] = -INF
    for options in ({}, {"logit_standardization": True}):
        loss, grad = gradient(name, student, teacher, target, reduction="none", **options)
        assert loss.isfinite().all() and grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype, gap", [(torch.float32, 800.0), (torch.float32, 3e4), (torch.float16, 6e4)])
def test_saturated_rows_stay_finite_and_exact(name, dtype, gap):
    student, teacher, target = make(8, 5, dtype=dtype)
    for row, column in enumerate((0, 1, 2, 3)):  # student and teacher sure of the target, of another, of both
        student[row, (target[row] + column // 2) % 5] = gap
        teacher[row, (target[row] + column % 2) % 5] = gap
    student[4] = -gap / 2 * torch.tensor([1, 0.5, 0, -0.5, -1])
    teacher[4] = -student[4]
    for option in ({}, *([{"logit_standardization": True}] if name in TEACHER else [])):
        loss, grad = gradient(name, student, teacher, target, reduction="none", **option)
        exact, exact_grad = gradient(name, student.double(), teacher.double(), target, reduction="none", **option)
        assert loss.isfinite().all() and grad.isfinite().all()
        assert loss.dtype == torch.float32 and grad.dtype == dtype
        torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-4)
        tolerance = 1e-2 if dtype == torch.float16 else 1e-3
        torch.testing.assert_close(grad.double(), exact_grad, rtol=tolerance, atol=tolerance)


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
