"""Two processes are one process with the same global batch, to rounding."""

import os
import subprocess
import sys

import pytest
import torch
import train_runs
from train_runs import ROOT

pytest.importorskip("safetensors")
if not torch.distributed.is_available():
    pytest.skip("PyTorch without torch.distributed", allow_module_level=True)

from study.training.report import read_table

#: No BatchNorm, whose statistics are a process's on the CPU.
COMMON = ("--norm", "group", "--device", "cpu", "--lr", "0.05")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    single(folder, "--lr", "0.1")
    return folder / "best.safetensors"


def single(out, *arguments):
    with train_runs.here():
        train_runs.run("--out", out, *arguments)


@pytest.mark.parametrize("loss", ["nkd", "uskd"])
def test_two_processes_are_one(loss, tmp_path, teacher):
    arguments = [*COMMON, "--loss", loss]
    if loss == "nkd":
        arguments += ["--teacher", teacher, "--mixup", "0.2"]
    else:
        arguments += ["--set", "alpha=3"]  # the term with the batch mean
    single(tmp_path / "one", *arguments)
    two = train_runs.start("--out", tmp_path / "two", *arguments, processes=2)
    assert two.returncode == 0, two.stderr
    rows = [read_table(tmp_path / name / "steps.csv") for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 16
    for one, other in zip(*rows, strict=True):
        for name in one:
            assert float(one[name]) == pytest.approx(float(other[name]), rel=2e-5), (one["step"], name)
    weights = [train_runs.state(tmp_path / name)["student"] for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)
    epochs = [read_table(tmp_path / name / "epochs.csv")[-1] for name in ("one", "two")]
    assert float(epochs[0]["test_loss_other"]) == pytest.approx(float(epochs[1]["test_loss_other"]), rel=1e-4)


def test_error_in_two_processes(tmp_path):
    two = train_runs.start("--out", tmp_path / "run", "--batch-size", "15", processes=2)
    assert two.returncode != 0
    assert "train.py: --batch-size 15: cannot be divided among 2 processes" in two.stderr


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "2"}])
def test_one_of_several_processes_leaves_at_once(environment):
    """Nothing of what the interpreter does at its end is run, and nothing that was printed is lost."""
    program = (
        "import atexit; from study.training.processes import leave; atexit.register(print, 'end'); print('x'); leave(3)"
    )
    several = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | environment
    result = subprocess.run([sys.executable, "-c", program], env=several, capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout) == (3, "x\n" if environment else "x\nend\n")


def test_the_result_of_one_epoch_in_two_processes(tmp_path):
    """Only the first process writes it; the other one has no file to read before."""
    two = train_runs.start("--out", tmp_path / "run", "--epochs", "1", "--device", "cpu", processes=2)
    assert two.returncode == 0, two.stderr
    assert len(read_table(tmp_path / "run" / "epochs.csv")) == 1
    assert (tmp_path / "run" / "result.json").exists()
