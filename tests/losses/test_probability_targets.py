"""Rows of probability targets that are none: refused where looking costs nothing."""

import pytest
import torch
from loss_cases import HERE, function, make, mixed
from uskd_cases import FUSED as USKD_FUSED

from fused_kd import nkd_loss
from fused_kd.core.catalogue import LOSSES

PLACES = [*HERE, *(("uskd", name, "cpu") for name in (*USKD_FUSED, "reference"))]
LOOK = [place for place in PLACES if place[2] == "cpu" and place[1] != "triton"]
MESSAGE = r"target: expected class probabilities that sum to 1 in each row, got a row that sums to "


@pytest.mark.parametrize("place", LOOK, ids="-".join)
def test_rows_that_sum_to_something_else(place):
    loss, name, _ = place
    student, others, _ = make(loss)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for options in ({}, {"ce_weight": 1.0, "label_smoothing": 0.1}, {"reduction": "none"}):
            target = mixed().to(dtype)
            function(loss)(student, *others, target, backend=name, **options)
            target[4] = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 0])  # multi-hot
            with pytest.raises(
                ValueError, match=MESSAGE + "6; divide by that, or pass weight= to give a row less weight$"
            ):
                function(loss)(student, *others, target, backend=name, **options)
            target[1] = 0.0
            with pytest.raises(ValueError, match=MESSAGE + "0;"):
                function(loss)(student, *others, target, backend=name, **options)
            weight = torch.ones(6)
            weight[[1, 4]] = 0.0  # whatever such a row holds
            function(loss)(student, *others, target, weight=weight, backend=name, **options)
            target[1], target[4] = float("nan"), 1 / 9
            function(loss)(student, *others, target, backend=name, **options)  # a row's own affair: NaN


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "zipf_ls"])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_labels_in_half_precision_pass(loss, dtype):
    """Of many classes, whose shares of the smoothing are rounded all alike."""
    classes = 128256
    student, others, target = make(loss, rows=2, classes=classes, dtype=torch.float32)
    soft = torch.full((2, classes), 0.1 / classes).scatter_(1, target[:, None], 0.9 + 0.1 / classes).to(dtype)
    spread = torch.randn(2, classes).softmax(1).to(dtype)
    for labels in (soft, spread, torch.full((2, classes), 1 / classes).to(dtype)):
        for backend in ("auto", "reference"):
            function(loss)(student, *others, labels, backend=backend)


def test_a_compiled_kernel_looks_too(native):
    student, (teacher,), _ = make("nkd", dtype=torch.float32)
    step = torch.compile(lambda s, y: nkd_loss(s, teacher, y), fullgraph=True, backend="aot_eager")
    step(student, mixed().float())
    with pytest.raises(ValueError, match=MESSAGE + "2"):
        step(student, 2 * mixed().float())
    torch._dynamo.reset()
