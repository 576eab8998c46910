"""What the losses share: targets, softmaxes and products with exact zeros, and the reduction of rows to a loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEG_INF = float("-inf")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any logits are float64, else float32: half precision is only how logits are stored."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class Labels(NamedTuple):
    """The targets of each row.

    ``columns`` ``(N, K)`` are its target classes and ``values`` their labels; where not ``present``, the column is some
    class in range and the value 0. ``counted`` is False for ignored rows. ``valid`` is NaN for a row that has no value
    (a NaN among its probabilities, an index out of range), else 1. ``probabilities`` is None for class indices.
    """

    columns: Tensor
    values: Tensor
    present: Tensor
    is_target: Tensor
    counted: Tensor
    valid: Tensor
    probabilities: Tensor | None


def find_labels(target: Tensor, num_classes: int, ignore_index: int, dtype: torch.dtype, *, most: int) -> Labels:
    """Class indices give one target. Probabilities give their largest entry, or with ``most=2`` the at most two largest
    that exceed the row's smallest: a one-hot row has one. The lower index goes first on ties, as argmax has it."""
    if not target.is_floating_point():
        counted = target != ignore_index
        index = torch.where(counted, target, 0)
        # An index out of range gets here on a GPU only, where checking would stall: its row becomes NaN.
        in_range = (index >= 0) & (index < num_classes)
        columns = torch.where(in_range, index, 0).unsqueeze(1)
        present = torch.ones_like(columns, dtype=torch.bool)
        values, valid, probabilities = present.to(dtype), torch.where(in_range, 1.0, torch.nan).to(dtype), None
    else:
        probabilities = target.to(dtype)
        counted = torch.ones(target.shape[:1], dtype=torch.bool, device=target.device)
        columns = probabilities.argmax(dim=1, keepdim=True)
        present = torch.ones_like(columns, dtype=torch.bool)
        if most == 2:
            second = probabilities.scatter(1, columns, NEG_INF).argmax(dim=1, keepdim=True)
            columns = torch.cat([columns, second], dim=1)
            present = probabilities.gather(1, columns) > probabilities.amin(dim=1, keepdim=True)
        columns = torch.where(present, columns, 0)
        values = torch.where(present, probabilities.gather(1, columns), 0.0)
        valid = 1.0 + 0.0 * probabilities.sum(dim=1)
    classes, marked = torch.arange(num_classes, device=target.device), torch.where(present, columns, -1)
    is_target = classes == marked[:, :1]
    if most == 2 and probabilities is not None:
        is_target = is_target | (classes == marked[:, 1:])
    return Labels(columns, values, present, is_target, counted, valid, probabilities)


def dense_labels(labels: Labels, dtype: torch.dtype) -> Tensor:
    """The whole label row: the probabilities, or one-hot."""
    return labels.is_target.to(dtype) if labels.probabilities is None else labels.probabilities


def counted_logits(logits: Tensor, counted: Tensor) -> Tensor:
    """A row that does not count gives no gradient, not even 0 * NaN, so its logits are replaced before arithmetic."""
    return torch.where(counted.unsqueeze(1), logits, 0.0)


def cross_entropy(log_p: Tensor, labels: Labels, weight: float) -> Tensor:
    if weight == 0.0:
        return torch.zeros_like(log_p[:, 0])
    if labels.probabilities is None:
        return -weight * log_p.gather(1, labels.columns).squeeze(1)
    return -weight * times_log(labels.probabilities, log_p).sum(dim=1)


def combine(parts: list[Tensor], valid: Tensor, counted: Tensor, reduction: str) -> tuple[Tensor, list[Tensor]]:
    """The loss and its detached parts from per-row parts: NaN where a row has no value, 0 where it does not count."""
    reduced = [_reduce(torch.where(counted, part * valid, 0.0), counted, reduction) for part in parts]
    loss = reduced[0]
    for part in reduced[1:]:
        loss = loss + part
    return loss, [part.detach() for part in reduced]


def drop_impossible(logits: Tensor) -> Tensor:
    """Cut the gradient at -inf: a class that cannot occur gets none, whatever the teacher says of it."""
    return torch.where(logits == NEG_INF, NEG_INF, logits)


def times_log(weight: Tensor, log_value: Tensor) -> Tensor:
    """weight * log_value with 0 * -inf = 0, in the gradient as well; a NaN of either stays."""
    unused = weight == 0
    safe = torch.where(unused & (log_value == NEG_INF), 0.0, log_value)
    return weight * safe


def masked_softmax(logits: Tensor, excluded: Tensor, *, log: bool) -> Tensor:
    """Softmax, or its logarithm, over the classes that are not excluded; 0, or -inf, at those that are.

    The excluded logits are replaced by -inf, not lowered by a constant, so no logit is too large for it. A row where
    every remaining logit is -inf has no distribution: all its entries are 0, or -inf.
    """
    kept = torch.where(excluded, NEG_INF, logits)
    empty = (kept == NEG_INF).all(dim=1, keepdim=True)
    kept = torch.where(empty, 0.0, kept)
    result = kept.log_softmax(dim=1) if log else kept.softmax(dim=1)
    return torch.where(excluded | empty, NEG_INF if log else 0.0, result)


def _reduce(rows: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Reduce per-row values; rows that do not count are already 0. The mean of no rows is 0."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / counted.sum().clamp(min=1)
