"""The reference definitions of the losses besides NKD and USKD: values, gradients and what makes rows special."""

from functools import partial

import golden
import pytest
import torch
import torch.nn.functional as F
from reference_cases import LOSSES, TEACHER, every_loss, gradient, loss_of, make, mixed, teacher_loss

from fused_kd import reference

INF = float("inf")
CASES = golden.CASES
CASES = [case for case in CASES if case["loss"] not in ("nkd", "uskd")]


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
