"""Zipf's label smoothing."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kd.reference.rows import (
    NEG_INF,
    DistillationParts,
    accumulation_dtype,
    combine,
    counted_logits,
    cross_entropy,
    divergence,
    drop_impossible,
    find_labels,
    masked_softmax,
)


def zipf_ls_loss(
    student_logits: Tensor,
    dense_logits: Tensor,
    target: Tensor,
    *,
    beta: float = 0.1,
    power: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, DistillationParts]:
    """Zipf's label smoothing (Liang et al.): beta · KL(ẑ ‖ p̂) over the classes that are not targets.

    Each of the P positions of ``dense_logits`` ``(N, P, C)`` votes for its largest class (the lower of equal ones).
    ẑ_j ∝ rank_j^(−power), rank_j = 1 + the number of classes, targets included, with more votes than j. Probabilities
    have one or two targets, as in USKD; and as there, a class whose student logit is -inf leaves the non-target set.
    """
    dtype = accumulation_dtype(student_logits)
    labels = find_labels(target, student_logits.shape[1], ignore_index, dtype, most=2, weight=weight)
    student = counted_logits(drop_impossible(student_logits.to(dtype)), labels.counted)
    dense = dense_logits.detach()

    # A vote hides a NaN of the dense logits, and leaving the target out one, or +inf, of the student there. A factor
    # takes all to the whole row and its gradient.
    no_value = student.detach().isnan() | (student.detach() == -NEG_INF)
    broken = dense.isnan().any(dim=2).any(dim=1) | no_value.any(dim=1)
    valid = torch.where(broken & labels.counted, torch.nan, labels.valid)
    student = student * valid.unsqueeze(1)

    ranks, left_out = _vote_ranks(dense).to(dtype), labels.is_target | (student.detach() == NEG_INF)
    # Relative to the best rank that is left, so that no power makes all weights vanish.
    best = torch.where(left_out, float("inf"), ranks).amin(dim=1, keepdim=True)
    zipf = torch.where(left_out, 0.0, (best / ranks).pow(power))
    total = zipf.sum(dim=1, keepdim=True)
    zipf = zipf / torch.where(total == 0, 1.0, total)
    log_p_hat = masked_softmax(student, labels.is_target, log=True)
    ce_part = cross_entropy(student.log_softmax(dim=1), labels, ce_weight, label_smoothing)
    parts = [divergence(zipf, zipf.log(), log_p_hat, beta), ce_part]
    loss, parts = combine(parts, labels._replace(valid=valid), reduction)
    return loss, DistillationParts(*parts)


def _vote_ranks(dense_logits: Tensor) -> Tensor:
    """1 + the number of classes with more votes, ``(N, C)``: equal ones share the lowest, so best, of their ranks."""
    num_rows, _, num_classes = dense_logits.shape
    chosen = dense_logits.argmax(dim=2)
    votes = torch.zeros(num_rows, num_classes, dtype=torch.int64, device=chosen.device)
    votes = votes.scatter_add(1, chosen, torch.ones_like(chosen))
    not_more = torch.searchsorted(votes.sort(dim=1).values, votes, right=True)
    return num_classes - not_more + 1
