"""Runs that are killed go on as if they had not been, and no checkpoint is lost."""

import errno
import os
import signal

import pytest
import torch
import train_runs
from train_runs import run

pytest.importorskip("safetensors")

from study import train
from study.datasets import registry
from study.training import checkpoint
from study.training.errors import RunError
from study.training.report import read_table

#: All that draws at random, an optimizer with state, a loss that trains a layer of its own.
RICH = (
    "--loss",
    "uskd",
    "--mixup",
    "0.3",
    "--cutmix",
    "0.5",
    "--accumulate",
    "2",
    "--checkpoint-steps",
    "3",
    "--log-steps",
    "2",
)


@pytest.fixture(autouse=True)
def here():
    with train_runs.here():
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train_runs.start("--out", folder, *RICH).returncode == 0
    return folder


# Step 10 (from 0) is in the second epoch, after the checkpoint of step 9; step 8 begins it; the save that is killed is
# the one at the end of the first epoch.
@pytest.mark.parametrize(
    "kill",
    [{"KILL_AT_STEP": "10"}, pytest.param({"KILL_AT_STEP": "8"}, marks=pytest.mark.slow), {"KILL_IN_SAVE": "3"}],
    ids=str,
)
def test_killed_and_resumed_has_the_bits_of_an_uninterrupted_run(kill, tmp_path, uninterrupted):
    killed = train_runs.start("--out", tmp_path, *RICH, **kill)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    step = checkpoint.load(tmp_path / "last.pt", train.STATE)["step"]
    assert step == {"10": 9, "8": 8}.get(kill.get("KILL_AT_STEP"), 6)
    run("--out", tmp_path, *RICH, "--resume")
    assert train_runs.same(train_runs.state(tmp_path), train_runs.state(uninterrupted))
    assert (tmp_path / "steps.csv").read_text() == (uninterrupted / "steps.csv").read_text()
    best = [checkpoint.load_network(folder / "best.safetensors", "") for folder in (tmp_path, uninterrupted)]
    assert best[0][1] == best[1][1] and train_runs.same(*(network.state_dict() for network, _ in best))
    kept = ("epoch", "loss", "accuracy_test", "test_loss_test", "accuracy_other")
    first, second = (
        [[row[name] for name in kept] for row in read_table(f / "epochs.csv")] for f in (tmp_path, uninterrupted)
    )
    assert first == second


def test_complete_run_resumes_to_its_result(tmp_path):
    first = run("--out", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    second = run("--out", tmp_path, "--resume")
    assert (second.accuracy, second.best, second.epochs) == (first.accuracy, first.best, first.epochs)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_resume_without_a_checkpoint_begins(tmp_path):
    assert run("--out", tmp_path, "--resume").epochs == 2


def test_folder_with_a_run_is_refused_and_kept(tmp_path):
    run("--out", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunError, match=r"already has a run .*--resume continues it"):
        run("--out", tmp_path, "--seed", 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("other", [("--lr", 0.3), ("--epochs", 3), ("--seed", 4), ("--loss", "tf-kd")], ids=str)
def test_other_options_are_not_resumed(other, tmp_path):
    run("--out", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(RunError, match=rf"is of a run with other options: {other[0]} was .*, is {other[1]}"):
        run("--out", tmp_path, "--resume", *other)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_other_data_are_not_resumed(tmp_path, monkeypatch):
    run("--out", tmp_path)
    monkeypatch.setattr(registry, "load", lambda args, bar: train_runs.tiny(seed=1))
    with pytest.raises(RunError, match="other options: the data set was tiny-20-0, is tiny-20-1"):
        run("--out", tmp_path, "--resume")


def test_corrupt_checkpoint(tmp_path, capsys):
    run("--out", tmp_path)
    whole = (tmp_path / "last.pt").read_bytes()
    capsys.readouterr()
    for damaged in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        (tmp_path / "last.pt").write_bytes(damaged)
        assert train.main([*train_runs.SMALL, "--out", str(tmp_path), "--resume"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"train.py: {tmp_path / 'last.pt'}: corrupt checkpoint")
        assert (tmp_path / "last.pt").read_bytes() == damaged


def test_checkpoint_of_something_else(tmp_path):
    run("--out", tmp_path)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "last.pt")
    with pytest.raises(RunError, match="not a checkpoint of this program"):
        run("--out", tmp_path, "--resume")


def test_full_disk_loses_no_checkpoint(tmp_path, monkeypatch):
    run("--out", tmp_path, "--epochs", 1)
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(
        os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(RunError, match=r"cannot be written .*No space left on device.*the previous one is kept"):
        checkpoint.save(tmp_path / "last.pt", {})
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".last.pt*"))
