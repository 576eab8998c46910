"""The parts of KD, NKD and DKD side by side. Their weighted sums rebuild the paper's ablations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd.reference.dkd import binary_divergence, non_target_divergence
from fused_kd.reference.nkd import non_target_cross_entropy
from fused_kd.reference.rows import reduce_rows, teacher_rows, times_log


class Decomposition(NamedTuple):
    """Unweighted parts, differentiable in the student's logits; :func:`fused_kd.decompose` has their formulas."""

    kd_target: Tensor
    kd_non_target: Tensor
    nkd_non_target: Tensor
    dkd_binary: Tensor
    dkd_non_target: Tensor
    nkd_target: Tensor


def decompose(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Decomposition:
    """Return the parts of a batch; :func:`fused_kd.decompose` has their formulas. The target of probabilities is their
    largest entry."""
    rows = teacher_rows(student_logits, teacher_logits, target, ignore_index)
    labels, _, student, teacher = rows
    scale = temperature**2
    kd = -times_log(scale * (teacher / temperature).softmax(dim=1), (student / temperature).log_softmax(dim=1))
    nkd = -times_log(teacher.softmax(dim=1), student.log_softmax(dim=1))
    parts = Decomposition(
        kd_target=kd.gather(1, labels.columns).squeeze(1),
        kd_non_target=torch.where(labels.is_target, 0.0, kd).sum(dim=1),
        nkd_non_target=non_target_cross_entropy(rows, 1.0, temperature),
        dkd_binary=binary_divergence(rows, 1.0, temperature),
        dkd_non_target=non_target_divergence(rows, 1.0, temperature),
        nkd_target=nkd.gather(1, labels.columns).squeeze(1),
    )
    return Decomposition(*(reduce_rows(part, labels, reduction) for part in parts))
