"""Two forms of NKD to compare fused_kd with: as published, and as lean as PyTorch operators allow.

Both use the defaults of the ImageNet recipe, gamma 1.5 and temperature 1, and the mean over the rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def published(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, gamma: float = 1.5, temperature: float = 1.0
) -> Tensor:
    """NKD with the operations of the authors' release (github.com/yzd-v/cls_KD), rewritten.

    A boolean mask picks the non-target logits, which copies them and synchronises a GPU.
    """
    rows, classes = student_logits.shape
    index = target.view(rows, 1)
    log_p = F.log_softmax(student_logits, dim=1)
    q = F.softmax(teacher_logits, dim=1)
    target_term = -(q.gather(1, index).detach() * log_p.gather(1, index)).mean()

    non_target = torch.ones_like(student_logits).scatter_(1, index, 0).bool()
    student_rest = student_logits[non_target].reshape(rows, classes - 1)
    teacher_rest = teacher_logits[non_target].reshape(rows, classes - 1)
    log_p_hat = F.log_softmax(student_rest / temperature, dim=1)
    q_hat = F.softmax(teacher_rest / temperature, dim=1)
    non_target_term = -(q_hat * log_p_hat).sum(dim=1).mean()
    return target_term + gamma * temperature**2 * non_target_term


def mask_free(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, gamma: float = 1.5, temperature: float = 1.0
) -> Tensor:
    """NKD without boolean masks: one graph with static shapes, which a compiler fuses best.

    It uses logsumexp, which compiled to faster code than masked log_softmax or scatter.
    """
    student_logits, teacher_logits = accumulating(student_logits), accumulating(teacher_logits)
    index = target.unsqueeze(1)
    is_target = torch.arange(student_logits.shape[1], device=target.device) == index
    target_logit = student_logits.gather(1, index).squeeze(1)
    q_target = (teacher_logits.gather(1, index).squeeze(1) - teacher_logits.logsumexp(1)).exp()
    target_term = q_target * (student_logits.logsumexp(1) - target_logit)

    scaled = student_logits / temperature
    q_hat = F.softmax((teacher_logits / temperature).masked_fill(is_target, float("-inf")), dim=1)
    log_sum = scaled.masked_fill(is_target, float("-inf")).logsumexp(1)
    non_target_term = log_sum - (q_hat * scaled).sum(1)  # = -sum of q_hat log p_hat, as q_hat sums to 1
    return (target_term + gamma * temperature**2 * non_target_term).mean()


def accumulating(logits: Tensor) -> Tensor:
    """Half-precision logits in float32, others as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
