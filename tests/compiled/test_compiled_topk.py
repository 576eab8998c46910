"""The kernels of a top-k teacher, compiled, through Triton's own JIT."""

from __future__ import annotations

import pytest
import torch

from fused_kd.backends import triton as backend
from tests.support.topk_cases import assert_same, assert_within_eager_error, make


@pytest.mark.parametrize(
    ("loss", "rest"), [("nkd", "bucket"), ("kd", "uniform"), ("dkd", "drop"), ("js", "renormalize")]
)
def test_a_loss_is_the_reference(gpu, loss, rest):
    options = {"temperature": 3.0, "ce_weight": 0.6, "label_smoothing": 0.1, "weighted": True}
    assert_within_eager_error(backend, make(loss, rest, 700, 16, pads=2, **options), torch.float32)
    assert_within_eager_error(backend, make(loss, rest, 333, 16, rows=3), torch.bfloat16)
    assert_same(backend, make(loss, rest, 333, 16, rows=3, **options), widths=(120, 0, 213))


@pytest.mark.parametrize("gpu", [80, 100], indirect=True, ids=["sm_80", "sm_100"])
def test_other_gpus(gpu):
    assert_same(backend, make("wsld", "bucket", 130, 9, rows=3, temperature=2.0))
    assert_within_eager_error(backend, make("nkd", "renormalize", 260, 9, rows=3), torch.float16)
