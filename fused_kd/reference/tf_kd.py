"""Teacher-free knowledge distillation, with a virtual teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kd.reference.rows import (
    DistillationParts,
    accumulation_dtype,
    combine,
    counted_logits,
    cross_entropy,
    divergence,
    drop_impossible,
    find_labels,
)


def tf_kd_loss(
    student_logits: Tensor,
    target: Tensor,
    *,
    correct: float = 0.99,
    temperature: float = 20.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, DistillationParts]:
    """Tf-KD with a virtual teacher (Yuan et al.): KL(softmax(u / T) ‖ p), u_y = correct, u_j = (1 − correct) / (C − 1).

    T softens the virtual teacher only. The mean is over the rows; the published code divides by N·C. The target of
    probabilities is their largest entry.
    """
    dtype, num_classes = accumulation_dtype(student_logits), student_logits.shape[1]
    labels = find_labels(target, num_classes, ignore_index, dtype, most=1, weight=weight)
    log_p = counted_logits(drop_impossible(student_logits.to(dtype)), labels.counted).log_softmax(dim=1)
    others = torch.full_like(log_p, (1.0 - correct) / (num_classes - 1))  # two floats would make torch.where float32
    virtual = torch.where(labels.is_target, correct, others)
    log_q = (virtual / temperature).log_softmax(dim=1)
    parts = [divergence(log_q.exp(), log_q, log_p), cross_entropy(log_p, labels, ce_weight, label_smoothing)]
    loss, parts = combine(parts, labels, reduction)
    return loss, DistillationParts(*parts)
