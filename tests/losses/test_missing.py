"""A forgotten target or teacher is an error, whatever else is given: nothing stands in for it."""

import inspect
from contextlib import nullcontext

import pytest
import torch

import fused_kd
from fused_kd import Head, TopK
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES

BACKENDS = ("auto", "reference")
STUDENT, OTHER, DENSE = torch.randn(6, 7), torch.randn(6, 7), torch.randn(6, 2, 7)
TARGET = torch.arange(6)
HEAD = Head(torch.randn(6, 5), torch.randn(7, 5))
KEPT = TopK(*OTHER.log_softmax(1).topk(3), rest="bucket")
WITHOUT_LABELS = {name for name, loss in ROW_LOSSES.items() if not loss.labels}


def others(loss):
    """What a loss takes between the student's logits and the target."""
    return {"tf_kd": (), "zipf_ls": (DENSE,)}.get(loss, (OTHER,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", sorted(set(LOSSES) - WITHOUT_LABELS))
def test_a_target_of_none_is_no_class(loss, backend):
    function = getattr(fused_kd, f"{loss}_loss")
    students = [STUDENT, HEAD] if loss != "zipf_ls" else [STUDENT]
    for student in students:
        for ce_weight in (0.0, 1.0):
            with pytest.raises(TypeError, match="target: expected a Tensor, got NoneType"):
                function(student, *others(loss), None, ce_weight=ce_weight, backend=backend)
    if loss in ("nkd", "dkd", "wsld"):
        with pytest.raises(TypeError, match="target: expected a Tensor, got NoneType"):
            function(STUDENT, KEPT, None, backend=backend)


@pytest.mark.parametrize("call", [fused_kd.decompose, fused_kd.uskd_soft_labels, fused_kd.NKDLoss()])
def test_a_target_of_none_is_no_class_elsewhere(call):
    with pytest.raises(TypeError, match="target: expected a Tensor, got NoneType"):
        call(STUDENT, OTHER, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("student", [STUDENT, HEAD], ids=["logits", "head"])
@pytest.mark.parametrize("loss", [name for name, loss in ROW_LOSSES.items() if "teacher" in loss.needs])
def test_a_student_is_not_its_own_teacher(loss, student, backend):
    options = {"gamma": 0.0} if loss == "dist" else {}
    with pytest.raises(TypeError, match=r"teacher_logits: expected a Tensor.*got NoneType"):
        getattr(fused_kd, f"{loss}_loss")(student, None, TARGET, backend=backend, **options)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_catalogue_names_the_sources_that_a_loss_takes(loss):
    function, options = getattr(fused_kd, f"{loss}_loss"), {"gamma": 0.0} if loss == "dist" else {}
    kept = TopK(KEPT.log_probs, KEPT.indices, "renormalize")
    given = {"Head": (HEAD, *others(loss)), "TopK": (STUDENT, *[kept for _ in others(loss)])}
    if loss == "tf_kd":  # it has no teacher that could be one
        assert "TopK" not in LOSSES[loss].sources
        del given["TopK"]
    for name, tensors in given.items():
        taken = nullcontext() if name in LOSSES[loss].sources else pytest.raises(TypeError, match=f"Tensor.*{name}")
        with taken:
            function(*tensors, TARGET, backend="reference", **options)


def test_losses_without_labels_still_do_without():
    assert {"kd", "js", "dist"} <= WITHOUT_LABELS
    optional = {
        name
        for name, loss in LOSSES.items()
        if inspect.signature(getattr(fused_kd, loss.function)).parameters["target"].default is None
    }
    assert optional == WITHOUT_LABELS
    for loss in WITHOUT_LABELS:
        function, zeros = getattr(fused_kd, f"{loss}_loss"), torch.zeros(6, dtype=torch.int64)
        assert torch.equal(function(STUDENT, OTHER), function(STUDENT, OTHER, zeros))
