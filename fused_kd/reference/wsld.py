"""Weighted soft labels."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kd.reference.rows import (
    NEG_INF,
    DistillationParts,
    cross_entropy,
    finish,
    log_softmaxes,
    teacher_rows,
    times_log,
)


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

    u is a constant. Its cross-entropies are at T = 1, with the target as given and without smoothing.
    """
    rows = teacher_rows(student_logits, teacher_logits, target, ignore_index, logit_standardization, weight)
    student_ce = cross_entropy(rows.student.detach().log_softmax(dim=1), rows.labels, 1.0)
    teacher_ce = cross_entropy(rows.teacher.log_softmax(dim=1), rows.labels, 1.0)
    # expm1 keeps the digits of a small weight. A student with the target at -inf has u = 1; if the teacher has it there
    # too, the quotient would be inf / inf.
    u = torch.where(student_ce == -NEG_INF, 1.0, -torch.expm1(-student_ce / (teacher_ce + 1e-7)))
    log_p, log_q = log_softmaxes(rows, temperature)
    soft_part = -times_log(alpha * temperature**2 * u.unsqueeze(1) * log_q.exp(), log_p).sum(dim=1)
    return finish(DistillationParts, rows, [soft_part], ce_weight, label_smoothing, reduction)
