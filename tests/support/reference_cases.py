"""Inputs and calls of the reference's losses besides USKD that their tests share."""

from functools import partial

import pytest
import torch

from fused_kd import reference

TEACHER = {
    "nkd": partial(reference.nkd_loss, temperature=2.0),
    "kd": reference.kd_loss,
    "dkd": reference.dkd_loss,
    "wsld": reference.wsld_loss,
    "js": partial(reference.js_loss, beta=0.3, temperature=2.0),
    "dist": partial(reference.dist_loss, temperature=2.0),
}
ALONE = {"tf_kd": reference.tf_kd_loss, "zipf_ls": partial(reference.zipf_ls_loss, beta=1.0)}
LOSSES = {**TEACHER, **ALONE}
every_loss = pytest.mark.parametrize("name", LOSSES)
teacher_loss = pytest.mark.parametrize("name", TEACHER)


def make(rows=6, classes=7, scale=2.0, dtype=torch.float64, seed=0):
    """Student logits, a teacher's (or dense ones) and targets."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64).to(dtype)
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


def mixed(rows=6, classes=7):
    return torch.rand(rows, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)


def loss_of(name, student, teacher, target, **options):
    """The loss and its parts; for Zipf's smoothing the teacher's logits, cut and shifted, serve as five positions."""
    if name == "tf_kd":
        return LOSSES[name](student, target, **options)
    if name == "zipf_ls":
        teacher = torch.stack([teacher.roll(shift, 1) * (shift < 4) for shift in range(5)], dim=1)
    return LOSSES[name](student, teacher, target, **options)


def gradient(name, student, *arguments, **options):
    student = student.clone().requires_grad_()
    loss, _ = loss_of(name, student, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]
