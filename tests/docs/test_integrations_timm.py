"""docs/integrations.md's tasks for timm, run as they stand there, with what timm's own train.py passes."""

import copy

import pytest
import torch
from pages import copy_of, moved, needs, run_snippet, untouched
from torch import nn

from fused_kd import nkd_loss, uskd_loss

CLASSES = 7


def step(task, optimizer, images, target):
    result = task(images, target)
    optimizer.zero_grad()
    result["loss"].backward()
    optimizer.step()
    return {name: value.detach() for name, value in result.items()}


def tiny_vits(count):
    import timm

    tiny = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    models = [timm.create_model("vit_tiny_patch16_224", **tiny) for _ in range(count)]
    for model in models:
        nn.init.normal_(model.head.weight)  # timm's are 0, and so would be all logits
    return models


def timm_batches(mixup):
    for images, classes in [(torch.randn(4, 3, 8, 8), torch.randint(CLASSES, (4,))) for _ in range(2)]:
        yield images, classes
        yield mixup(images.clone(), classes)


@pytest.mark.parametrize(
    ("passed", "weights"),
    (
        ({}, (1.0, 1.0)),
        ({"task_loss_weight": 0.3}, (0.3, 0.7)),
        ({"distill_loss_weight": 2.0, "task_loss_weight": 0.5}, (0.5, 2.0)),
    ),
)
def test_timm(passed, weights):
    """With what timm's train.py passes: a criterion, both loss weights, and its own divergence's temperature."""
    needs("timm", "torchvision")
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2

    page = run_snippet("timm")
    student, teacher = tiny_vits(2)
    soft = SoftTargetCrossEntropy()

    def criterion(output, target):
        return soft(output, target) if target.dim() == 2 else nn.functional.cross_entropy(output, target)

    options = {"criterion": criterion, "temperature": 4.0, "verbose": False, **passed}
    task = page["NKDTask"](student, teacher, gamma=2.0, **options).train()
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1)
    start, teacher_start = copy_of(student), copy_of(teacher)
    for inputs, target in timm_batches(Mixup(mixup_alpha=0.8, num_classes=CLASSES, label_smoothing=0.1)):
        with torch.no_grad():
            teacher_logits = teacher(inputs)
        result = step(task, optimizer, inputs, target)
        task_loss = criterion(result["output"], target)
        kd_loss = nkd_loss(result["output"], teacher_logits, target, gamma=2.0)
        torch.testing.assert_close(result["loss"], weights[0] * task_loss + weights[1] * kd_loss)
        torch.testing.assert_close((result["task_loss"], result["kd_loss"]), (task_loss, kd_loss))
    assert moved(student, start) and not teacher.training
    untouched(teacher, teacher_start)


def test_timm_smoothing():
    """Of --smoothing, from which timm makes the criterion."""
    needs("timm", "torchvision")
    student, teacher = tiny_vits(2)
    options = {"criterion_kwargs": {"smoothing": 0.2}, "verbose": False}
    task = run_snippet("timm")["NKDTask"](student, teacher, **options).train()
    images, target = torch.randn(4, 3, 8, 8), torch.randint(CLASSES, (4,))
    result = task(images, target)
    smoothed = nn.functional.cross_entropy(result["output"], target, label_smoothing=0.2)
    torch.testing.assert_close(result["task_loss"], smoothed)


def test_timm_without_a_teacher():
    needs("timm", "torchvision")
    from timm.data import Mixup
    from timm.optim import create_optimizer_v2

    page = run_snippet("timm")
    (student,) = tiny_vits(1)
    options = {"criterion": nn.CrossEntropyLoss(label_smoothing=0.1), "verbose": False}
    task = page["USKDTask"](student, student.blocks[0], 8, CLASSES, **options).train()
    task.setup_ema(decay=0.5)
    optimizer = create_optimizer_v2(nn.ModuleList([student, task.uskd]), opt="sgd", lr=0.1)
    start = copy_of(task.uskd)
    features = []
    student.blocks[0].register_forward_hook(lambda module, inputs, output: features.append(output[:, 0].detach()))
    for inputs, target in timm_batches(Mixup(mixup_alpha=0.8, num_classes=CLASSES, label_smoothing=0.1)):
        weak = copy_of(task.uskd)
        result = step(task, optimizer, inputs, target)
        weak_logits = nn.functional.linear(features[-1], *weak.values())
        expected = uskd_loss(result["output"], weak_logits, target) + task.criterion(result["output"], target)
        torch.testing.assert_close(result["loss"], expected)
        task.update_ema()
        copy.deepcopy(student)(inputs)
        copy.deepcopy(task)
        task.get_trainable_module(ema=True)(inputs)
        assert not task.kept, "what is kept after a step holds its graph, and cannot be copied"
    assert moved(task.uskd, start)

    parameters = {id(parameter) for parameter in task.get_clip_parameters()}
    assert {id(parameter) for parameter in (*student.parameters(), *task.uskd.parameters())} == parameters
    assert len(list(task.get_clip_parameters(exclude_head=True))) == len(parameters) - 2
    saved = copy.deepcopy(task.get_checkpoint_state())
    (other,) = tiny_vits(1)
    again = page["USKDTask"](other, other.blocks[0], 8, CLASSES, **options)
    again.load_checkpoint_state(saved["state_dict"], saved["task_state"])
    for one, two in ((task.uskd, again.uskd), (student, other)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[name])
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_checkpoint_state(saved["state_dict"], None)
