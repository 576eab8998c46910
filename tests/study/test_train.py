"""Training runs on a tiny data set: every loss, what a folder gets, and what is refused."""

import json
import sys
import types

import numpy as np
import pytest
import torch
import train_runs
from train_runs import run

pytest.importorskip("safetensors")

from fused_kd import backends
from study import train
from study.datasets import registry
from study.datasets.arrays import DataError
from study.training import batches, checkpoint, engine, methods, networks, options, report
from study.training.errors import RunError
from study.training.report import read_table


@pytest.fixture(autouse=True)
def here():
    with train_runs.here():
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The best.safetensors of a run with cross-entropy."""
    folder = tmp_path_factory.mktemp("teacher")
    with train_runs.here():
        run("--out", folder, "--epochs", 1)
    return folder / "best.safetensors"


def test_learns(tmp_path):
    result = run("--out", tmp_path / "run", "--epochs", 14, "--lr", 0.1, "--time-loss", "--tensorboard", "--seed", 1)
    assert result.accuracy["test"] > 0.6
    assert result.best["test"] >= result.accuracy["test"] and result.epochs == 14
    assert 0 < result.loss_share < 1 and result.samples_per_second > 0 and result.peak_memory > 2**20
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"best.safetensors", "last.pt", "steps.csv", "epochs.csv", "curves.png", "run.json", "tensorboard"} <= names
    network, description = checkpoint.load_network(tmp_path / "run" / "best.safetensors", "--teacher")
    assert (description["epoch"], description["classes"]) == (result.best_epoch, train_runs.CLASSES)
    split = train_runs.tiny().tests["test"]
    logits = network(torch.tensor(split.inputs).float() / 255)
    assert (logits.argmax(1).numpy() == split.labels).mean() == pytest.approx(result.best["test"])


@pytest.mark.parametrize("loss", methods.NAMES)
def test_every_loss(loss, tmp_path, teacher):
    needs_teacher = methods.build(loss, [], "auto").needs_teacher
    options = ("--teacher", teacher) if needs_teacher else ()
    run("--loss", loss, "--out", tmp_path, "--epochs", 1, "--batch-size", 64, *options)
    rows = read_table(tmp_path / "steps.csv")
    assert len(rows) == 2
    for row in rows:
        parts = [float(value) for name, value in row.items() if name.startswith("loss_")]
        assert sum(parts) == pytest.approx(float(row["loss"]), rel=1e-5)
        assert float(row["loss"]) > 0


@pytest.mark.parametrize("loss", ["uskd", "zipf-ls", "kd"])
def test_vision_transformer(loss, tmp_path, teacher):
    options = ("--teacher", teacher) if loss == "kd" else ()
    run("--loss", loss, "--model", "vit-tiny", "--out", tmp_path, "--epochs", 1, "--batch-size", 64, *options)


def test_backends_agree(tmp_path, teacher):
    for backend in ("auto", "reference"):
        run("--loss", "nkd", "--teacher", teacher, "--out", tmp_path / backend, "--backend", backend, "--mixup", 0.5)
    losses = [
        [float(row["loss"]) for row in read_table(tmp_path / name / "steps.csv")] for name in ("auto", "reference")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_hyper_parameters_reach_the_loss(tmp_path, teacher):
    common = ("--loss", "nkd", "--teacher", teacher, "--epochs", 1)
    for name, setting in (("half", "gamma=0.75"), ("whole", "gamma=1.5")):
        run(*common, "--out", tmp_path / name, "--set", setting, "--set", "ce_weight=0")
    half, whole = (float(read_table(tmp_path / name / "steps.csv")[0]["loss_non_target"]) for name in ("half", "whole"))
    assert whole == pytest.approx(2 * half, rel=1e-5)


def test_accumulation_is_the_batch(tmp_path):
    """Without BatchNorm, whose statistics are a piece's."""
    for pieces in (1, 4):
        run("--out", tmp_path / str(pieces), "--accumulate", pieces, "--norm", "group", "--loss", "tf-kd")
    one, four = (train_runs.state(tmp_path / name)["student"] for name in "14")
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-4, atol=1e-6)


def test_autocast(tmp_path):
    run("--out", tmp_path / "bf16", "--amp", "bf16", "--loss", "uskd")
    run("--out", tmp_path / "no", "--loss", "uskd")
    first, second = (float(read_table(tmp_path / name / "steps.csv")[0]["loss"]) for name in ("bf16", "no"))
    assert first == pytest.approx(second, rel=2e-2) and first != second


