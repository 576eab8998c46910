"""The snippets of docs/migration.md against the values and gradients of published code, and against torchdistill."""

import json
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from pages import needs, run_snippet

import fused_kd

GOLDEN = json.loads((Path(__file__).parent / "data" / "published.json").read_text())["cases"]


def page(name):
    return run_snippet("migration.md", name)


def golden(*losses):
    cases = [case for case in GOLDEN if case["loss"] in losses]
    assert {case["loss"] for case in cases} == set(losses)
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


def inputs_of(case):
    """float64 logits that require grad where the case has a gradient, and the target."""
    tensors = {}
    for name, value in case["inputs"].items():
        integers = not torch.tensor(value).is_floating_point()
        tensors[name] = torch.tensor(value, dtype=torch.int64 if integers else torch.float64)
    for name in case["grads"]:
        tensors[name].requires_grad_()
    return tensors


def as_published(loss, case, tensors):
    torch.testing.assert_close(loss.item(), case["value"], rtol=1e-9, atol=1e-9)
    loss.backward()
    for name, grad in case["grads"].items():
        expected = torch.tensor(grad, dtype=torch.float64)
        torch.testing.assert_close(tensors[name].grad, expected, rtol=1e-9, atol=1e-9)


@golden("nkd", "uskd")
def test_cls_kd(case):
    tensors, params = inputs_of(case), dict(case["params"])
    student_logits, target = tensors["student_logits"], tensors["target"]
    if case["loss"] == "nkd":
        params["temp"] = params.pop("temperature")
        loss = page("cls_kd")["nkd"](student_logits, tensors["teacher_logits"], target, **params)
    else:
        if params["rank"] == "cls_kd":
            del params["rank"]  # the page's default
        loss = page("cls_kd")["uskd"](tensors["weak_logits"], student_logits, target, **params)
    as_published(loss, case, tensors)


def random_logits(rows=6, classes=9):
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(rows, classes, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,))


def test_kd_of_cls_kd_is_smaller_by_the_teachers_entropy():
    student, teacher, target = random_logits()
    q, alpha = (teacher / 4).softmax(1), 0.3
    entropy = -(q * q.log()).sum(1).mean()
    soft = -(q * (student / 4).log_softmax(1)).sum(1).mean()
    theirs = alpha * 16 * soft + (1 - alpha) * F.cross_entropy(student, target)
    ours = page("cls_kd")["kd"](student, teacher, target, alpha=alpha)
    torch.testing.assert_close(ours, theirs - alpha * 16 * entropy)
    torch.testing.assert_close(torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student))


def test_weights_of_a_published_uskd_load():
    criterion = fused_kd.USKDLoss(in_features=3, num_classes=5)
    state = {"fc.weight": torch.randn(5, 3), "fc.bias": torch.randn(5)}
    page("cls_kd")["load_uskd"](criterion, state)
    torch.testing.assert_close(criterion.weak_classifier.weight.detach(), state["fc.weight"])
    torch.testing.assert_close(criterion.weak_classifier.bias.detach(), state["fc.bias"])


def test_one_hot_rows_are_their_classes_and_so_are_columns():
    student, weak, target = random_logits()
    expected = fused_kd.uskd_loss(student, weak, target)
    one_hot = F.one_hot(target, student.shape[1]).double()
    torch.testing.assert_close(fused_kd.uskd_loss(student, weak, one_hot), expected)
    torch.testing.assert_close(fused_kd.uskd_loss(student, weak, target[:, None]), expected)


@golden("kd", "dkd")
def test_mdistiller(case):
    tensors, params = inputs_of(case), case["params"]
    logits = tensors["student_logits"], tensors["teacher_logits"], tensors["target"]
    if case["loss"] == "kd":
        loss = page("mdistiller")["kd"](*logits, kd_weight=1.0, ce_weight=0.0, **params)
    else:
        criterion = page("mdistiller")["DKD"](ce_weight=0.0, **params)
        criterion.begin_epoch(20)
        loss = criterion(*logits)
    as_published(loss, case, tensors)


def test_weights_and_warmup_of_mdistiller():
    student, teacher, target = random_logits()
    ce = F.cross_entropy(student, target)
    kd = page("mdistiller")["kd"](student, teacher, target)
    torch.testing.assert_close(kd, 0.9 * fused_kd.kd_loss(student, teacher) + 0.1 * ce)
    criterion = page("mdistiller")["DKD"]()
    for epoch, share in ((1, 1 / 20), (10, 0.5), (20, 1.0), (90, 1.0)):
        criterion.begin_epoch(epoch)
        expected = ce + share * fused_kd.dkd_loss(student, teacher, target)
        torch.testing.assert_close(criterion(student, teacher, target), expected)


def test_warmup_of_mdistiller_compiles_twice():
    student, teacher, target = random_logits()
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    criterion = page("mdistiller")["DKD"]()
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    for epoch in range(1, 23):
        criterion.begin_epoch(epoch)
        torch.testing.assert_close(compiled(student, teacher, target), criterion(student, teacher, target))
    assert counter.frame_count == 2
    torch._dynamo.reset()


@golden("wsld")
def test_wsld(case):
    tensors = inputs_of(case)
    loss = fused_kd.wsld_loss(tensors["student_logits"], tensors["teacher_logits"], tensors["target"], **case["params"])
    as_published(loss, case, tensors)


@pytest.mark.parametrize("standardized", [False, True])
def test_kd_of_torchdistill(standardized):
    needs("torchdistill", "torchvision")
    from torchdistill.losses import mid_level

    student, teacher, target = random_logits()
    theirs_class = mid_level.LogitStdKDLoss if standardized else mid_level.KDLoss

    def theirs(alpha):
        criterion = theirs_class(".", "output", ".", "output", temperature=3.0, alpha=alpha)
        return criterion({".": {"output": student}}, {".": {"output": teacher}}, target)

    ours = page("torchdistill")["kd"](student, teacher, target, 3.0, 0.4, logit_standardization=standardized)
    torch.testing.assert_close(ours, theirs(0.4), rtol=1e-6, atol=1e-6)  # they add 1e-7 to the deviation
    kd = fused_kd.kd_loss(student, teacher, temperature=3.0, logit_standardization=standardized)
    torch.testing.assert_close(kd / 9, theirs(0.0), rtol=1e-6, atol=1e-6)


def test_dist_of_torchdistill():
    needs("torchdistill", "torchvision")
    from torchdistill.losses.mid_level import DISTLoss

    student, teacher, _ = random_logits()
    theirs = DISTLoss(".", "output", ".", "output", beta=2.0, gamma=0.5, tau=4.0)
    ours = fused_kd.DISTLoss(beta=2.0, gamma=0.5, temperature=4.0)(student, teacher)
    expected = theirs({".": {"output": student}}, {".": {"output": teacher}})
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
