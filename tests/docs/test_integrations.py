"""The snippets of docs/integrations.md, run as they stand there: a few steps, the loss that of a direct call."""

import copy
from types import SimpleNamespace

import pytest
import torch
from pages import copy_of, moved, needs, run_snippet, training_arguments, untouched
from torch import nn

from fused_kd import nkd_loss, uskd_loss

CLASSES = 7


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def classifiers():
    """A student, and a teacher in training mode whose dropout shows when it is left there."""
    student = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))
    return student, nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES), nn.Dropout(0.5))


def batches(count=3, rows=4):
    return [(torch.randn(rows, 3, 2, 2), torch.randint(CLASSES, (rows,))) for _ in range(count)]


def test_lightning(tmp_path):
    needs("lightning")
    import lightning

    student, teacher = classifiers()
    data, start, teacher_start = batches(), copy_of(student), copy_of(teacher)
    in_eval = copy.deepcopy(teacher).eval()
    module = run_snippet("lightning")["Distillation"](student, teacher)
    seen = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            images, target = batch
            with torch.no_grad():
                expected = nkd_loss(student(images), in_eval(images), target, ce_weight=1.0)
            seen.append([expected])

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen[-1].append(outputs["loss"].detach())

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=1, callbacks=[Watch()], enable_model_summary=False, **options)
    trainer.fit(module.train(), torch.utils.data.DataLoader(data, batch_size=None))
    assert len(seen) == 3
    for expected, loss in seen:
        torch.testing.assert_close(loss, expected)
    assert not module.train().teacher.training and module.student.training
    assert moved(student, start)
    untouched(teacher, teacher_start)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert set(saved) == {"student.1.weight", "student.1.bias"}


def hf_train(tmp_path, student, teacher, items, **options):
    """Train for an epoch; the losses that the Trainer had, batch by batch, with their inputs and what it divided by."""

    trainer_class = run_snippet("huggingface")["DistillationTrainer"]
    calls = []

    class Watched(trainer_class):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            with torch.no_grad():
                logits = [
                    net(**{k: v for k, v in inputs.items() if k != "labels"}).logits for net in (model, self.teacher)
                ]
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            calls.append((*logits, inputs["labels"], num_items_in_batch, result[0] if return_outputs else result))
            return result

    accumulation = options.pop("accumulation", 1)
    smoothing = options.pop("smoothing", 0.0)
    args = training_arguments(tmp_path, gradient_accumulation_steps=accumulation, label_smoothing_factor=smoothing)
    start, teacher_start = copy_of(student), copy_of(teacher)
    trainer = Watched(model=student, args=args, train_dataset=items, teacher=teacher, **options)
    trainer.train()
    assert moved(student, start) and not teacher.training
    untouched(teacher, teacher_start)
    trainer.save_model(str(tmp_path / "saved"))
    assert not any("teacher" in name for name in trainer.model.state_dict())
    return calls, start


@pytest.mark.parametrize("smoothing", (0.0, 0.2))
def test_hugging_face_image_classification(tmp_path, smoothing):
    needs("transformers", "accelerate")
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", num_labels=CLASSES, num_channels=3
    )
    student, teacher = (ResNetForImageClassification(config).eval() for _ in range(2))
    items = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % CLASSES} for i in range(6)]
    calls, _ = hf_train(tmp_path, student, teacher, items, smoothing=smoothing)
    assert len(calls) == 3
    for logits, teacher_logits, labels, _, loss in calls:
        direct = nkd_loss(logits, teacher_logits, labels, ce_weight=1.0, label_smoothing=smoothing)
        torch.testing.assert_close(loss.detach(), direct)


