"""``python -m fused_kd`` as a user calls it, and what importing the package costs."""

import subprocess
import sys

import pytest
import torch

import fused_kd
from fused_kd import __main__, backends, check


def test_env_says_what_is_there_and_why_not(capsys, native):
    assert __main__.main(["env"]) == 0
    text = capsys.readouterr().out
    assert f"torch      {torch.__version__}" in text
    assert text.count("every loss of cpu tensors: auto takes 'native'") == text.count("auto takes") == 1
    assert "avx" in text or "baseline" in text
    assert "CUDA core" in text
    assert f"OpenMP     PyTorch's, {native.openmp_runtime()}" in text


def test_env_says_once_what_holds_for_several_losses(monkeypatch):
    monkeypatch.setattr(backends, "_best", lambda device, loss: "native" if loss == "uskd" else "triton")
    monkeypatch.setattr(backends.triton, "unavailable", lambda device: None)
    first, second = __main__._explanations("cuda")
    assert first.startswith(
        "NKD, KD, DKD, WSLD, Tf-KD, Jensen–Shannon, DIST, Zipf's LS of cuda tensors: auto takes 'tr"
    )
    assert "it has no kernel for cuda tensors" in first
    assert second.startswith("USKD of cuda tensors: auto takes 'native'")


def test_losses_fit_a_terminal(capsys):
    assert __main__.main(["losses"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for loss in fused_kd.catalogue():
        assert loss.function in text and loss.module in text and loss.paper in text
        assert "".join(loss.formula.split()) in "".join(text.split())
        assert all(f"{name}={value!r}" in text for name, value in loss.defaults.items())


def test_check_passes_and_prints_a_table(capsys, native):
    assert __main__.main(["check", "--quick", "--device", "cpu", "--backend", "native"]) == 0
    text = capsys.readouterr().out
    assert text.count("ok") == 4 * len([loss for loss in fused_kd.catalogue() if "native" in loss.backends["cpu"]])
    assert "bfloat16" in text
    assert "USKD" in text
    head, *rows = text.splitlines()[3:]
    assert {row.rindex("ok") for row in rows} == {len(rows[0]) - 2}, "aligned"
    assert head.endswith("gradient  allowed") and len(head) == rows[0].rindex(" ok") - 1


def test_check_fails_on_a_miss(capsys, native, monkeypatch):
    wrong = check.evaluate

    def twice_the_last_gradient(backend, *arguments):
        *others, gradient = wrong(backend, *arguments)
        return *others, gradient * (2 if backend == "native" else 1)

    monkeypatch.setattr(check, "evaluate", twice_the_last_gradient)
    assert __main__.main(["check", "--quick", "--device", "cpu", "--backend", "native"]) == 1
    assert "missed" in capsys.readouterr().out


def test_check_refuses_a_backend_that_cannot_run(native):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    finished = subprocess.run(
        [sys.executable, "-m", "fused_kd", "check", "--device", "cuda"], capture_output=True, text=True, check=False
    )
    assert finished.returncode != 0


def test_importing_is_light():
    """No Triton, no compiler, and no package but torch for the command line: it costs little on top of that."""
    code = "import torch, sys; before = set(sys.modules); import fused_kd.__main__; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {name.partition(".")[0] for name in loaded} & {
        "triton",
        "rich",
        "matplotlib",
        "numpy",
        "torch._inductor",
    }


def test_bad_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["explode"])
    assert stopped.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_a_reader_may_leave():
    command = subprocess.Popen(
        [sys.executable, "-m", "fused_kd", "losses"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    command.stdout.close()
    assert command.stderr.read() == ""
    assert command.wait() == 1
