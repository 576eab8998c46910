"""The snippets of docs/migration.md against the values and gradients of published code, and against torchdistill."""

import golden
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from pages import needs, run_snippet

import fused_kd

GOLDEN = golden.CASES


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


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
def test_written_by_hand():
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(2, 3, 9, dtype=torch.float64) for _ in range(2))
    target = torch.randint(9, (2, 3))
    flat = [each.flatten(0, 1) for each in (student, teacher, target)]

    def theirs(student, teacher, reduction="batchmean"):
        return F.kl_div((student / 3).log_softmax(-1), (teacher / 3).softmax(-1), reduction=reduction)

    ours = fused_kd.kd_loss(student, teacher, temperature=3.0)
    torch.testing.assert_close(ours, 9 * theirs(*flat[:2]))
    torch.testing.assert_close(ours / 9, theirs(*flat[:2]))
    torch.testing.assert_close(ours * 3, 9 * theirs(student, teacher))
    torch.testing.assert_close(ours / 9, 9 * theirs(student, teacher, "mean"))
    both = 0.3 * ours + 0.7 * F.cross_entropy(flat[0], flat[2])
    torch.testing.assert_close(0.3 * fused_kd.kd_loss(*flat, temperature=3.0, ce_weight=0.7 / 0.3), both)


@golden("nkd", "uskd")
def test_cls_kd(case):
    tensors, params = inputs_of(case), dict(case["params"])
    student_logits, target = tensors["student_logits"], tensors["target"]
    if case["loss"] == "nkd":
        params["temp"] = params.pop("temperature")
        loss = run_snippet("cls_kd")["nkd"](student_logits, tensors["teacher_logits"], target, **params)
    else:
        if params["rank"] == "cls_kd":
            del params["rank"]  # the page's default
        loss = run_snippet("cls_kd")["uskd"](tensors["weak_logits"], student_logits, target, **params)
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
    ours = run_snippet("cls_kd")["kd"](student, teacher, target, alpha=alpha)
    torch.testing.assert_close(ours, theirs - alpha * 16 * entropy)
    torch.testing.assert_close(torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student))


def test_weights_of_a_published_uskd_load():
    criterion = fused_kd.USKDLoss(in_features=3, num_classes=5)
    state = {"fc.weight": torch.randn(5, 3), "fc.bias": torch.randn(5)}
    run_snippet("cls_kd")["load_uskd"](criterion, state)
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
        loss = run_snippet("mdistiller")["kd"](*logits, kd_weight=1.0, ce_weight=0.0, **params)
    else:
        criterion = run_snippet("mdistiller")["DKD"](ce_weight=0.0, **params)
        criterion.begin_epoch(20)
        loss = criterion(*logits)
    as_published(loss, case, tensors)


def test_weights_and_warmup_of_mdistiller():
    student, teacher, target = random_logits()
    ce = F.cross_entropy(student, target)
    kd = run_snippet("mdistiller")["kd"](student, teacher, target)
    torch.testing.assert_close(kd, 0.9 * fused_kd.kd_loss(student, teacher) + 0.1 * ce)
    criterion = run_snippet("mdistiller")["DKD"]()
    for epoch, share in ((1, 1 / 20), (10, 0.5), (20, 1.0), (90, 1.0)):
        criterion.begin_epoch(epoch)
        expected = ce + share * fused_kd.dkd_loss(student, teacher, target)
        torch.testing.assert_close(criterion(student, teacher, target), expected)


def test_warmup_of_mdistiller_compiles_twice():
    student, teacher, target = random_logits()
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    criterion = run_snippet("mdistiller")["DKD"]()
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

    ours = run_snippet("torchdistill_kd")["kd"](student, teacher, target, 3.0, 0.4, logit_standardization=standardized)
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


def divergences(student, teacher, temperature):
    """Of each row the logarithms of p and q, and KL(q | p) and KL(p | q), with no factor."""
    p, q = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return p, q, (q.exp() * (q - p)).sum(-1), (p.exp() * (p - q)).sum(-1)


def jensen_shannon(student, teacher, temperature, beta):
    """Rows of what TRL's GKDTrainer and Liger's chunked loss compute, from their formulas."""
    p, q, forward, reverse = divergences(student, teacher, temperature)
    if beta in (0.0, 1.0):
        return reverse if beta else forward
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)


def tokens():
    torch.manual_seed(1)
    student, teacher = 2 * torch.randn(2, 2, 5, 9, dtype=torch.float64)
    labels = torch.randint(9, (2, 5))
    labels[0, :2] = labels[1, 4] = -100
    return student.requires_grad_(), teacher, labels


def same(ours, theirs, student):
    torch.testing.assert_close(ours, theirs)
    expected = torch.autograd.grad(theirs, student, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(ours, student), expected)


@pytest.mark.parametrize("temperature", (1.0, 0.9, 3.0))
@pytest.mark.parametrize("beta", (0.0, 0.3, 0.5, 1.0))
def test_trl_and_liger(beta, temperature):
    student, teacher, labels = tokens()
    counted = labels != -100
    soft = jensen_shannon(student, teacher, temperature, beta)[counted].mean()
    ours = run_snippet("language_models")["trl_jsd"](student, teacher, labels, beta=beta, temperature=temperature)
    same(ours, soft, student)
    theirs = 0.8 * soft + 0.3 * F.cross_entropy(student[counted], labels[counted])
    ours = run_snippet("language_models")["liger_jsd"](
        student, teacher, labels, 0.3, 0.8, beta=beta, temperature=temperature
    )
    same(ours, theirs, student)
    if temperature != 1.0:
        apart = fused_kd.js_loss(student, teacher, labels, beta=beta, temperature=temperature)
        torch.testing.assert_close(apart, temperature**2 * soft)


@pytest.mark.parametrize("ratio", (0.0, 0.4, 1.0))
def test_torchtune(ratio):
    student, teacher, labels = tokens()
    counted = labels != -100
    p, q, _, reverse = divergences(student, teacher, 1.0)
    forward = -(q.exp() * p).sum(-1)  # a cross-entropy
    entropy = -(q.exp() * q).sum(-1)[counted].mean()
    theirs = ratio * forward[counted].mean() + (1 - ratio) * reverse[counted].mean()
    ours = run_snippet("language_models")["torchtune_symmetric_kl"](student, teacher, labels, ratio)
    same(ours + ratio * entropy, theirs, student)


def test_only_the_student_learns_a_temperature():
    """As the page says: through the student's logits, and only there."""
    student, teacher, labels = tokens()
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="write that loss in PyTorch"):
        fused_kd.kd_loss(student / temperature, teacher / temperature, labels, temperature=1.0)
    detached = (teacher / temperature).detach()
    ours = fused_kd.kd_loss(student / temperature, detached, labels, temperature=1.0)
    rows = detached.softmax(-1) * (detached.log_softmax(-1) - (student / temperature).log_softmax(-1))
    theirs = rows.sum(-1)[labels != -100].mean()
    torch.testing.assert_close(torch.autograd.grad(ours, temperature), torch.autograd.grad(theirs, temperature))