def test_seed_decides(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("--out", tmp_path / name, "--seed", seed, "--epochs", 1)
    a, b, c = (train_runs.state(tmp_path / name)["student"] for name in "abc")
    assert train_runs.same(a, b) and not train_runs.same(a, c)


def test_shift_repeats_edges():
    image = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4)
    still, moved, mirrored = (
        batches.shifted(image, torch.tensor([shift]), torch.tensor([flip]))[0, 0].tolist()
        for shift, flip in (((0, 0), False), ((1, -1), False), ((0, 0), True))
    )
    assert still == image[0, 0].tolist()
    assert moved == [[4, 4, 5, 6], [8, 8, 9, 10], [8, 8, 9, 10]]
    assert mirrored == [row[::-1] for row in image[0, 0].tolist()]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_labels_are_the_images_shares(kind):
    """Of one white class and one black: an image's mean is the white's share of its label."""
    tiny = train_runs.tiny(classes=2)
    images = np.repeat((tiny.train.labels * 255).astype(np.uint8), train_runs.SIZE**2).reshape(tiny.train.inputs.shape)
    split = type(tiny.train)(images, tiny.train.labels)
    augmentation = batches.Augmentation(**{kind: 1.0})
    made = list(batches.Batches(split, 2, 16, augmentation, 0, 0, 1).epoch(0, 0))
    target = torch.cat([batch.target for batch in made])
    torch.testing.assert_close(torch.cat([batch.inputs for batch in made]).mean(dim=(1, 2, 3)), target[:, 1])
    assert (target.min(dim=1).values > 0).any()


def test_epoch_has_each_image_once_in_an_order_of_its_own():
    split = train_runs.tiny().train
    make = batches.Batches(split, 20, 16, batches.Augmentation(), 0, 0, 1)
    first, second = (torch.cat([batch.rows for batch in make.epoch(epoch, 0)]) for epoch in (0, 1))
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(128))
    assert first.tolist() != second.tolist()


def test_processes_share_the_global_batch():
    split, augmentation = train_runs.tiny().train, batches.Augmentation(shift=2, mixup=0.5, cutmix=0.5)
    whole = list(batches.Batches(split, 20, 16, augmentation, 3, 0, 1).epoch(2, 5))
    shares = [list(batches.Batches(split, 20, 16, augmentation, 3, rank, 2).epoch(2, 5)) for rank in range(2)]
    for one, first, second in zip(whole, *shares, strict=True):
        for tensor, half, other in zip(one, first, second, strict=True):
            assert torch.equal(tensor, torch.cat([half, other]))


