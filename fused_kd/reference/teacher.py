"""Distillation from a teacher's logits: KD, DKD, WSLD and the generalised Jensen–Shannon divergence.

In the formulas ``q(T) = softmax(t / T)`` of the teacher and ``p(T) = softmax(s / T)`` of the student; a hat leaves the
target class ``y`` out. All take logits ``(N, C)`` and targets ``(N,)`` or probabilities ``(N, C)`` and return the loss
and its parts. ``logit_standardization`` puts the z-scores of both logits (:func:`standardize_logits`) into everything
but the CE part.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd.reference.nkd import LossParts
from fused_kd.reference.rows import (
    NEG_INF,
    TeacherRows,
    check_target,
    combine,
    cross_entropy,
    divergence,
    masked_softmax,
    teacher_rows,
    times_log,
)


class DistillationParts(NamedTuple):
    """The weighted, detached parts of a loss. They sum to the loss and have its shape."""

    distillation: Tensor
    ce: Tensor


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, DistillationParts]:
    """KD (Hinton et al.): T² KL(q(T) ‖ p(T)). Without targets every row counts and ``ce_weight`` must be 0."""
    check_target(target, ce_weight)
    rows = teacher_rows(
        student_logits, teacher_logits, target, ignore_index, logit_standardization=logit_standardization, weight=weight
    )
    log_p, log_q = _log_softmaxes(rows, temperature)
    soft_part = divergence(log_q.exp(), log_q, log_p, temperature**2)
    return _finish(rows, soft_part, ce_weight, label_smoothing, reduction)


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
    rows = teacher_rows(
        student_logits, teacher_logits, target, ignore_index, logit_standardization=logit_standardization, weight=weight
    )
    parts = [
        binary_divergence(rows, alpha, temperature),
        non_target_divergence(rows, beta, temperature),
        cross_entropy(rows.raw_student.log_softmax(dim=1), rows.labels, ce_weight, label_smoothing),
    ]
    loss, parts = combine(parts, rows.labels, reduction)
    return loss, LossParts(*parts)


def wsld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 2.5,
    temperature: float = 2.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, DistillationParts]:
    """Weighted soft labels (Zhou et al.): alpha T² u (−Σ_j q_j(T) log p_j(T)), u = 1 − exp(−CE(s) / (CE(t) + 1e-7)).

    u is a constant; its cross entropies are at T = 1 with the target as given and without smoothing.
    """
    rows = teacher_rows(
        student_logits, teacher_logits, target, ignore_index, logit_standardization=logit_standardization, weight=weight
    )
    student_ce = cross_entropy(rows.student.detach().log_softmax(dim=1), rows.labels, 1.0)
    teacher_ce = cross_entropy(rows.teacher.log_softmax(dim=1), rows.labels, 1.0)
    # expm1 keeps the digits of a small weight. A student that rules the target out has all to learn, and would be
    # inf / inf where the teacher does so too.
    u = torch.where(student_ce == -NEG_INF, 1.0, -torch.expm1(-student_ce / (teacher_ce + 1e-7)))
    log_p, log_q = _log_softmaxes(rows, temperature)
    soft_part = -times_log(alpha * temperature**2 * u.unsqueeze(1) * log_q.exp(), log_p).sum(dim=1)
    return _finish(rows, soft_part, ce_weight, label_smoothing, reduction)


def js_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, DistillationParts]:
    """Generalised Jensen–Shannon: T² (b KL(q ‖ m) + (1 − b) KL(p ‖ m)), m = b q + (1 − b) p, all at T.

    b is ``beta``; 0 is T² KL(q ‖ p) and 1 is T² KL(p ‖ q), to which the loss divided by b or by 1 − b tends; the loss
    itself tends to 0. Without targets every row counts and ``ce_weight`` must be 0.
    """
    check_target(target, ce_weight)
    rows = teacher_rows(
        student_logits, teacher_logits, target, ignore_index, logit_standardization=logit_standardization, weight=weight
    )
    log_p, log_q = _log_softmaxes(rows, temperature)
    p, q = log_p.exp(), log_q.exp()
    if beta == 0.0:
        soft_part = divergence(q, log_q, log_p, temperature**2)
    elif beta == 1.0:
        soft_part = divergence(p, log_p, log_q, temperature**2)
    else:
        # The mixture in logarithms, as both probabilities underflow long before their logarithms overflow. A class
        # that neither allows is kept from logaddexp, whose gradient there would be NaN.
        neither = (log_p == NEG_INF) & (log_q == NEG_INF)
        log_m = torch.logaddexp(
            math.log(beta) + torch.where(neither, 0.0, log_q), math.log1p(-beta) + torch.where(neither, 0.0, log_p)
        )
        soft_part = divergence(q, log_q, log_m, temperature**2 * beta)
        soft_part = soft_part + divergence(p, log_p, log_m, temperature**2 * (1.0 - beta))
    return _finish(rows, soft_part, ce_weight, label_smoothing, reduction)


def binary_divergence(rows: TeacherRows, weight: float, temperature: float) -> Tensor:
    """weight · T² KL(b_t ‖ b_s) of each row, of the target class against all others, at T."""
    log_p, log_q = _log_softmaxes(rows, temperature)
    log_b_s, log_b_t = _log_binary(log_p, rows), _log_binary(log_q, rows)
    return divergence(log_b_t.exp(), log_b_t, log_b_s, weight * temperature**2)


def non_target_divergence(rows: TeacherRows, weight: float, temperature: float) -> Tensor:
    """weight · T² KL(q̂ ‖ p̂) of each row, over the classes other than the target, at T."""
    if rows.student.shape[1] == 2:
        # One class is left, of probability 1 on both sides.
        return torch.zeros_like(rows.student[:, 0])
    log_p_hat = masked_softmax(rows.student / temperature, rows.labels.is_target, log=True)
    log_q_hat = masked_softmax(rows.teacher / temperature, rows.labels.is_target, log=True)
    return divergence(log_q_hat.exp(), log_q_hat, log_p_hat, weight * temperature**2)


def _log_softmaxes(rows: TeacherRows, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(T) and log q(T)."""
    return (rows.student / temperature).log_softmax(dim=1), (rows.teacher / temperature).log_softmax(dim=1)


def _log_binary(log_p: Tensor, rows: TeacherRows) -> Tensor:
    """log (p_y, 1 − p_y), ``(N, 2)``. The second is a sum over the others: 1 − p_y has no digits left as p_y → 1."""
    others = torch.where(rows.labels.is_target, NEG_INF, log_p)
    # A logsumexp over -inf alone has no gradient.
    empty = (others == NEG_INF).all(dim=1, keepdim=True)
    log_rest = torch.where(empty, 0.0, others).logsumexp(dim=1, keepdim=True)
    return torch.cat([log_p.gather(1, rows.labels.columns), torch.where(empty, NEG_INF, log_rest)], dim=1)


def _finish(
    rows: TeacherRows, soft_part: Tensor, ce_weight: float, label_smoothing: float, reduction: str
) -> tuple[Tensor, DistillationParts]:
    ce_part = cross_entropy(rows.raw_student.log_softmax(dim=1), rows.labels, ce_weight, label_smoothing)
    loss, parts = combine([soft_part, ce_part], rows.labels, reduction)
    return loss, DistillationParts(*parts)
