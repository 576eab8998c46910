"""The recipes of docs/recipes/, run as they stand there, beside their formulas in plain PyTorch."""

import os
import subprocess
import sys
from types import ModuleType

import pages
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from pages import needs, run_snippet
from torch import nn

from fused_kd import kd_loss, nkd_loss

CLASSES = 7


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def logits(rows=6, count=2):
    """The first requires grad."""
    first, *others = torch.randn(count, rows, CLASSES, dtype=torch.float64)
    return first.requires_grad_(), *others, torch.randint(CLASSES, (rows,))


def divergence(student, teacher, temperature):
    """T² KL, a mean over the rows."""
    log_p, log_q = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def same(loss, expected, *tensors):
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, tensors, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, tensors, retain_graph=True))


def test_the_schedule_compiles_once_more_for_all_epochs(monkeypatch):
    module = ModuleType("schedule")  # PyTorch tells globals of no module apart at each compilation
    monkeypatch.setitem(sys.modules, "schedule", module)
    names = vars(module)
    for block in pages.unnamed(pages.DOCS / "recipes" / "options.md"):
        exec(block, names)
        if "progress" in names:
            break
    progress, arguments = names["progress"], [names[name] for name in ("student_logits", "teacher_logits", "target")]
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(names["criterion"], backend=counter, fullgraph=True)
    for epoch in range(12):
        progress["epoch"] = type(progress["epoch"])(epoch)
        torch.testing.assert_close(compiled(*arguments), names["criterion"](*arguments))
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_detection():
    student, teacher = torch.randn(2, 40, CLASSES + 1)
    labels = torch.randint(-1, CLASSES + 1, (40,))
    weights = torch.rand(40) * (torch.rand(40) < 0.7)
    criterion = run_snippet("detection")["BoxDistillation"](gamma=2.0)
    student.requires_grad_()
    loss = criterion(student, teacher, labels, weights, 17.0)
    (gradient,) = torch.autograd.grad(loss, student)
    rows = nkd_loss(student, teacher, labels, gamma=2.0, ignore_index=-1, reduction="none")
    by_hand = sum(weight * row for weight, row in zip(weights, rows, strict=True)) / 17.0
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(gradient, torch.autograd.grad(by_hand, student)[0])
    for nothing in (0, 0.0, torch.tensor(0.0)):  # as detectors count, where a batch has no box
        loss = criterion(student, teacher, torch.full_like(labels, -1), weights, nothing)
        assert loss == 0
        assert not torch.autograd.grad(loss, student)[0].any()


def test_segmentation():
    page = run_snippet("segmentation")
    student, teacher = torch.randn(2, 2, CLASSES, 3, 4, dtype=torch.float64)
    labels = torch.randint(CLASSES, (2, 3, 4))
    labels[0, 1] = 255
    student.requires_grad_()
    pixels = F.kl_div((student / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="none").sum(1)
    cross_entropy = F.cross_entropy(student, labels, ignore_index=255)
    by_hand = [4 * pixels[labels != 255].mean() + cross_entropy]
    log_p, q = (student.flatten(2) / 3).log_softmax(2), (teacher.flatten(2) / 3).softmax(2)
    by_hand.append(9 * (q * (q.log() - log_p)).sum() / (2 * CLASSES))  # the paper's Eq. 4 and 5, of two images
    ours = page["pixelwise"](student, teacher, labels, temperature=2.0), page["channelwise"](student, teacher, 3.0)
    for loss, expected in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))


