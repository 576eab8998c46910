"""Shared parts of the losses: targets, softmaxes and products with exact zeros, and the reduction of rows to a loss."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Parts = TypeVar("Parts", bound=tuple[Any, ...])

NEG_INF = float("-inf")
#: Types of devices that have no float64.
SINGLE_ALONE = {"mps"}


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any logits are float64, else float32: half precision is only a storage format."""
    for tensor in tensors:  # any() would take a microsecond of each call
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def widest_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums over a batch: float64 if the tensor's device has it."""
    return torch.float32 if tensor.device.type in SINGLE_ALONE else torch.float64


class DistillationParts(NamedTuple):
    """The weighted, detached parts of a loss. They sum to the loss and have its shape."""

    distillation: Tensor
    ce: Tensor


class LossParts(NamedTuple):
    """The weighted, detached parts of a loss. They sum to the loss and have its shape."""

    target: Tensor
    non_target: Tensor
    ce: Tensor


class Labels(NamedTuple):
    """The targets of each row.

    ``columns`` ``(N, K)`` are the target classes and ``values`` their labels. If not ``present``, the column is some
    class in range and the value 0. ``counted`` is False for ignored rows and rows of weight 0. ``valid`` is NaN for a
    row that counts and has no value (a NaN among its probabilities, an index out of range), else 1. ``probabilities``
    is None for class indices, and ``weight`` ``(N,)`` is None if all rows weigh the same.
    """

    columns: Tensor
    values: Tensor
    present: Tensor
    is_target: Tensor
    counted: Tensor
    valid: Tensor
    probabilities: Tensor | None
    weight: Tensor | None


def find_labels(
    target: Tensor, num_classes: int, ignore_index: int, dtype: torch.dtype, *, most: int, weight: Tensor | None = None
) -> Labels:
    """Find the targets of each row. A class index is one target. Probabilities give their largest entry or, with
    ``most=2``, up to two largest entries that exceed the row's smallest: a one-hot row has one target. On ties the
    lower index goes first, as in argmax."""
    if not target.is_floating_point():
        counted = target != ignore_index
        index = torch.where(counted, target, 0)
        # An index out of range gets here only on a GPU, where a check would stall. Its row becomes NaN.
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
    if weight is not None:
        weight = usable_weight(weight, dtype)
        counted = counted & (weight != 0)
    valid = torch.where(counted, valid, 1.0)  # 0 * NaN would reach the terms that rows share
    return Labels(columns, values, present, is_target, counted, valid, probabilities, weight)


def usable_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights of rows, NaN if negative or not finite. Such weights get here on a GPU, where a check would
    stall."""
    weight = weight.to(dtype)
    return torch.where((weight >= 0) & (weight < float("inf")), weight, torch.nan)


def dense_labels(labels: Labels, dtype: torch.dtype) -> Tensor:
    """Return the whole label rows: the probabilities, or one-hot rows."""
    return labels.is_target.to(dtype) if labels.probabilities is None else labels.probabilities


def counted_logits(logits: Tensor, counted: Tensor) -> Tensor:
    """Replace the logits of rows that do not count, so that they give no gradient, not even 0 * NaN."""
    return torch.where(counted.unsqueeze(1), logits, 0.0)


class TeacherRows(NamedTuple):
    """Inputs of a loss with a teacher: ``student`` and ``teacher`` for distillation, ``raw_student`` for the CE."""

    labels: Labels
    raw_student: Tensor
    student: Tensor
    teacher: Tensor


def teacher_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    ignore_index: int,
    logit_standardization: bool = False,
    weight: Tensor | None = None,
) -> TeacherRows:
    """Return logits in the accumulation dtype, with the teacher's detached. Without targets every row counts."""
    dtype = accumulation_dtype(student_logits, teacher_logits)
    if target is None:
        # Nothing reads the class, so 0 stands in. The index to ignore must differ from it.
        target, ignore_index = torch.zeros_like(student_logits[:, 0], dtype=torch.int64), -1
    labels = find_labels(target, student_logits.shape[1], ignore_index, dtype, most=1, weight=weight)
    raw_student = counted_logits(drop_impossible(student_logits.to(dtype)), labels.counted)
    teacher = counted_logits(teacher_logits.detach().to(dtype), labels.counted)
    if logit_standardization:
        return TeacherRows(labels, raw_student, standardize_logits(raw_student), standardize_logits(teacher))
    return TeacherRows(labels, raw_student, raw_student, teacher)


def check_target(target: Tensor | None, ce_weight: float) -> None:
    """Raise a ValueError if the CE needs a target and there is none."""
    if target is None and ce_weight != 0.0:
        raise ValueError(f"ce_weight must be 0 where there is no target, got {ce_weight}")


