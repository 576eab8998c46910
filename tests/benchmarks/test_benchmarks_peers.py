"""Peers: other packages with the same loss, where they are installed, and what is told where they are not."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # last, so that it cannot shadow an installed fused_kd

pytest.importorskip("rich")

from benchmarks.forms import peers  # noqa: E402
from benchmarks.forms.providers import LOSSES  # noqa: E402
from benchmarks.forms.spec import Loss, Provider  # noqa: E402
from benchmarks.measure import agreement, cases  # noqa: E402

PEERS = [
    pytest.param(loss, provider, id=f"{loss.name}-{provider.name}")
    for loss in LOSSES.values()
    for provider in loss.providers
    if provider.name in ("liger", "speculators", "mdistiller") and provider.same_loss
]


@pytest.mark.parametrize("loss, peer", PEERS)
def test_we_agree_with_peers(loss: Loss, peer: Provider) -> None:
    """Where they are installed; without a GPU liger-kernel under Triton's interpreter, which conftest asks for."""
    package = {"liger": "liger_kernel"}.get(peer.name, peer.name)
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if peer.name == "liger" and device == "cpu":
        pytest.importorskip("triton")
    elif reason := peer.unavailable(device):
        pytest.skip(reason)
    case = cases.Case(6, 100, "float32", device)
    inputs = cases.make_inputs(case)
    try:
        found = agreement.Judge(loss, inputs).errors(peer, peer.build())
    except Exception as error:
        if "InterpreterError" not in type(error).__name__:
            raise
        pytest.skip(f"Triton's interpreter cannot run it: {error}")
    assert found.within(agreement.tolerance(loss, case, peer)), found


def test_absent_peers_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for provider in (peers.LIGER_KD, peers.LIGER_BESIDE_NKD, peers.LIGER_JS):
        assert provider.unavailable("cuda") == "liger-kernel is not installed"
    assert peers.SPECULATORS_JS.unavailable("cuda") == "speculators is not installed"
    assert peers.QUACK_BESIDE_NKD.unavailable("cuda") == "quack-kernels is not installed"
    assert "not on PyPI" in str(peers.MDISTILLER_KD.unavailable("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "need a GPU" in str(peers.LIGER_KD.unavailable("cpu"))
    for provider in (peers.SPECULATORS_KD, peers.SPECULATORS_JS, peers.QUACK_BESIDE_NKD):
        assert "kernels need a GPU" in str(provider.unavailable("cpu")) and provider.unavailable("cuda") is None
    assert peers.LIGER_KD.unavailable("cuda") is None
    assert peers.MDISTILLER_DKD.unavailable("cpu") is None


def test_peers_that_need_a_gpu_are_called_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins of what the packages compute: theirs is (1, T, V) to (1, T), or (N, C) to (N,)."""

    def kl(student: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        assert student.shape == (1, 6, 11)
        return F.kl_div(student.log_softmax(-1), other.softmax(-1), reduction="none").sum(-1)

    def jsd(student: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        middle = ((student.softmax(-1) + other.softmax(-1)) / 2).log()
        parts = (F.kl_div(middle, each.log_softmax(-1), reduction="none", log_target=True) for each in (student, other))
        return sum(part.sum(-1) for part in parts) / 2

    fused = types.SimpleNamespace(fused_kl_div_loss=kl, fused_js_div_loss=jsd)
    monkeypatch.setitem(sys.modules, "speculators", types.ModuleType("speculators"))
    monkeypatch.setitem(sys.modules, "speculators.models", types.ModuleType("speculators.models"))
    monkeypatch.setitem(sys.modules, "speculators.models.fused_losses", fused)
    monkeypatch.setitem(sys.modules, "quack", types.SimpleNamespace(cross_entropy=F.cross_entropy))
    inputs = cases.make_inputs(cases.Case(6, 11))
    for loss, peer in (("kd", peers.SPECULATORS_KD), ("js", peers.SPECULATORS_JS)):
        found = agreement.Judge(LOSSES[loss], inputs).errors(peer, peer.build())
        assert found.within(agreement.tolerance(LOSSES[loss], cases.Case(6, 11), peer)), found
    value = peers.QUACK_BESIDE_NKD.build()(*inputs[:3])
    torch.testing.assert_close(value, F.cross_entropy(inputs.student_logits, inputs.target))
