"""Universal self-knowledge distillation: the loss, its soft labels and the sums that couple its rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd.reference.rows import (
    NEG_INF,
    Labels,
    accumulation_dtype,
    combine,
    counted_logits,
    cross_entropy,
    dense_labels,
    drop_impossible,
    find_labels,
    masked_softmax,
    times_log,
    widest_dtype,
)

#: The keys by which the classes are ranked, the default first.
RANKS = ("normalized", "cls_kd", "weak", "final", "sum")


class USKDParts(NamedTuple):
    """The weighted, detached parts of USKD. They sum to the loss and have its shape."""

    target: Tensor
    non_target: Tensor
    weak: Tensor
    ce: Tensor


def uskd_loss(
    student_logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    rank: str = "normalized",
    square: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
    batch_sums: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, USKDParts]:
    """USKD (paper Eq. 6 to 13) of logits ``(N, C)`` with targets ``(N,)`` or probabilities ``(N, C)``.

    ``batch_sums`` are the totals of :func:`uskd_batch_sums` over all processes; by default those of this batch.
    Returns the loss and its parts. :func:`fused_kd.uskd_loss` documents arguments and semantics.
    """
    dtype = accumulation_dtype(student_logits, weak_logits)
    num_classes = student_logits.shape[1]
    # The batch mean is over all rows that are not ignored, whatever they weigh.
    terms = uskd_terms(
        student_logits, weak_logits, target, rank=rank, square=square, ignore_index=ignore_index, batch_sums=batch_sums
    )
    labels = find_labels(target, num_classes, ignore_index, dtype, most=2, weight=weight)
    student = counted_logits(drop_impossible(student_logits.to(dtype)), labels.counted)
    weak = counted_logits(drop_impossible(weak_logits.to(dtype)), labels.counted)

    log_p = student.log_softmax(dim=1)
    # The weights go into the factor, so that a weight of 0 switches its part off even where the logarithm is -inf.
    target_part = -times_log(alpha * terms.target_labels, log_p.gather(1, labels.columns)).sum(dim=1)
    log_p_hat = masked_softmax(student, labels.is_target, log=True)
    non_target_part = -times_log(beta * terms.zipf, log_p_hat).sum(dim=1)
    smoothed = 0.9 * dense_labels(labels, dtype) + 0.1 / num_classes
    weak_part = -times_log(mu * smoothed, weak.log_softmax(dim=1)).sum(dim=1)
    ce_part = cross_entropy(log_p, labels, ce_weight, label_smoothing)
    parts = [target_part, non_target_part, weak_part, ce_part]
    loss, parts = combine(parts, labels._replace(valid=terms.valid), reduction)
    return loss, USKDParts(*parts)


def uskd_soft_labels(
    student_logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    *,
    rank: str = "normalized",
    square: bool = True,
    ignore_index: int = -100,
    batch_sums: Tensor | None = None,
) -> Tensor:
    """USKD's label of each class, detached, ``(N, C)``: P at the targets, the Zipf labels elsewhere.

    0 in rows that are ignored and at classes that cannot occur (a student's logit of -inf), NaN in a row with a NaN.
    """
    terms = uskd_terms(
        student_logits, weak_logits, target, rank=rank, square=square, ignore_index=ignore_index, batch_sums=batch_sums
    )
    labels = terms.zipf * terms.valid.unsqueeze(1)
    # An absent second target has P = 0 and, for a column, the class 0; adding leaves that class as it is.
    labels = labels.scatter_add(1, terms.columns, terms.target_labels)
    return torch.where(terms.counted.unsqueeze(1), labels, 0.0)


def uskd_batch_sums(student_logits: Tensor, target: Tensor, *, square: bool = True, ignore_index: int = -100) -> Tensor:
    """What couples the rows of USKD, float64 ``(3,)``, detached: over the rows that count, the sums of the first and of
    the second target's squared probability (with ``square=False`` the probability), and how many rows there are.

    A row without a second target adds 0 to the second sum; one without a value (see ``Labels.valid``) adds NaN.
    """
    dtype = accumulation_dtype(student_logits)
    labels = find_labels(target, student_logits.shape[1], ignore_index, dtype, most=2)
    student = counted_logits(student_logits.detach().to(dtype), labels.counted)
    return _sum_batch(_target_probabilities(student.softmax(dim=1), labels, square), labels)


class USKDTerms(NamedTuple):
    """The detached weights of USKD, one row for each row of the logits.

    ``target_labels`` ``(N, K)`` is P of the classes in ``columns``, 0 for an absent target; ``zipf`` ``(N, C)`` is 0 at
    targets and at classes that cannot occur. The key of a class is ``weak_key + student_key``. ``valid`` is NaN for a
    row without a value, else 1.
    """

    columns: Tensor
    target_labels: Tensor
    zipf: Tensor
    weak_key: Tensor
    student_key: Tensor
    is_target: Tensor
    counted: Tensor
    valid: Tensor


def uskd_terms(
    student_logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    *,
    rank: str = "normalized",
    square: bool = True,
    ignore_index: int = -100,
    batch_sums: Tensor | None = None,
) -> USKDTerms:
    """The soft labels and rank keys of :func:`uskd_loss`."""
    dtype = accumulation_dtype(student_logits, weak_logits)
    labels = find_labels(target, student_logits.shape[1], ignore_index, dtype, most=2)
    student = counted_logits(student_logits.detach().to(dtype), labels.counted)
    weak = counted_logits(weak_logits.detach().to(dtype), labels.counted)
    log_p, p, v = student.log_softmax(dim=1), student.softmax(dim=1), weak.softmax(dim=1)
    valid = labels.valid + 0.0 * (p.sum(dim=1) + v.sum(dim=1))

    p_target = _target_probabilities(p, labels, square)
    sums = _sum_batch(p_target, labels) if batch_sums is None else batch_sums.detach()
    mean = (sums[:2] / sums[2].clamp(min=1.0)).to(dtype)[: p_target.shape[1]]
    target_labels = torch.where(labels.present, p_target + labels.values - mean, 0.0)

    weak_key, student_key = _rank_keys(rank, log_p, p, v, labels.is_target)
    order = (weak_key + student_key).argsort(dim=1, descending=True, stable=True)
    zipf = 1.0 / torch.arange(1, p.shape[1] + 1, dtype=dtype, device=p.device)
    zipf = torch.zeros_like(p).scatter(1, order, zipf.expand_as(p))
    # A class that cannot occur keeps its rank, so the others' weights stay in proportion, but takes no mass.
    zipf = torch.where(labels.is_target | (student == NEG_INF), 0.0, zipf)
    total = zipf.sum(dim=1, keepdim=True)
    zipf = zipf / torch.where(total == 0, 1.0, total)
    return USKDTerms(
        labels.columns, target_labels, zipf, weak_key, student_key, labels.is_target, labels.counted, valid
    )


def _rank_keys(rank: str, log_p: Tensor, p: Tensor, v: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """What the weak and the student's logits add to each class's key."""
    nothing = torch.zeros_like(p)
    if rank == "weak":
        return v, nothing
    if rank == "final":
        return nothing, p
    if rank == "sum":
        return v, p
    # 1 - (sum over the targets) as the sum over the others, which keeps its digits where the targets have nearly all.
    weak_key = v / (torch.where(is_target, 0.0, v).sum(dim=1, keepdim=True) + 1e-6)
    if rank == "normalized":
        return weak_key, p / (torch.where(is_target, 0.0, p).sum(dim=1, keepdim=True) + 1e-6)
    # Published code, newest commit. The divisor is inf if a target cannot occur; the student then adds nothing.
    divisor = 1.0 - torch.where(is_target, log_p, 0.0).sum(dim=1, keepdim=True) + 1e-6
    return weak_key, torch.where(divisor == -NEG_INF, 0.0, log_p / divisor)


def _target_probabilities(p: Tensor, labels: Labels, square: bool) -> Tensor:
    p_target = torch.where(labels.present, p.gather(1, labels.columns), 0.0) * labels.valid.unsqueeze(1)
    return p_target.square() if square else p_target


def _sum_batch(p_target: Tensor, labels: Labels) -> Tensor:
    dtype = widest_dtype(p_target)
    sums = torch.where(labels.counted.unsqueeze(1), p_target, 0.0).sum(dim=0, dtype=dtype)
    second = sums[1:] if sums.shape[0] == 2 else sums.new_zeros(1)
    return torch.cat([sums[:1], second, labels.counted.sum(dtype=dtype).unsqueeze(0)])