def test_detection_heads_of_torchvision():
    """Boxes that torchvision's RoIHeads sampled, through its own head and predictor."""
    needs("torchvision")
    from torchvision.models.detection import faster_rcnn, roi_heads

    def heads():
        predictor = faster_rcnn.FastRCNNPredictor(8, CLASSES + 1)
        return nn.ModuleList([faster_rcnn.TwoMLPHead(12, 8), predictor])

    student, teacher = heads(), heads()
    sampler = roi_heads.RoIHeads(None, None, None, 0.5, 0.5, 16, 0.5, None, 0.05, 0.5, 10)
    boxes = [torch.rand(30, 4) + torch.tensor([0.0, 0.0, 1.0, 1.0]) for _ in range(2)]
    targets = [{"boxes": found[:3], "labels": torch.tensor([1, 4, CLASSES])} for found in boxes]
    proposals, _, labels, _ = sampler.select_training_samples(boxes, targets)
    labels = torch.cat(labels)  # 0 is the background
    features = torch.randn(len(torch.cat(proposals)), 3, 2, 2)
    logits, teacher_logits = (predictor(head(features))[0] for head, predictor in (student, teacher))
    weights = torch.where(labels == 0, 0.0, 1.0)
    criterion = run_snippet("detection")["BoxDistillation"]()
    loss = criterion(logits, teacher_logits, labels, weights, weights.sum())
    loss.backward()
    torch.testing.assert_close(
        loss, nkd_loss(logits[labels != 0], teacher_logits[labels != 0].detach(), labels[labels != 0])
    )
    assert all(parameter.grad.abs().sum() > 0 for parameter in student[0].parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_processes(tmp_path, capsys):
    script = tmp_path / "script.py"
    # As it stands there, and what no page needs to tell: under load PyTorch may abort a process that ends.
    script.write_text(pages.snippet("processes") + "    from tests.support.worlds import leave\n    leave()\n")
    run_snippet("processes")["train"]()
    alone = capsys.readouterr().out.split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    root = str(pages.DOCS.parent)
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    losses = [float(line) for line in ran.stdout.split()]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert losses == pytest.approx([float(line) for line in alone], abs=5e-6)


def test_mixup():
    page, batch = run_snippet("mixup"), torch.rand(4, 3, dtype=torch.float64)
    images, labels = page["mixup"](batch, torch.tensor([0, 1, 2, 3]), CLASSES)
    torch.testing.assert_close(labels.sum(1), torch.ones(4))
    # A row's labels tell which images it is of, and in which shares.
    torch.testing.assert_close(images, labels[:, :4].double() @ batch)
    student, teacher = nn.Linear(3, CLASSES).double(), nn.Linear(3, CLASSES).double()
    torch.manual_seed(1)
    loss = page["distillation"](student, teacher, batch, torch.tensor([0, 1, 2, 3]), CLASSES)
    torch.manual_seed(1)
    images, labels = page["mixup"](batch, torch.tensor([0, 1, 2, 3]), CLASSES)
    soft = nkd_loss(student(images), teacher(images).detach(), labels.argmax(1))
    same(loss, soft + F.cross_entropy(student(images), labels.double()), student.weight)
    assert teacher.weight.grad is None


def test_stored_teacher_outputs():
    page = run_snippet("stored_teacher")
    teacher, images = nn.Linear(3, CLASSES), torch.rand(10, 3)
    values, classes = page["store"](teacher, images.split(4), k=CLASSES)
    assert values.shape == classes.shape == (10, CLASSES) and values.element_size() + classes.element_size() == 6
    numbers, target = torch.tensor([9, 0, 4]), torch.tensor([1, 2, 3])
    student = torch.randn(3, CLASSES, requires_grad=True)
    loss = page["distillation"](student, values, classes, numbers, target, temperature=2.0)
    whole = kd_loss(student, teacher(images[numbers]).detach(), target, temperature=2.0, ce_weight=1.0)
    torch.testing.assert_close(loss, whole, rtol=1e-2, atol=1e-2)  # bfloat16
    values, classes = page["store"](teacher, images.split(4), k=3)
    loss = page["distillation"](student, values, classes, numbers, target)
    log_p, log_q = student.log_softmax(1).gather(1, classes[numbers].long()), values[numbers].float()
    bucket = [1 - log.exp().sum(1, keepdim=True) for log in (log_p, log_q)]
    log_p, log_q = (torch.cat([log, rest.log()], 1) for log, rest in zip((log_p, log_q), bucket, strict=True))
    same(
        loss, F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) + F.cross_entropy(student, target), student
    )


