"""A loss that the catalogue has and a kernel does not: no row of it is computed as another loss, or as 0."""

import dataclasses
import subprocess
import sys

import pytest
import torch

import fused_kd
from fused_kd import check
from fused_kd.backends.triton.plans import rows
from fused_kd.core.catalogue import BITS, KIND_SHIFT, ROW_LOSSES
from fused_kd.core.options import HyperParameters

UNKNOWN = 99 << KIND_SHIFT | BITS["teacher"]
NUMBERS = {"row": UNKNOWN, "pointwise": UNKNOWN | BITS["pointwise"], "kept": UNKNOWN}
CALLS = {
    "row": "fused_kd.kd_loss(student, teacher)",
    "pointwise": "fused_kd.kd_loss(student, teacher)",
    "kept": "fused_kd.kd_loss(student, fused_kd.TopK(*teacher.log_softmax(1).topk(3), 'bucket'))",
}


@pytest.mark.parametrize("kernel", CALLS)
def test_the_core_ends_the_process(kernel):
    """On the way of direct calls, where no row has an error of its own."""
    code = f"""
import torch, fused_kd
from fused_kd.core.catalogue import NUMBERS
student, teacher = torch.randn(2, 4, 9)
{CALLS[kernel]}
print("known", flush=True)
NUMBERS["kd"] = {NUMBERS[kernel]}
{CALLS[kernel]}
print("unknown", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode < 0 and ended.stdout == "known\n", ended


@pytest.mark.parametrize("kernel", CALLS)
def test_triton_raises(kernel, monkeypatch):
    if "triton" not in check.runnable("cpu", "kd"):
        pytest.skip("Triton's kernels do not run on the CPU here")
    student, teacher = torch.randn(2, 4, 9)
    kept = fused_kd.TopK(*teacher.log_softmax(1).topk(3), "bucket")
    fused_kd.kd_loss(student, teacher, backend="triton")  # imports the kernels, with the number that they know
    monkeypatch.setitem(rows.NUMBERS, "kd", NUMBERS[kernel])
    with pytest.raises(Exception, match=r"no branch|NoneType"):
        fused_kd.kd_loss(student, kept if kernel == "kept" else teacher, backend="triton")


def test_triton_passes_over_no_hyper_parameter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setitem(ROW_LOSSES, "dkd", dataclasses.replace(ROW_LOSSES["dkd"], own=("alpha", "beta", "gamma")))
    with pytest.raises(ValueError, match="too many values"):
        rows.kernel_weights("dkd", HyperParameters(), 9)