def test_hugging_face_language_model_with_gradient_accumulation(tmp_path):
    needs("transformers", "accelerate")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    student, teacher = (LlamaForCausalLM(config) for _ in range(2))
    items = []
    for row in range(
        8
    ):  # numbers of labels that differ; the first token predicts none, which not every release counts so
        ids = torch.randint(11, (6,))
        items.append({"input_ids": ids, "labels": ids.where(torch.arange(6) > row % 5, -100)})
    calls, start = hf_train(tmp_path, student, teacher, items, accumulation=4, shift_labels=True)
    assert len(calls) == 4  # one optimizer step
    counts = [int(labels[:, 1:].ne(-100).sum()) for _, _, labels, _, _ in calls]
    assert len(set(counts)) > 1 and {int(call[3]) for call in calls} == {sum(counts)}
    whole = [torch.cat(parts) for parts in zip(*(call[:3] for call in calls), strict=True)]
    direct = nkd_loss(whole[0][:, :-1], whole[1][:, :-1], whole[2][:, 1:], ce_weight=1.0)
    torch.testing.assert_close(sum(call[4].detach() for call in calls), direct)

    # The step is that of the gradient of the mean over all tokens of the four batches.
    by_hand = LlamaForCausalLM(config)
    by_hand.load_state_dict(start)
    ids, labels = (torch.stack([item[key] for item in items]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        teacher_logits = teacher(input_ids=ids).logits
    nkd_loss(by_hand(input_ids=ids).logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:], ce_weight=1.0).backward()
    for parameter, trained in zip(by_hand.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(trained.detach(), parameter.detach() - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("items", (None, 0, torch.tensor(0)), ids=("not passed", "number", "tensor"))
def test_hugging_face_without_a_label(items):
    """All prompt and padding: the loss and its gradient are 0, not 0 / 0."""
    needs("transformers", "accelerate")
    trainer_class = run_snippet("huggingface")["DistillationTrainer"]
    student, teacher = torch.randn(2, 2, 5, CLASSES)
    student.requires_grad_()
    trainer = SimpleNamespace(
        teacher=lambda **_: SimpleNamespace(logits=teacher),
        shift_labels=True,
        weights={"ce_weight": 1.0},
        args=SimpleNamespace(average_tokens_across_devices=False, label_smoothing_factor=0.1),
    )
    inputs = {"labels": torch.full((2, 5), -100)}
    outputs = SimpleNamespace(logits=student)
    loss = trainer_class.compute_loss(trainer, lambda **_: outputs, inputs, num_items_in_batch=items)
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()


def test_hugging_face_shifts_labels_and_copies_no_logits():
    needs("transformers", "accelerate")
    names = run_snippet("huggingface")
    student, teacher = torch.randn(2, 2, 5, CLASSES)
    labels = torch.randint(CLASSES, (2, 5))
    given = []

    def watched(*tensors, **options):
        given.extend(tensors)
        return nkd_loss(*tensors, **options)

    names["nkd_loss"] = watched
    trainer = SimpleNamespace(
        teacher=lambda **_: SimpleNamespace(logits=teacher),
        shift_labels=True,
        weights={"ce_weight": 1.0},
        args=SimpleNamespace(label_smoothing_factor=0.0),
    )
    outputs = SimpleNamespace(logits=student)
    loss = names["DistillationTrainer"].compute_loss(trainer, lambda **_: outputs, {"labels": labels})
    torch.testing.assert_close(loss, nkd_loss(student[:, :-1], teacher[:, :-1], labels[:, 1:], ce_weight=1.0))
    for found, logits in zip(given, (student, teacher), strict=False):
        assert found.data_ptr() == logits.data_ptr() and found.is_contiguous()


def test_mmengine(tmp_path):
    needs("mmengine", "cv2")
    from mmengine.model import BaseModel
    from mmengine.registry import MODELS
    from mmengine.runner import Runner

    before = dict(MODELS.module_dict)
    run_snippet("mmengine")
    student, teacher = classifiers()
    start, teacher_start = copy_of(student), copy_of(teacher)
    seen = []

    class Distiller(BaseModel):
        def __init__(self):
            super().__init__()
            self.student = student
            # as the published configs have them, for res34 to res18 and for res18 by itself
            self.nkd = MODELS.build(
                {"type": "NKDLoss", "name": "loss_nkd", "use_this": True, "temp": 2.0, "gamma": 3.0}
            )
            uskd = {"type": "USKDLoss", "name": "loss_uskd", "use_this": True, "channel": 12, "alpha": 1, "beta": 0.1}
            self.uskd = MODELS.build({**uskd, "mu": 0.005, "num_classes": CLASSES})

        def forward(self, images, target, mode):
            with torch.no_grad():
                logit_t = teacher.eval()(images)
            logit_s, feature = self.student(images), images.flatten(1)
            losses = {"loss_nkd": self.nkd(logit_s, logit_t, target), "loss_uskd": self.uskd(feature, logit_s, target)}
            weak = self.uskd.weak_classifier(feature)
            direct = nkd_loss(logit_s, logit_t, target, gamma=3.0, temperature=2.0), uskd_loss(logit_s, weak, target)
            seen.extend(zip(losses.values(), direct, strict=True))
            return losses

    try:
        Runner(
            model=Distiller(),
            work_dir=str(tmp_path),
            train_dataloader=torch.utils.data.DataLoader(batches(), collate_fn=lambda items: items[0]),
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
            default_hooks={"checkpoint": None, "logger": None},
            log_level="ERROR",
            experiment_name="tiny",
        ).train()
    finally:
        for name in set(MODELS.module_dict) - set(before):
            del MODELS.module_dict[name]
    assert len(seen) == 6
    for loss, direct in seen:
        torch.testing.assert_close(loss, direct)
    assert moved(student, start)
    untouched(teacher, teacher_start)


def test_torchdistill():
    needs("torchdistill", "torchvision")
    from torchdistill.core.distillation import DistillationBox
    from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

    config = {
        "num_epochs": 1,
        "criterion": run_snippet("torchdistill")["criterion"],
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1}},
    }
    student, teacher = classifiers()
    start, teacher_start = copy_of(student), copy_of(teacher)
    try:
        box = DistillationBox(teacher.eval(), student, {}, config, torch.device("cpu"), None, False, 1)
        for images, target in batches():
            loss = box.forward_process(images, targets=target)
            direct = nkd_loss(student(images).detach(), teacher(images).detach(), target, ce_weight=1.0)
            torch.testing.assert_close(loss.detach(), direct)
            box.post_forward_process(loss=loss)
    finally:
        del MIDDLE_LEVEL_LOSS_DICT["FusedNKDLoss"]
    assert moved(student, start)
    untouched(teacher, teacher_start)
