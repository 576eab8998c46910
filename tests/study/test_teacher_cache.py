"""Cached logits of a teacher: what they are, and which cache is refused."""

import numpy as np
import pytest
import torch
import train_runs
from train_runs import run

pytest.importorskip("safetensors")

from study.datasets import registry
from study.training import checkpoint, teacher_cache
from study.training.batches import plain_batches
from study.training.errors import RunError
from study.training.report import read_table


@pytest.fixture(autouse=True)
def here():
    with train_runs.here():
        yield


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    with train_runs.here():
        for seed in (0, 1):
            run("--out", folder / str(seed), "--epochs", 3, "--lr", 0.1, "--seed", seed)
    return [folder / str(seed) / "best.safetensors" for seed in (0, 1)]


def nkd(teacher, out, cache, *arguments):
    return run("--loss", "nkd", "--teacher", teacher, "--out", out, "--cache-teacher", cache, "--epochs", 1, *arguments)


def opened(folder, teacher, top_k):
    tiny = train_runs.tiny()
    weights = checkpoint.weights_hash(checkpoint.load_teacher(teacher, tiny))
    return teacher_cache.open_cache(folder, tiny, weights, top_k, None, None)


def true_logits(teacher):
    tiny = train_runs.tiny()
    network = checkpoint.load_teacher(teacher, tiny)
    return torch.cat([network(images) for _, images, _ in plain_batches(tiny.train, 50, 0, len(tiny.train))])


def test_all_logits_in_bfloat16(tmp_path, teachers):
    nkd(teachers[0], tmp_path / "run", tmp_path / "cache")
    rows = torch.tensor([5, 127, 0, 5])
    logits = opened(tmp_path / "cache", teachers[0], 0).logits(rows)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), true_logits(teachers[0])[rows], rtol=2**-8, atol=1e-5)


def test_top_k_keeps_the_largest_and_spreads_the_rest(tmp_path, teachers):
    nkd(teachers[0], tmp_path / "run", tmp_path / "cache", "--cache-top-k", 3)
    rows = torch.tensor([5, 127, 0])
    q = opened(tmp_path / "cache", teachers[0], 3).logits(rows).softmax(1)
    true = true_logits(teachers[0])[rows].softmax(1)
    top = true.topk(3).indices
    torch.testing.assert_close(q.gather(1, top), true.gather(1, top), rtol=1e-5, atol=1e-6)
    rest = q.scatter(1, top, 0).sum(1)
    torch.testing.assert_close(rest, 1 - true.gather(1, top).sum(1), rtol=1e-3, atol=1e-6)
    others = q.scatter(1, top, float("nan"))
    for row in others:
        values = row[~row.isnan()]
        torch.testing.assert_close(values, values[:1].expand_as(values))


def test_training_reads_the_kept_classes_alone(tmp_path, teachers, monkeypatch):
    """The loss is that of the dense teacher which spreads the rest, and no such teacher is made."""
    with monkeypatch.context() as changed:
        changed.setattr(teacher_cache.TeacherCache, "logits", None)
        nkd(teachers[0], tmp_path / "kept", tmp_path / "cache", "--cache-top-k", 3)
    kept = teacher_cache.TeacherCache.source
    monkeypatch.setattr(teacher_cache.TeacherCache, "source", lambda *given: dense(kept(*given)))
    nkd(teachers[0], tmp_path / "dense", tmp_path / "cache", "--cache-top-k", 3)
    losses = [[float(row["loss"]) for row in read_table(tmp_path / name / "steps.csv")] for name in ("kept", "dense")]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def dense(kept):
    log_probs, indices, classes = kept.log_probs, kept.indices, train_runs.tiny().classes
    left = 1 - log_probs.exp().sum(1, keepdim=True)
    return (left / (classes - 3)).log().repeat(1, classes).scatter(1, indices, log_probs)


def test_without_augmentation_the_cache_is_the_teacher(tmp_path, teachers):
    nkd(teachers[0], tmp_path / "cached", tmp_path / "cache", "--shift", 0)
    run("--loss", "nkd", "--teacher", teachers[0], "--out", tmp_path / "online", "--epochs", 1, "--shift", 0)
    run("--loss", "nkd", "--teacher", teachers[0], "--out", tmp_path / "shifted", "--epochs", 1, "--shift", 2)
    cached, online, shifted = (
        [float(row["loss"]) for row in read_table(tmp_path / name / "steps.csv")]
        for name in ("cached", "online", "shifted")
    )
    np.testing.assert_allclose(cached, online, rtol=5e-3)
    assert not np.allclose(cached, shifted, rtol=5e-3)


def test_made_once(tmp_path, teachers, monkeypatch):
    nkd(teachers[0], tmp_path / "first", tmp_path / "cache")
    monkeypatch.setattr(teacher_cache, "_fill", None)
    nkd(teachers[0], tmp_path / "second", tmp_path / "cache")
    assert (tmp_path / "first" / "steps.csv").read_text() == (tmp_path / "second" / "steps.csv").read_text()


def test_interrupted_cache_leaves_nothing(tmp_path, teachers, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher_cache, "_create", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nkd(teachers[0], tmp_path / "run", tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_refusals(tmp_path, teachers, monkeypatch):
    cache = tmp_path / "cache"
    nkd(teachers[0], tmp_path / "first", cache)
    with pytest.raises(RunError, match=f"{cache}: made with another teacher"):
        nkd(teachers[1], tmp_path / "other", cache)
    with pytest.raises(RunError, match=f"{cache}: made with another --cache-top-k"):
        nkd(teachers[0], tmp_path / "other", cache, "--cache-top-k", 2)
    with pytest.raises(RunError, match=r"--cache-top-k: expected 0 .all. to 19, got 20"):
        nkd(teachers[0], tmp_path / "other", tmp_path / "another", "--cache-top-k", 20)
    with pytest.raises(RunError, match="not with --mixup or --cutmix"):
        nkd(teachers[0], tmp_path / "other", cache, "--mixup", 1)
    with monkeypatch.context() as changed:
        changed.setattr(registry, "load", lambda args, bar: train_runs.tiny(seed=1))
        with pytest.raises(RunError, match=f"{cache}: made with another data set, or one in another order"):
            nkd(teachers[0], tmp_path / "other", cache)
    values = bytearray((cache / "values.npy").read_bytes())
    values[-1] ^= 1
    (cache / "values.npy").write_bytes(values)
    with pytest.raises(RunError, match=r"--cache-teacher .*corrupt cache"):
        nkd(teachers[0], tmp_path / "other", cache)


def test_unwritable_cache(tmp_path, teachers):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"--cache-teacher .* cannot be written"):
        nkd(teachers[0], tmp_path / "run", tmp_path / "file" / "cache")


def test_another_teacher_is_not_resumed(tmp_path, teachers):
    common = ("--loss", "kd", "--out", tmp_path / "run", "--epochs", 1, "--teacher")
    run(*common, teachers[0])
    with pytest.raises(RunError, match="other options: the teacher was"):
        run(*common, teachers[1], "--resume")
    with pytest.raises(RunError, match="other options: the use of --cache-teacher was False, is True"):
        run(*common, teachers[0], "--resume", "--cache-teacher", tmp_path / "cache")
