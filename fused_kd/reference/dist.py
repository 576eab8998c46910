"""DIST: the correlation of the student's with the teacher's probabilities, along rows and along columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd.reference.rows import check_target, finish, teacher_rows


class DISTParts(NamedTuple):
    """The weighted, detached parts of DIST: rows (inter-class), columns (intra-class), CE. They sum to the loss."""

    inter: Tensor
    intra: Tensor
    ce: Tensor


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, DISTParts]:
    """DIST (Huang et al.): T² (beta (1 − r of the row) + gamma (1 − mean over the classes of r of the column)).

    r = Σ a b / (√Σa² √Σb² + 1e-8), where a, b are the softmaxes at T minus their mean along the row or the column. The
    second term is one number for the batch. Every row that counts gets it whole, so that the loss stays the mean of its
    rows. A NaN in one row makes it NaN.
    Rows that are ignored or of weight 0 are in neither term. In the second term all other rows count equally, whatever
    their weights. Without targets every row counts and ``ce_weight`` must be 0.
    """
    check_target(target, ce_weight)
    rows = teacher_rows(student_logits, teacher_logits, target, ignore_index, logit_standardization, weight)
    labels, _, student, teacher = rows
    p, q = (student / temperature).softmax(dim=1), (teacher / temperature).softmax(dim=1)
    p = p * labels.valid.unsqueeze(1)  # a NaN among the labels is in the columns as well
    scale = temperature**2
    inter = scale * beta * (1.0 - _correlation(_centred(p, p[:, :1]), _centred(q, q[:, :1]), dim=1))
    if gamma == 0.0:
        intra = torch.zeros_like(inter)
    else:
        counted = labels.counted.unsqueeze(1)
        columns = _correlation(_centre_columns(p, counted), _centre_columns(q, counted), dim=0)
        intra = (scale * gamma * (1.0 - columns.mean())).expand_as(inter)
    return finish(DISTParts, rows, [inter, intra], ce_weight, label_smoothing, reduction)


def _centred(p: Tensor, origin: Tensor) -> Tensor:
    """Subtract the mean of each row of p. Subtracting an ``origin`` first makes a constant row exactly 0: a rounding
    error of its mean would have a derivative of 1e8."""
    p = p - origin.detach()
    return p - p.mean(dim=1, keepdim=True)


def _centre_columns(p: Tensor, counted: Tensor) -> Tensor:
    """As :func:`_centred` for columns, over the rows that count. Other rows are 0."""
    if p.shape[0] == 0:
        return p
    origin = p.detach().index_select(0, counted.squeeze(1).to(torch.uint8).argmax(0, keepdim=True))
    p = torch.where(counted, p - origin, 0.0)
    mean = p.sum(dim=0, keepdim=True) / counted.sum().clamp(min=1)
    return torch.where(counted, p - mean, 0.0)


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    # The norm of a constant row or column is 0, and its gradient there is 0 rather than NaN.
    norms: Tensor = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return (a * b).sum(dim=dim) / (norms + 1e-8)
