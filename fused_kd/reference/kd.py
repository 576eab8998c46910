"""Knowledge distillation: the divergence of the whole softmax."""

from __future__ import annotations

from torch import Tensor

from fused_kd.reference.rows import DistillationParts, check_target, divergence, finish, log_softmaxes, teacher_rows


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
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
    rows = teacher_rows(student_logits, teacher_logits, target, ignore_index, logit_standardization, weight)
    log_p, log_q = log_softmaxes(rows, temperature)
    soft_part = divergence(log_q.exp(), log_q, log_p, temperature**2)
    return finish(DistillationParts, rows, [soft_part], ce_weight, label_smoothing, reduction)
