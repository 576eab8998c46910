"""Hooks of saved tensors may return what was saved in another layout: from a padded buffer, or turned."""

import pytest
import torch
from loss_cases import function, make

from fused_kd import Head, TopK
from fused_kd.core.catalogue import LOSSES


def apart(tensor):
    """The same values, with others between them in memory."""
    wide = torch.full((*tensor.shape, 2), 7.0).to(tensor)
    wide[..., 0] = tensor
    return wide[..., 0]


def turned(tensor):
    return tensor.detach().mT.contiguous().mT if tensor.dim() > 1 else tensor.detach()


def gradients(loss, leaves, again):
    incoming = torch.arange(2.0, 2.0 + loss.numel()).reshape(loss.shape).to(loss)
    if again:
        torch.autograd.grad(loss, leaves, incoming, retain_graph=True)
    return torch.autograd.grad(loss, leaves, incoming)


def check(call, leaves, layout):
    expected = gradients(call(), leaves, False)
    for again in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, layout):
            loss = call()
        for ours, theirs in zip(gradients(loss, leaves, again), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", (apart, turned))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("loss", LOSSES)
def test_of_logits(loss, reduction, dtype, layout):
    student, others, target = make(loss, dtype=dtype)
    leaves = [student.requires_grad_(), *(each.requires_grad_() for each in others if loss == "uskd")]
    check(lambda: function(loss)(student, *others, target, reduction=reduction), leaves, layout)


@pytest.mark.parametrize("layout", (apart, turned))
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("loss", ("nkd", "uskd", "topk"))
def test_of_sources(loss, reduction, layout):
    _, (other,), target = make("nkd", dtype=torch.float32)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((6, 5), (9, 5), (9,))]
    if loss == "topk":
        other = TopK(*other.log_softmax(1).topk(3), rest="bucket")
    name = "uskd" if loss == "uskd" else "nkd"
    check(lambda: function(name)(Head(*leaves), other, target, reduction=reduction), leaves, layout)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_of_a_gradient_that_triton_scales(fused, reduction):
    backend, device = fused
    student, (teacher,), target = make("nkd", dtype=torch.float32, device=device)
    leaf = student.requires_grad_()
    check(lambda: function("nkd")(leaf, teacher, target, reduction=reduction, backend=backend), [leaf], apart)
