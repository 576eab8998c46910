"""The options of every launch of a Triton kernel, and a driver that cannot launch."""

from __future__ import annotations

import importlib

import pytest
import torch

from fused_kd import backends
from fused_kd.backends import triton as backend

triton = pytest.importorskip("triton")
tl = importlib.import_module("triton.language")
kernel_cases = importlib.import_module("tools.compile_matrix.cases")
power_of_two_below = importlib.import_module("fused_kd.backends.triton.kernels.rows").power_of_two_below

CALLS = [
    kernel_cases.Case(torch.bfloat16, torch.bfloat16, 1000),
    kernel_cases.Case(torch.float32, torch.float32, 21841, rows=40000),
    kernel_cases.Case(torch.float64, torch.float64, 100),
    kernel_cases.Case(torch.float32, torch.float32, 1000, loss="dist"),
    kernel_cases.RankedCase(torch.float32, torch.float32, 1000),
    kernel_cases.RankedCase(torch.float32, torch.float32, 21841),
    kernel_cases.RankedCase(torch.float64, torch.float64, 100),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_no_launch_fuses_products_and_sums(call):
    """Triton's default changes between releases, and would change the numbers."""
    for launch in call.launches():
        assert launch.options["enable_fp_fusion"] is False, launch.kernel


@triton.jit
def _power_of_two_below(count, out):
    tl.store(out, power_of_two_below(tl.load(count)))


@pytest.mark.skipif(backend.unavailable("cpu") is not None, reason="Triton does not run here")
@pytest.mark.parametrize("count", [1, 2, 3, 1000, 2**24 - 1, 2**24, 2**25 - 1, 2**26 - 2, 2**30 + 1, 2**31 - 1])
def test_power_of_two_below(count):
    """The host computes the same power of two for a known divisor."""
    out = torch.empty(1)
    _power_of_two_below[(1,)](torch.tensor([count], dtype=torch.int32), out)
    assert out.item() == 2.0 ** (count.bit_length() - 1)


def test_a_driver_that_cannot_be_built_is_told_and_not_chosen(monkeypatch):
    """As in an image without a C compiler, where every launch would raise."""

    class Broken:
        @property
        def utils(self):
            raise RuntimeError("Failed to find C compiler")

    runtime = importlib.import_module("triton.runtime")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(runtime.driver, "_active", Broken())
    backend._driver_failure.cache_clear()
    try:
        reason = backend.unavailable("cuda")
        assert reason is not None and "C compiler" in reason
        with pytest.raises(RuntimeError, match="C compiler"):
            backends._choose("triton", "cuda", "nkd")
    finally:
        backend._driver_failure.cache_clear()
        backends._chosen.clear()