def standardize_logits(logits: Tensor) -> Tensor:
    """Return the z-scores of each row, (x − mean) / (deviation + 1e-7) with the unbiased deviation.

    A class at -inf stays there; mean and deviation leave it out. A constant row becomes 0.
    """
    possible = logits != NEG_INF
    number = possible.sum(dim=1, keepdim=True)
    mean = torch.where(possible, logits, 0.0).sum(dim=1, keepdim=True) / number.clamp(min=1)
    centred = torch.where(possible, logits - mean, 0.0)
    variance = centred.square().sum(dim=1, keepdim=True) / (number - 1).clamp(min=1)
    # The square root has no derivative at 0.
    constant = variance == 0
    deviation = torch.where(constant, 0.0, torch.where(constant, 1.0, variance).sqrt())
    return torch.where(possible, centred / (deviation + 1e-7), NEG_INF)


def cross_entropy(log_p: Tensor, labels: Labels, weight: float, label_smoothing: float = 0.0) -> Tensor:
    """weight · (−Σ_j V'_j log p_j) of each row, V' = (1 − e) V + e / C with e the label smoothing, as in PyTorch."""
    if weight == 0.0:
        return torch.zeros_like(log_p[:, 0])
    if label_smoothing != 0.0:
        smoothed = (1.0 - label_smoothing) * dense_labels(labels, log_p.dtype) + label_smoothing / log_p.shape[1]
        return -weight * times_log(smoothed, log_p).sum(dim=1)
    if labels.probabilities is None:
        return -weight * log_p.gather(1, labels.columns).squeeze(1)
    return -weight * times_log(labels.probabilities, log_p).sum(dim=1)


def divergence(q: Tensor, log_q: Tensor, log_p: Tensor, weight: float = 1.0) -> Tensor:
    """weight · KL(q ‖ p) = weight · Σ_j q_j (log q_j − log p_j) of each row, with 0 · log 0 = 0.

    The weight multiplies q, so that a weight of 0 switches the term off even if a logarithm is -inf.
    """
    return (times_log(weight * q, log_q) - times_log(weight * q, log_p)).sum(dim=1)


def combine(parts: list[Tensor], labels: Labels, reduction: str) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and its detached parts from per-row parts: NaN for a row without a value, 0 for one that does not
    count."""
    reduced = [reduce_rows(part, labels, reduction) for part in parts]
    loss = reduced[0]
    for part in reduced[1:]:
        loss = loss + part
    return loss, [part.detach() for part in reduced]


def drop_impossible(logits: Tensor) -> Tensor:
    """Cut the gradient at -inf: a class that cannot occur gets none, whatever the teacher gives it."""
    return torch.where(logits == NEG_INF, NEG_INF, logits)


def times_log(weight: Tensor, log_value: Tensor) -> Tensor:
    """Return weight * log_value with 0 * -inf = 0, in the gradient as well. NaN stays NaN."""
    unused = weight == 0
    safe = torch.where(unused & (log_value == NEG_INF), 0.0, log_value)
    return weight * safe


def masked_softmax(logits: Tensor, excluded: Tensor, *, log: bool) -> Tensor:
    """Return the softmax, or its logarithm, over the classes that are not excluded. Excluded ones are 0, or -inf.

    Excluded logits become -inf instead of being lowered by a constant, which a large logit could outweigh. A row with
    only -inf left has no distribution: all its entries are 0, or -inf.
    """
    kept = torch.where(excluded, NEG_INF, logits)
    empty = (kept == NEG_INF).all(dim=1, keepdim=True)
    kept = torch.where(empty, 0.0, kept)
    result = kept.log_softmax(dim=1) if log else kept.softmax(dim=1)
    return torch.where(excluded | empty, NEG_INF if log else 0.0, result)


def reduce_rows(part: Tensor, labels: Labels, reduction: str) -> Tensor:
    """Reduce one part of the rows. A row that does not count is 0, and the mean of no rows is 0.

    With weights the mean is Σ w_i l_i / Σ w_i over the rows that count.
    """
    rows = torch.where(labels.counted, part * labels.valid, 0.0)
    weights = labels.counted
    if labels.weight is not None:
        weights = torch.where(labels.counted, labels.weight, 0.0)
        rows = rows * weights
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    total = weights.sum()
    return rows.sum() / torch.where(total == 0, 1, total)


def log_softmaxes(rows: TeacherRows, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log p(T) and log q(T)."""
    return (rows.student / temperature).log_softmax(dim=1), (rows.teacher / temperature).log_softmax(dim=1)


def finish(
    parts_type: type[Parts],
    rows: TeacherRows,
    parts: list[Tensor],
    ce_weight: float,
    label_smoothing: float,
    reduction: str,
) -> tuple[Tensor, Parts]:
    """Return the loss and its parts from each row's parts without the CE."""
    ce_part = cross_entropy(rows.raw_student.log_softmax(dim=1), rows.labels, ce_weight, label_smoothing)
    loss, parts = combine([*parts, ce_part], rows.labels, reduction)
    return loss, parts_type(*parts)