def test_learning_rate():
    rates = [engine.learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0 and 0 < rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def stand_in(model):
    """For timm, which is not needed here: its create_model makes this model."""
    return types.SimpleNamespace(create_model=lambda name, **options: model(**options))


def test_timm_network_with_stages(monkeypatch):
    class Model(torch.nn.Module):
        def __init__(self, num_classes, in_chans):
            super().__init__()
            self.stages = torch.nn.Sequential(
                *(torch.nn.Conv2d(n, m, 3, 2, 1) for n, m in ((in_chans, 4), (4, 6), (6, 8)))
            )
            self.fc = torch.nn.Linear(8, num_classes)

        def forward_features(self, x):
            return self.stages(x)

        def forward_head(self, x):
            return self.fc(x.mean((2, 3)))

        def get_classifier(self):
            return self.fc

    monkeypatch.setitem(sys.modules, "timm", stand_in(Model))
    network = networks.build("timm:any", classes=5, channels=1, size=16, norm="batch", mean=(0.5,), std=(0.5,))
    outputs = networks.Student(network, 5, weak=True, dense=True)(torch.rand(3, 1, 16, 16))
    assert network.weak_width == 6
    assert outputs.logits.shape == outputs.weak.shape == (3, 5) and outputs.dense.shape == (3, 4, 5)
    torch.testing.assert_close(outputs.dense.mean(1), outputs.logits)  # the head is linear


@pytest.mark.parametrize("model", networks.NETWORKS)
def test_every_network_has_what_the_losses_ask_for(model):
    network = networks.build(model, classes=5, channels=1, size=32, norm="batch", mean=(0.5,), std=(0.5,))
    outputs = networks.Student(network, 5, weak=True, dense=True).eval()(torch.rand(2, 1, 32, 32))
    assert outputs.logits.shape == outputs.weak.shape == (2, 5)
    assert outputs.dense.shape[0] == 2 and outputs.dense.shape[1] > 1 and outputs.dense.shape[2] == 5


@pytest.mark.parametrize("model", ["cnn-tiny", "vit-tiny"])
def test_gradient_of_the_weak_feature_ends_where_it_is_taken(model):
    network = networks.build(model, classes=5, channels=1, size=16, norm="group", mean=(0.5,), std=(0.5,))
    network.features(torch.rand(2, 1, 16, 16)).weak.sum().backward()
    stages = network.stages if model == "cnn-tiny" else network.blocks
    reached = [all(p.grad is not None for p in stage.parameters()) for stage in stages]
    assert reached == ([True, True, False] if model == "cnn-tiny" else [True, True, False, False])


REFUSED = {
    "teacher_missing": (("--loss", "nkd"), "--loss nkd: needs a teacher"),
    "teacher_useless": (("--teacher", "TEACHER"), "--teacher: --loss ce takes no teacher"),
    "teacher_no_file": (("--loss", "kd", "--teacher", "none.safetensors"), "--teacher none.safetensors: no such file"),
    "option": (
        ("--loss", "uskd", "--set", "gamma=1"),
        "expected NAME=VALUE with a hyper-parameter of uskd: alpha, beta",
    ),
    "number": (("--loss", "uskd", "--set", "alpha=much"), "--set alpha=much: expected a number"),
    "value": (("--loss", "kd", "--teacher", "TEACHER", "--set", "temperature=0"), "--loss kd: temperature: expected"),
    "backend": (
        ("--loss", "uskd", "--backend", "triton", "--device", "cpu"),
        "--loss uskd: backend 'triton' cannot run cpu tensors here",
    ),
    "backend_of_ce": (("--backend", "native"), "--backend native: --loss ce is PyTorch's cross-entropy"),
    "batch": (("--batch-size", "500"), "--batch-size 500: more than the 128 images"),
    "pieces": (("--accumulate", "3"), "--batch-size 16: cannot be divided"),
    "model": (("--model", "resnet-1000"), "--model: expected one of cnn-tiny"),
    "epochs": (("--epochs", "0"), "--epochs: expected at least 1, got 0"),
    "fp16": (("--amp", "fp16"), "--amp fp16: for CUDA only"),
    "cache": (("--cache-teacher", "DIR"), "--cache-teacher: there is no --teacher"),
    "diverged": (("--lr", "1e30"), "the loss is not finite at step"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_and_status_2(case, tmp_path, teacher, capsys, monkeypatch):
    arguments, message = REFUSED[case]
    arguments = [str(teacher) if argument == "TEACHER" else argument for argument in arguments]
    monkeypatch.setattr(backends, "unavailable", lambda name, *_: "not here" if name == "triton" else None)
    monkeypatch.setattr(backends, "_chosen", {})  # what tests before this one could run, and what this one says it can
    assert train.main([*train_runs.SMALL, "--out", str(tmp_path), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("train.py: ") and message in lines[-1]
    assert "Traceback" not in "".join(lines)


def test_teacher_of_other_classes(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(registry, "load", lambda args, bar: train_runs.tiny(classes=10))
    with pytest.raises(RunError, match="trained with 20 classes, but the data set has 10"):
        run("--loss", "kd", "--teacher", teacher, "--out", tmp_path)


def test_corrupt_teacher(tmp_path, teacher):
    whole = teacher.read_bytes()
    for damaged in (whole[:-100], b"\0" * 200, whole[:100]):
        (tmp_path / "damaged.safetensors").write_bytes(damaged)
        with pytest.raises(RunError, match="corrupt checkpoint"):
            run("--loss", "kd", "--teacher", tmp_path / "damaged.safetensors", "--out", tmp_path / "run")


def test_data_errors_are_one_line(tmp_path, monkeypatch, capsys):
    def load(args, bar):
        raise DataError("/none: no such folder")

    monkeypatch.setattr(registry, "load", load)
    assert train.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "train.py: /none: no such folder\n"


def test_unwritable_output(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main([*train_runs.SMALL, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_network_without_a_known_stage_trains_without_uskd(monkeypatch):
    class Model(torch.nn.Linear):
        def __init__(self, num_classes, in_chans):
            super().__init__(in_chans, num_classes)

        def forward_features(self, x):
            return x.mean((2, 3))

        def forward_head(self, x):
            return self(x)

    monkeypatch.setitem(sys.modules, "timm", stand_in(Model))
    network = networks.build("timm:any", classes=5, channels=1, size=16, norm="batch", mean=(0.5,), std=(0.5,))
    assert networks.Student(network, 5, weak=False, dense=False)(torch.rand(3, 1, 16, 16)).logits.shape == (3, 5)
    with pytest.raises(RunError, match="--loss uskd: this network has no second stage"):
        networks.Student(network, 5, weak=True, dense=False)


def test_interruption_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(self, batch, number):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.Trainer, "step", interrupted)
    assert train.main([*train_runs.SMALL, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("--resume continues from the last checkpoint")


def test_result_is_written(tmp_path, capsys):
    assert train.main([*train_runs.SMALL, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["epochs"] == 2 and set(result["accuracy"]) == {"test", "other"}
    assert "last epoch" in capsys.readouterr().out


def test_help_lists_every_choice(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = "".join(capsys.readouterr().out.split())
    for action in options.make_parser()._actions:
        assert all(str(choice) in text for choice in action.choices or ()), action.dest


def test_curves_of_one_epoch(tmp_path, monkeypatch):
    """A point is seen, and the axis of the epochs has the one that there is."""
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    (tmp_path / "steps.csv").write_text("step,epoch,lr,loss,loss_ce\n8,1,0.1,2.5,2.5\n")
    (tmp_path / "epochs.csv").write_text("epoch,loss,lr,accuracy_test\n1,2.5,0.1,0.3\n")
    report.plot_curves(tmp_path, "one epoch")
    losses, accuracies = drawn[0].axes
    assert [line.get_marker() for line in losses.lines] == ["o"]
    left, right = accuracies.get_xlim()
    assert [tick for tick in accuracies.get_xticks() if left <= tick <= right] == [1.0]
