"""Two different GPUs, as PyTorch would report them: each has its own availability and backend."""

import contextlib
import importlib.util
from types import ModuleType, SimpleNamespace

import pytest
import torch

import fused_kd
from fused_kd import __main__, backends, direct
from fused_kd.backends import native, triton
from fused_kd.backends.native import cuda

NAMES = ("Newer", "Older")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")


@pytest.fixture
def machine(monkeypatch):
    """Two GPUs; the CUDA kernels were not built for the second. ``current`` is the current one."""
    state = SimpleNamespace(
        current=0, switches=0, asked=[], problems=["", "no kernel image"], capabilities=[(9, 0)] * 2
    )

    @contextlib.contextmanager
    def device(which):
        before, state.current = state.current, index_of(which)
        state.switches += 1
        yield
        state.current = before

    def index_of(which=None):
        if which is None:
            return state.current
        return which if isinstance(which, int) else torch.device(which).index

    def problem():
        state.asked.append(state.current)
        return state.problems[state.current]

    for name, replacement in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: state.current,
        "device": device,
        "get_device_name": lambda which=None: NAMES[index_of(which)],
        "get_device_capability": lambda which=None: state.capabilities[index_of(which)],
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(triton, "_driver_failure", lambda: None)
    state.core = ModuleType("core")
    vars(state.core).update(
        cuda_missing="", cuda_architectures="90-real", cuda_problem=problem, instruction_sets=list, compiler="c++",
        openmp_runtime=str,
    )  # fmt: skip
    monkeypatch.setattr(native, "_core", state.core)
    return state


def tensor_of(index):
    """Return only a device, which is all that is read of a tensor; no such device exists here."""
    return torch.device("cuda", index)


@pytest.mark.parametrize("current", (0, 1))
@pytest.mark.parametrize("order", ((0, 1), (1, 0)))
def test_each_has_its_own_verdict(machine, current, order):
    machine.current = current
    for index in (*order, *order):
        reason = cuda.unavailable(machine.core, tensor_of(index))
        if index == 0:
            assert reason is None
        else:
            assert "built for 90-real, do not run on cuda:1 (Older) or its driver: no kernel image" in reason
        assert machine.current == current
    assert sorted(machine.asked) == [0, 1], "once each"


@needs_triton
def test_auto_chooses_for_each(machine):
    for _ in range(2):
        assert backends.choose("auto", tensor_of(0), "uskd") == "native"
        assert backends.choose("auto", tensor_of(1), "uskd") == "triton"
    assert backends.choose("native", tensor_of(0), "uskd") == "native"
    with pytest.raises(
        RuntimeError, match=r"backend 'native' cannot run cuda:1 tensors here: .* cuda:1 .*no kernel image"
    ):
        backends.choose("native", tensor_of(1), "uskd")


@needs_triton
def test_without_a_number_it_is_the_current_one(machine):
    for current, chosen in ((0, "native"), (1, "triton"), (0, "native")):
        machine.current = current
        assert backends.choose("auto", "cuda", "uskd") == chosen
        assert fused_kd.explain("cuda", "uskd").chosen == chosen
        assert f"USKD of cuda:{current} tensors: auto takes '{chosen}'" in str(fused_kd.explain("cuda", "uskd"))


@needs_triton
def test_explain_tells_of_the_device_asked_about(machine):
    for index, chosen in enumerate(("native", "triton")):
        explanation = fused_kd.explain(tensor_of(index), "uskd")
        assert explanation.chosen == chosen
        assert explanation.device == tensor_of(index)
        assert explanation.device_type == "cuda"
    assert "no kernel image" in explanation.reasons["native"]
    assert "there are 2 here" in fused_kd.explain("cuda:2", "uskd").reasons["native"]
    assert fused_kd.explain("cuda:2", "uskd").chosen == "reference"


def test_a_call_asks_nothing_after_the_first(machine, monkeypatch):
    for index in (0, 1):
        backends.choose("auto", tensor_of(index), "uskd")
    asked, switches = len(machine.asked), machine.switches

    def refuse(*_):
        raise AssertionError("asked again")

    for name in (
        "is_available",
        "device_count",
        "current_device",
        "device",
        "get_device_name",
        "get_device_capability",
    ):
        monkeypatch.setattr(torch.cuda, name, refuse)
    for index in (0, 1):
        backends.choose("auto", tensor_of(index), "uskd")
    assert (len(machine.asked), machine.switches) == (asked, switches)


@needs_triton
def test_a_gpu_that_triton_does_not_compile_for(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    machine.capabilities[1] = (6, 1)
    assert triton.unavailable(tensor_of(0)) is None
    assert triton.unavailable(tensor_of(1)) == "Triton needs compute capability 7.0, and cuda:1 (Older) has 6.1"
    assert backends.choose("auto", tensor_of(0), "nkd") == "triton"
    assert backends.choose("auto", tensor_of(1), "nkd") == "reference"


@needs_triton
def test_env_says_it_for_each(machine, capsys):
    assert __main__.main(["env"]) == 0
    text = capsys.readouterr().out
    for line in (
        "GPU 0      Newer",
        "GPU 1      Older",
        "USKD of cuda:0 tensors: auto takes 'native'",
        "USKD of cuda:1 tensors: auto takes 'triton'",
    ):
        assert line in text


def test_env_with_one(machine, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert __main__.main(["env"]) == 0
    text = capsys.readouterr().out
    assert "GPU        Newer" in text
    assert "cuda:1" not in text


def test_a_loss_asks_for_its_own_device(monkeypatch):
    """Every loss passes on the device of its logits, not only the device type."""
    asked = []

    def choose(backend, device, loss="nkd"):
        asked.append((device, loss))
        return "reference"

    monkeypatch.setattr(backends, "choose", choose)
    monkeypatch.setattr(direct, "_loss", None)  # which takes what is on the CPU before
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for loss in fused_kd.catalogue():
        other = {"tf_kd": [], "zipf_ls": [torch.randn(3, 2, 4)]}.get(loss.name, [torch.randn(3, 4)])
        getattr(fused_kd, loss.function)(logits, *other, target)
        assert asked.pop() == (logits.device, loss.name)
