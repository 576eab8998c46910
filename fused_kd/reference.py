"""Eager definitions of the losses: the specification that every kernel is compared with, and the fallback.

Readable rather than fast, in plain differentiable PyTorch. Nothing here indexes with a boolean mask (a hidden
``nonzero``: a GPU synchronisation and a graph break) and nothing imports the rest of the package. Arguments are taken as
:mod:`fused_kd.functional` has checked them, but any two-dimensional logits work.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LossParts", "accumulation_dtype", "nkd_loss"]

_NEG_INF = float("-inf")


class LossParts(NamedTuple):
    """The weighted, detached parts of a loss. They sum to the loss and have its shape."""

    target: Tensor
    non_target: Tensor
    ce: Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any logits are float64, else float32: half precision is only how logits are stored."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, LossParts]:
    """NKD (paper Eq. 4 and 5) of logits ``(N, C)`` with targets ``(N,)`` or probabilities ``(N, C)``.

    Returns the loss and its parts. :func:`fused_kd.nkd_loss` documents arguments and semantics.
    """
    dtype = accumulation_dtype(student_logits, teacher_logits)
    num_classes = student_logits.shape[1]
    if target.is_floating_point():
        probabilities = target.to(dtype)
        index = probabilities.argmax(dim=1)
        counted = torch.ones_like(index, dtype=torch.bool)
    else:
        probabilities = None
        counted = target != ignore_index
        index = torch.where(counted, target, 0)
    in_range = (index >= 0) & (index < num_classes)
    column = torch.where(in_range, index, 0).unsqueeze(1)
    is_target = torch.arange(num_classes, device=index.device) == column
    # A row that does not count gives no gradient, not even 0 * NaN, so its logits are replaced before any arithmetic.
    student = torch.where(counted.unsqueeze(1), _drop_impossible(student_logits.to(dtype)), 0.0)
    teacher = torch.where(counted.unsqueeze(1), teacher_logits.detach().to(dtype), 0.0)

    log_p = student.log_softmax(dim=1)
    q_target = teacher.softmax(dim=1).gather(1, column).squeeze(1)
    log_p_target = log_p.gather(1, column).squeeze(1)
    target_part = -_times_log(q_target, log_p_target)

    if num_classes == 2:
        # One class is left: its softmax is 1 and its logarithm 0. A difference of rounded logarithms would not be.
        non_target_part = torch.zeros_like(target_part)
    else:
        log_p_hat = _masked_softmax(student / temperature, is_target, log=True)
        q_hat = _masked_softmax(teacher / temperature, is_target, log=False)
        non_target_part = -gamma * temperature**2 * _times_log(q_hat, log_p_hat).sum(dim=1)

    if ce_weight == 0.0:
        ce_part = torch.zeros_like(target_part)
    elif probabilities is None:
        ce_part = -ce_weight * log_p_target
    else:
        ce_part = -ce_weight * _times_log(probabilities, log_p).sum(dim=1)
    if probabilities is not None:
        # A NaN among the probabilities has no argmax, so the row has no value.
        target_part = target_part + 0.0 * probabilities.sum(dim=1)

    # A target out of range reaches this line on a GPU only, where checking would stall: its row becomes NaN.
    valid = torch.where(in_range, 1.0, torch.nan).to(dtype)
    parts = [
        _reduce(torch.where(counted, part * valid, 0.0), counted, reduction)
        for part in (target_part, non_target_part, ce_part)
    ]
    loss = parts[0] + parts[1] + parts[2]
    return loss, LossParts(*(part.detach() for part in parts))


def _drop_impossible(logits: Tensor) -> Tensor:
    """Cut the gradient at -inf: a class that cannot occur gets none, whatever the teacher says of it."""
    return torch.where(logits == _NEG_INF, _NEG_INF, logits)


def _times_log(weight: Tensor, log_value: Tensor) -> Tensor:
    """weight * log_value with 0 * -inf = 0, in the gradient as well; a NaN of either stays."""
    unused = weight == 0
    safe = torch.where(unused & (log_value == _NEG_INF), 0.0, log_value)
    return weight * safe


def _masked_softmax(logits: Tensor, excluded: Tensor, *, log: bool) -> Tensor:
    """Softmax, or its logarithm, over the classes that are not excluded; 0, or -inf, at those that are.

    The excluded logits are replaced by -inf, not lowered by a constant, so no logit is too large for it. A row where
    every remaining logit is -inf has no distribution: all its entries are 0, or -inf.
    """
    kept = torch.where(excluded, _NEG_INF, logits)
    empty = (kept == _NEG_INF).all(dim=1, keepdim=True)
    kept = torch.where(empty, 0.0, kept)
    result = kept.log_softmax(dim=1) if log else kept.softmax(dim=1)
    return torch.where(excluded | empty, _NEG_INF if log else 0.0, result)


def _reduce(rows: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Reduce per-row values; rows that do not count are already 0. The mean of no rows is 0."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / counted.sum().clamp(min=1)
