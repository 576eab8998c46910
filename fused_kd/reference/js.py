"""Generalised Jensen–Shannon divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_kd.reference.rows import (
    NEG_INF,
    DistillationParts,
    check_target,
    divergence,
    finish,
    log_softmaxes,
    teacher_rows,
)


def js_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
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

    b is ``beta``. By definition b = 0 is T² KL(q ‖ p) and b = 1 is T² KL(p ‖ q), the limits of the loss divided by b
    and by 1 − b. The loss itself tends to 0. Without targets every row counts and ``ce_weight`` must be 0.
    """
    check_target(target, ce_weight)
    rows = teacher_rows(student_logits, teacher_logits, target, ignore_index, logit_standardization, weight)
    log_p, log_q = log_softmaxes(rows, temperature)
    soft_part = jensen_shannon(log_p.exp(), log_p, log_q.exp(), log_q, beta, temperature**2)
    return finish(DistillationParts, rows, [soft_part], ce_weight, label_smoothing, reduction)


def jensen_shannon(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, beta: float, weight: float) -> Tensor:
    """weight · JS of each row."""
    if beta == 0.0:
        return divergence(q, log_q, log_p, weight)
    if beta == 1.0:
        return divergence(p, log_p, log_q, weight)
    # The mixture is in logarithms, because both probabilities underflow long before their logarithms overflow. At a
    # class that neither allows, the gradient of logaddexp would be NaN.
    neither = (log_p == NEG_INF) & (log_q == NEG_INF)
    log_m = torch.logaddexp(
        math.log(beta) + torch.where(neither, 0.0, log_q), math.log1p(-beta) + torch.where(neither, 0.0, log_p)
    )
    return divergence(q, log_q, log_m, weight * beta) + divergence(p, log_p, log_m, weight * (1.0 - beta))
