"""What the tests of all losses share: everything that runs here, inputs, and how a call is run and compared."""

import inspect

import torch

import fused_kd
from fused_kd import check
from fused_kd.core.catalogue import LOSSES

INF = float("inf")
#: (loss, backend, device) of everything that runs here.
HERE = [
    (loss, name, device)
    for loss in LOSSES
    if loss != "uskd"
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    for name in ("reference", *check.runnable(device, loss))
]
FUSED = [place for place in HERE if place[1] != "reference"]


def function(loss):
    return getattr(fused_kd, LOSSES[loss].function)


def has(loss, option):
    return option in inspect.signature(function(loss)).parameters


def make(loss, rows=6, classes=9, dtype=torch.float64, device="cpu", scale=2.0):
    """The tensors that a loss takes after the student's, and the student's logits."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    dense = torch.randn(rows, 5, classes, generator=generator, dtype=torch.float64)
    others = {"tf_kd": [], "zipf_ls": [dense]}.get(loss, [teacher])
    student, *others = (tensor.to(device, dtype) for tensor in (student, *others))
    return student, others, target.to(device)


def mixed(rows=6, classes=9, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.rand(rows, classes, generator=generator, dtype=torch.float64)).softmax(1).to(device)


def run(loss, backend, student, others, target, **options):
    """Loss, parts and gradient."""
    student = student.detach().clone().requires_grad_()
    value, parts = function(loss)(student, *others, target, backend=backend, return_parts=True, **options)
    value.sum().backward()
    return value.detach(), torch.stack(tuple(parts)), student.grad


def compare(place, student, others, target, *, tolerance=1e-11, **options):
    """Of a backend and the reference, in float64."""
    loss, name, device = place
    student, *others, target = (tensor.to(device) for tensor in (student, *others, target))
    for ours, exact in zip(
        run(loss, name, student, others, target, **options),
        run(loss, "reference", student, others, target, **options),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance, equal_nan=True)