def test_class_imbalance():
    page, (student, teacher, target) = run_snippet("imbalance"), logits()
    counts = torch.tensor([1000, 500, 100, 50, 10, 5, 1])
    weights = page["class_weights"](counts)
    assert (weights.diff() > 0).all()
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights[6] / weights[4], torch.tensor((1 - 0.999**10) / (1 - 0.999)).float())
    rows = nkd_loss(student, teacher, target, reduction="none")
    weights = weights.double()
    soft = (weights[target] * rows).sum() / weights[target].sum()
    same(
        page["reweighted"](student, teacher, target, weights),
        soft + F.cross_entropy(student, target, weight=weights),
        student,
    )
    prior = (counts.double() / counts.sum()).log()
    expected = nkd_loss(student + prior, teacher, target) + F.cross_entropy(student + prior, target)
    same(page["adjusted"](student, teacher, target, counts.double()), expected, student)


def test_srrl():
    head = nn.Linear(5, CLASSES).double()
    criterion = run_snippet("srrl")["SRRL"](4, head, alpha=0.5, beta=2.0, temperature=3.0).double()
    student, teacher = torch.randn(6, 4).double().requires_grad_(), torch.randn(6, 5).double()
    adapted = criterion.adapter(student)
    expected = 0.5 * (adapted - teacher).square().mean() + 2.0 * divergence(head(adapted), head(teacher), 3.0)
    same(criterion(student, teacher), expected, student, criterion.adapter.weight)
    assert {name for name, _ in criterion.named_parameters()} == {"adapter.weight", "adapter.bias"}


def test_cs_kd():
    model, (images, partners) = nn.Linear(3, CLASSES).double(), torch.rand(2, 6, 3, dtype=torch.float64)
    target = torch.randint(CLASSES, (6,))
    soft = divergence(model(images), model(partners).detach(), 4.0)
    loss = run_snippet("cs_kd")["cs_kd"](model, images, partners, target, weight=0.5)
    same(loss, 0.5 * soft + F.cross_entropy(model(images), target), model.weight)


def test_kdcl():
    page, (first, second, third, target) = run_snippet("kdcl"), logits(count=3)
    second.requires_grad_()
    taught = page["min_logit"]([first, second, third], target)
    for row, label in enumerate(target.tolist()):
        for column in range(CLASSES):
            least = min((each[row, column] - each[row, label]).item() for each in (first, second, third))
            assert taught[row, column].item() == pytest.approx(least)
    # As the page says: no student's cross-entropy is below the teacher's.
    assert all(F.cross_entropy(taught, target) <= F.cross_entropy(each, target) for each in (first, second, third))
    hard = F.cross_entropy(first, target) + F.cross_entropy(second, target)
    taught_by_two = page["min_logit"]([first, second], target)
    soft = sum(divergence(each, taught_by_two, 2.0) for each in (first, second))
    same(page["kdcl"]([first, second], target, weight=0.25), 0.25 * soft + hard, first, second)


def test_byot():
    shallow, _, target = logits()
    deepest = torch.randn(6, CLASSES, dtype=torch.float64, requires_grad=True)
    features = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    loss = run_snippet("byot")["byot"]([shallow, deepest], features, target, alpha=0.3, hint=0.1)
    expected = F.cross_entropy(deepest, target) + 0.7 * F.cross_entropy(shallow, target)
    expected = expected + 0.3 * divergence(shallow, deepest.detach(), 3.0)
    expected = expected + 0.1 * (features[0] - features[1].detach()).square().mean()
    same(loss, expected, shallow, deepest, features[0])
    assert torch.autograd.grad(loss, features[1], allow_unused=True) == (None,)
