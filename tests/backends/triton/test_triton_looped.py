"""The ends of rows in the looped Triton kernel: body, tail and edges, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from fused_kd import js_loss, kd_loss, nkd_loss
from fused_kd.backends import triton as backend
from fused_kd.backends.triton import layout

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(backend.unavailable("cpu") is not None, reason=str(backend.unavailable("cpu"))),
]

LOSSES = {
    "nkd": (nkd_loss, {}),
    "z-scores": (kd_loss, {"temperature": 2.0, "logit_standardization": True}),
    "js": (js_loss, {"temperature": 2.0}),
}


@pytest.fixture(autouse=True)
def whole_lines(monkeypatch):
    """Enough lanes to align rows to a cache line, and short tiles."""
    for name in ("ON_CHIP", "ON_CHIP_MORE", "ON_CHIP_WIDE"):
        monkeypatch.setattr(layout, name, ())
    monkeypatch.setattr(layout, "LOOPED_WARPS", 4)
    layout.row_config.cache_clear()
    yield
    layout.row_config.cache_clear()


def evaluate(loss, student, teacher, target, backend):
    function, options = LOSSES[loss]
    student = student.detach().requires_grad_()
    value = function(student, teacher, target, backend=backend, reduction="none", **options)
    value.sum().backward()
    return value.detach(), student.grad


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("classes", [5, 71, 1031])
def test_edges(loss, classes, soft):
    """Targets and dominant logits in the first and the last column; and rows that do not count."""
    generator = torch.Generator().manual_seed(classes)
    student, teacher = torch.randn(2, 8, classes, generator=generator)
    last = torch.arange(8)[:, None] % 2 * (classes - 1)
    student.scatter_add_(1, classes - 1 - last, torch.full((8, 1), 5.0))
    teacher.scatter_add_(1, last, torch.full((8, 1), 5.0))
    target = torch.tensor([0, classes - 1, classes // 2, -100, 1, -100, classes - 2, 0])
    if soft:
        target = torch.softmax(2 * torch.randn(8, classes, generator=generator), 1)
        target[:, ::3] = target.scatter(1, last, 2.0)[:, ::3]
        target /= target.sum(1, keepdim=True)
    for dtype in (torch.bfloat16, torch.float32)[: 1 if soft else 2]:
        tensors = [x.to(dtype) if x.is_floating_point() else x for x in (student, teacher, target)]
        exact = evaluate(loss, *(x.double() if x.is_floating_point() else x for x in tensors), "reference")
        eager = evaluate(loss, *tensors, "reference")
        ours = evaluate(loss, *tensors, "triton")
        for x, e, o, eps in zip(exact, eager, ours, (2.0**-23, torch.finfo(dtype).eps), strict=True):
            allowed = (e - x).abs().max() + 16 * eps * x.abs().max()
            assert (o - x).abs().max() <= allowed
        if not soft:
            assert (ours[1][[3, 5]] == 0.0).all()
            assert (ours[0][[3, 5]] == 0.0).all()
