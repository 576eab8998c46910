"""The published forms of KD, DKD, WSLD, JS and Tf-KD, rewritten, with the defaults of each and the mean over the rows.

A divergence from a teacher is a small difference of large terms. ``*_magnitude`` sums the magnitudes of these terms:
the comparison with float64 allows each term one rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """KD of Hinton et al., as commonly implemented."""
    log_p = F.log_softmax(student_logits / temperature, dim=1)
    q = F.softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(log_p, q, reduction="none").sum(1).mean() * temperature**2


def kd_magnitude(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    log_p, log_q = ((logits / temperature).log_softmax(1) for logits in (student_logits, teacher_logits))
    return temperature**2 * _magnitude(log_q, log_p)


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """DKD with the operations of the authors' release (megvii-research/mdistiller): multiplication by masks, −1000 for
    the target among the others, logarithms of softmaxes."""
    rows, index = target.shape[0], target.unsqueeze(1)
    is_target = torch.zeros_like(student_logits).scatter_(1, index, 1).bool()
    others = torch.ones_like(student_logits).scatter_(1, index, 0).bool()
    p, q = F.softmax(student_logits / temperature, dim=1), F.softmax(teacher_logits / temperature, dim=1)
    p_pair, q_pair = (
        torch.cat([(x * is_target).sum(1, keepdim=True), (x * others).sum(1, keepdim=True)], dim=1) for x in (p, q)
    )
    binary = F.kl_div(p_pair.log(), q_pair, reduction="sum") * temperature**2 / rows
    q_others = F.softmax(teacher_logits / temperature - 1000.0 * is_target, dim=1)
    log_p_others = F.log_softmax(student_logits / temperature - 1000.0 * is_target, dim=1)
    rest = F.kl_div(log_p_others, q_others, reduction="sum") * temperature**2 / rows
    return alpha * binary + beta * rest


def dkd_magnitude(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    index = target.unsqueeze(1)
    pairs, others = [], []
    for logits in (teacher_logits / temperature, student_logits / temperature):
        rest = logits.scatter(1, index, float("-inf")).logsumexp(1, keepdim=True)
        pairs.append(torch.cat([logits.gather(1, index), rest], dim=1).log_softmax(1))
        others.append(logits.scatter(1, index, -1000.0).log_softmax(1))
    return temperature**2 * (alpha * _magnitude(*pairs) + beta * _magnitude(*others))


def wsld(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, alpha: float = 2.5, temperature: float = 2.0
) -> Tensor:
    """WSLD with the operations of the authors' release (bellymonster/Weighted-Soft-Label-Distillation)."""
    q = F.softmax(teacher_logits / temperature, dim=1)
    soft = -torch.sum(q * F.log_softmax(student_logits / temperature, dim=1), 1, keepdim=True)
    student, teacher = student_logits.detach(), teacher_logits.detach()
    log_p, log_q = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    one_hot = F.one_hot(target, num_classes=student.shape[1]).float()
    student_ce = -torch.sum(one_hot * log_p, 1, keepdim=True)
    teacher_ce = -torch.sum(one_hot * log_q, 1, keepdim=True)
    ratio = torch.max(student_ce / (teacher_ce + 1e-7), torch.zeros(1, device=student.device))
    return alpha * temperature**2 * (soft * (1 - torch.exp(-ratio))).mean()


def js(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """The generalised Jensen–Shannon divergence with the operations of TRL (its GKD trainer), times T²."""
    log_p = F.log_softmax(student_logits / temperature, dim=1)
    log_q = F.log_softmax(teacher_logits / temperature, dim=1)
    share = torch.tensor(beta, dtype=log_p.dtype, device=log_p.device)
    log_m = torch.logsumexp(torch.stack([log_p + torch.log1p(-share), log_q + torch.log(share)]), dim=0)
    from_teacher = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    from_student = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    divergence = share * from_teacher + (1 - share) * from_student
    return divergence.sum() / divergence.shape[0] * temperature**2


def js_magnitude(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, beta: float = 0.5) -> Tensor:
    log_p, log_q = student_logits.log_softmax(1), teacher_logits.log_softmax(1)
    log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    return beta * _magnitude(log_q, log_m) + (1 - beta) * _magnitude(log_p, log_m)


def tf_kd(
    student_logits: Tensor, other_logits: Tensor, target: Tensor, correct: float = 0.99, temperature: float = 20.0
) -> Tensor:
    """Tf-KD with the operations of the authors' release (yuanli2333/Teacher-free-Knowledge-Distillation).

    But one scatter sets the targets, not a loop over the rows, and the sum is divided by the number of rows.
    """
    classes = student_logits.shape[1]
    virtual = torch.ones_like(student_logits) * (1 - correct) / (classes - 1)
    virtual = virtual.scatter(1, target.unsqueeze(1), correct)
    q = F.softmax(virtual / temperature, dim=1)
    return F.kl_div(F.log_softmax(student_logits, dim=1), q, reduction="batchmean")


def _magnitude(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Magnitude of the terms of KL(q ‖ p), over all rows: Σ q (|log q| + |log p|)."""
    return -(log_q.exp() * (log_q + log_p)).sum()
