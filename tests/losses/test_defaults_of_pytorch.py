"""torch.set_default_dtype and torch.set_default_device change no result."""

from contextlib import contextmanager

import pytest
import torch
from loss_cases import function, make

from fused_kd import Head, TopK
from fused_kd.core.catalogue import LOSSES


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}
CASES = [
    (loss, source, backend)
    for loss in LOSSES
    for source in ("logits", "head", "topk")
    for backend in ("native", "reference")
    if not (source == "head" and loss == "zipf_ls")
    if not (source == "topk" and loss in ("uskd", "tf_kd", "zipf_ls", "dist"))
]


@pytest.mark.parametrize(("loss", "source", "backend"), CASES, ids=map("-".join, CASES))
def test_the_same_bits(loss, source, backend):
    student, others, target = make(loss, dtype=torch.float32)
    weight, hidden, layer = torch.rand(6), torch.randn(6, 5), torch.randn(9, 5, requires_grad=True)
    rest = "renormalize" if loss == "wsld" else "bucket"

    def results(**options):
        leaf = layer if source == "head" else student.detach().requires_grad_()
        given = Head(hidden, layer) if source == "head" else leaf
        further = [TopK(*others[0].log_softmax(1).topk(3), rest)] if source == "topk" else others
        options |= {"gamma": 0.0} if loss == "dist" and source == "head" else {}
        value, parts = function(loss)(given, *further, target, backend=backend, return_parts=True, **options)
        return [value.detach(), *parts, torch.autograd.grad(value.sum(), leaf)[0]]

    for options in ({}, {"weight": weight}, {"reduction": "none"}, {"normalizer": 3.0}):
        expected = results(**options)
        for name, default in DEFAULTS.items():
            with default():
                found = results(**options)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.dtype == theirs.dtype, (name, options)
                assert torch.equal(ours, theirs), (name, options)
