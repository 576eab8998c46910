"""Inputs and runs of USKD that its tests share."""

import torch
import torch.nn.functional as F

from fused_kd import backends, uskd_loss

#: The backends with USKD kernels that run CPU tensors here.
FUSED = [name for name in ("native", "triton") if backends.unavailable(name, "cpu", "uskd") is None]


def make(rows=6, classes=12, kind="index", dtype=torch.float64, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, weak = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * spread for _ in "sw")
    first, second = (torch.randint(classes, (rows,), generator=generator) for _ in "ab")
    if kind == "index":
        target = first
    elif kind == "one_hot":
        target = F.one_hot(first, classes).double()
    else:
        target = 0.7 * F.one_hot(first, classes).double() + 0.3 * F.one_hot(second, classes).double()
        if kind == "smoothed":
            target = 0.9 * target + 0.1 / classes
    return student.to(dtype), weak.to(dtype), target


def alone_in_the_weak_softmax(dtype=torch.float64):
    """The weak logits leave the target alone, below 0, and the student rules it out: its rank is the first all the
    same, so that the others begin with the second."""
    student = torch.tensor([[0.5, -torch.inf, 1.5, -0.5, 0.0]], dtype=dtype)
    weak = torch.full_like(student, -torch.inf)
    weak[0, 1] = -1.6
    return student, weak, torch.tensor([1])


def run(backend, student, weak, target, **options):
    student, weak = student.detach().clone().requires_grad_(), weak.detach().clone().requires_grad_()
    loss, parts = uskd_loss(student, weak, target, backend=backend, return_parts=True, **options)
    loss.sum().backward()
    return loss.detach(), torch.stack(parts), student.grad, weak.grad


def assert_same(ours, theirs, tolerance, rows):
    """Loss and parts relative to the loss, gradients on the scale of their terms."""
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=max(tolerance, 1e-12), atol=1e-6 * (tolerance > 1e-9))
    for a, b in zip(ours[2:], theirs[2:], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2 * tolerance, atol=tolerance / max(rows, 1))


def zipf_labels(backend, student, weak, target, rank="normalized"):
    """What a backend takes for them, read off its gradient beta (p^ - z^)."""
    gradient = run(backend, student, weak, target, alpha=0.0, beta=1.0, mu=0.0, rank=rank, reduction="sum")[2]
    is_target = F.one_hot(target, student.shape[1]).bool()
    return student.masked_fill(is_target, float("-inf")).softmax(1) - gradient
