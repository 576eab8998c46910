"""The kernels of the losses with a top-k teacher, compiled, through Triton's own JIT."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kd.backends import triton as backend
from fused_kd.backends.triton import launch as launching
from fused_kd.backends.triton import replay
from tests.support import topk_cases
from tests.support.topk_cases import assert_same, assert_within_eager_error, make


@pytest.mark.parametrize(
    ("loss", "rest"), [("nkd", "bucket"), ("kd", "uniform"), ("dkd", "drop"), ("js", "renormalize")]
)
def test_a_loss_is_the_reference(gpu, loss, rest):
    options = {"temperature": 3.0, "ce_weight": 0.6, "label_smoothing": 0.1, "weighted": True}
    assert_within_eager_error(backend, make(loss, rest, 700, 16, pads=2, **options), torch.float32)
    assert_within_eager_error(backend, make(loss, rest, 333, 16, rows=3), torch.bfloat16)
    assert_same(backend, make(loss, rest, 333, 16, rows=3, **options), widths=(120, 0, 213))
    assert_within_eager_error(backend, make(loss, rest, 700, 16, pads=2, labels=True, **options), torch.float32)


@pytest.mark.parametrize("width", [343, 344])
def test_padding(gpu, width):
    problem = make("nkd", "bucket", 336, 16, rows=3, weighted=True).to(torch.float32)
    *_, wanted = topk_cases.run(backend, problem)
    wide = torch.full((3, width), torch.nan)
    wide[:, :336] = problem.student
    options = problem.options._replace(padding=width - 336)
    *_, gradient = topk_cases.run(backend, problem._replace(student=wide[:, :336], options=options))
    torch.testing.assert_close(gradient[:, :336], wanted)
    assert gradient.shape == wide.shape and not gradient[:, 336:].any()


class _Count(TorchDispatchMode):
    """Record PyTorch's own kernels, without operations that only allocate or make a view."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not any(word in str(function) for word in ("empty", "detach", "alias", "view", "slice", "select")):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_call_is_four_launches(gpu, monkeypatch):
    launched, run = [], launching.run
    monkeypatch.setattr(launching, "run", lambda launches, device: launched.extend(launches) or run(launches, device))
    monkeypatch.setattr(replay, "_kept", {})
    problem = make("nkd", "bucket", 130, 9, rows=3, weighted=True, temperature=2.0).to(torch.float32)
    with _Count() as counted:
        topk_cases.run(backend, problem)
    assert [launch.kernel for launch in launched] == ["mark_kept", "rest_statistics", "resolve_kept", "rest_gradient"]
    assert counted.names == []
    # A similar call is not planned again; it has its own tensors, and marks of its own that hold anything before.
    other = make("nkd", "bucket", 130, 9, rows=3, weighted=True, temperature=2.0, seed=5)
    assert_within_eager_error(backend, other, torch.float32)
    assert len(launched) == 4 and len(replay._kept) == 1


@pytest.mark.parametrize("gpu", [80, 100], indirect=True, ids=["sm_80", "sm_100"])
def test_other_gpus(gpu):
    assert_same(backend, make("wsld", "bucket", 130, 9, rows=3, temperature=2.0))
    assert_within_eager_error(backend, make("nkd", "renormalize", 260, 9, rows=3), torch.float16)
