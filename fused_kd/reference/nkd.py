"""Normalized knowledge distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kd.reference.rows import (
    LossParts,
    TeacherRows,
    combine,
    cross_entropy,
    masked_softmax,
    teacher_rows,
    times_log,
)


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, LossParts]:
    """NKD (paper Eq. 4 and 5) of logits ``(N, C)`` with targets ``(N,)`` or probabilities ``(N, C)``.

    ``logit_standardization`` uses the z-scores of both logits (:func:`standardize_logits`) in all terms but the CE.
    Returns the loss and its parts. :func:`fused_kd.nkd_loss` documents arguments and semantics.
    """
    rows = teacher_rows(student_logits, teacher_logits, target, ignore_index, logit_standardization, weight)
    labels, raw_student, student, teacher = rows
    log_p = student.log_softmax(dim=1)
    q_target = teacher.softmax(dim=1).gather(1, labels.columns).squeeze(1)
    log_p_target = log_p.gather(1, labels.columns).squeeze(1)
    target_part = -times_log(q_target, log_p_target)
    non_target_part = non_target_cross_entropy(rows, gamma, temperature)
    if logit_standardization:
        log_p = raw_student.log_softmax(dim=1)
    ce_part = cross_entropy(log_p, labels, ce_weight, label_smoothing)
    loss, parts = combine([target_part, non_target_part, ce_part], labels, reduction)
    return loss, LossParts(*parts)


def non_target_cross_entropy(rows: TeacherRows, weight: float, temperature: float) -> Tensor:
    """weight · T² (−Σ_j q̂_j log p̂_j) of each row, over the classes other than the target, at T."""
    if rows.student.shape[1] == 2:
        # The softmax of the one class left is 1, its logarithm 0. A difference of rounded logarithms would not be 0.
        return torch.zeros_like(rows.student[:, 0])
    log_p_hat = masked_softmax(rows.student / temperature, rows.labels.is_target, log=True)
    q_hat = masked_softmax(rows.teacher / temperature, rows.labels.is_target, log=False)
    # The weight multiplies q_hat, so that 0 switches the term off even if a logarithm is -inf.
    return -times_log(weight * temperature**2 * q_hat, log_p_hat).sum(dim=1)
