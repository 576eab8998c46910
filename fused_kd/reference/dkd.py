"""Decoupled knowledge distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kd.reference.rows import (
    NEG_INF,
    LossParts,
    TeacherRows,
    divergence,
    finish,
    log_softmaxes,
    masked_softmax,
    teacher_rows,
)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, LossParts]:
    """Decoupled KD (Zhao et al.): T² (alpha KL(b_t ‖ b_s) + beta KL(q̂ ‖ p̂)), b = (p_y, 1 − p_y), all at T.

    The target of probabilities is their largest entry.
    """
    rows = teacher_rows(student_logits, teacher_logits, target, ignore_index, logit_standardization, weight)
    parts = [binary_divergence(rows, alpha, temperature), non_target_divergence(rows, beta, temperature)]
    return finish(LossParts, rows, parts, ce_weight, label_smoothing, reduction)


def binary_divergence(rows: TeacherRows, weight: float, temperature: float) -> Tensor:
    """weight · T² KL(b_t ‖ b_s) of each row: the target class against all others, at T."""
    log_p, log_q = log_softmaxes(rows, temperature)
    log_b_s, log_b_t = _log_binary(log_p, rows), _log_binary(log_q, rows)
    return divergence(log_b_t.exp(), log_b_t, log_b_s, weight * temperature**2)


def non_target_divergence(rows: TeacherRows, weight: float, temperature: float) -> Tensor:
    """weight · T² KL(q̂ ‖ p̂) of each row, over the classes other than the target, at T."""
    if rows.student.shape[1] == 2:
        # The one class left has probability 1 on both sides.
        return torch.zeros_like(rows.student[:, 0])
    log_p_hat = masked_softmax(rows.student / temperature, rows.labels.is_target, log=True)
    log_q_hat = masked_softmax(rows.teacher / temperature, rows.labels.is_target, log=True)
    return divergence(log_q_hat.exp(), log_q_hat, log_p_hat, weight * temperature**2)


def _log_binary(log_p: Tensor, rows: TeacherRows) -> Tensor:
    """log (p_y, 1 − p_y), ``(N, 2)``. The second sums over the other classes: 1 − p_y has no digits left as p_y → 1."""
    others = torch.where(rows.labels.is_target, NEG_INF, log_p)
    # A logsumexp over -inf alone has no gradient.
    empty = (others == NEG_INF).all(dim=1, keepdim=True)
    log_rest = torch.where(empty, 0.0, others).logsumexp(dim=1, keepdim=True)
    # Where none of the others can occur, it is -inf, like any of their logarithms, and has the derivative of those.
    log_rest = torch.where(empty, log_p.amin(dim=1, keepdim=True), log_rest)
    return torch.cat([log_p.gather(1, rows.labels.columns), log_rest], dim=1)
