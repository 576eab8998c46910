"""The op of a row loss whose logits are not two matrices: :mod:`fused_kd.sources`, :mod:`fused_kd.backends.sources`.

It is of one kind with those of :mod:`fused_kd.ops`, but for what it stores: where the student is a head, the gradients
of the hidden states, the weight and the bias, for an incoming gradient of 1. What is in float16 has its gradient stored
in float32, so that nothing underflows before the incoming gradient is known. ``grad_rows``, where given, multiplies
each row's gradient: that of ``reduction="none"``, which is made in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_kd import backends, ops
from fused_kd.backends import sources
from fused_kd.core import transforms
from fused_kd.core.catalogue import as_run
from fused_kd.core.options import Options
from fused_kd.core.source_rows import SourceRows, Span
from fused_kd.core.stored import counted_weight
from fused_kd.reference import accumulation_dtype

__all__ = ["SOURCE_LOSS"]


def _factors(
    row_weight: Tensor | None, grad_rows: Tensor | None, target: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    """(2, N) float64: what the parts and the gradient of each row are multiplied by."""
    weight = counted_weight(row_weight, target, ignore_index, torch.float64)
    if reduction == "mean":
        total = weight.sum()
        weight = weight / torch.where(total == 0, 1.0, total)
    of_gradient = weight if grad_rows is None else torch.where(weight == 0, 0.0, weight * grad_rows)
    return torch.stack([weight, of_gradient])


def _source_loss(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    indices: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    grad_rows: Tensor | None,
    loss: str,
    hyper: list[float] | Tensor,
    standardize: bool,
    ignore_index: int,
    reduction: str,
    heads: list[float],
    rest: str,
    span: list[int],
    group: str,
    chunk_rows: int,
    compute: torch.dtype | None,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    transforms.refuse_recorded(*(each for each in (student, weight, bias) if each is not None))
    named = ops.hyper_parameters(hyper)
    given = SourceRows(student, weight, bias, heads[0], heads[1])
    other = None
    if teacher is not None:
        other = SourceRows(teacher, teacher_weight, teacher_bias, heads[2], heads[3], indices, rest)
    factors = _factors(row_weight, grad_rows, target, ignore_index, reduction)
    asked = sources.Asked(target, factors, Span(span[0], span[1], group), chunk_rows, tuple(wanted), compute)
    options = Options(named, ignore_index, "none", (any(wanted),), (1.0,), as_run(loss, named), standardize)
    with torch.autocast(student.device.type, enabled=False):
        rows, parts, gradients = sources.run(backends.get(backend), given, other, asked, options)
        if reduction != "none":
            rows, parts = (each.double().sum(-1).to(each.dtype) for each in (rows, parts))
    return rows, parts, *gradients


def _source_loss_fake(
    student: Tensor, weight: Tensor | None, bias: Tensor | None, teacher: Tensor | None, *further: Any
) -> tuple[Tensor, ...]:
    reduction, wanted = further[10], further[-2]
    dtype = accumulation_dtype(student, student if teacher is None else teacher)
    rows = (student.shape[0],) if reduction == "none" else ()
    gradients = sources.room(SourceRows(student, weight, bias), tuple(wanted), dtype)
    return student.new_empty(rows, dtype=dtype), student.new_empty((3, *rows), dtype=dtype), *gradients


ops.define(
    "source_loss",
    "Tensor student, Tensor? weight, Tensor? bias, Tensor? teacher, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? indices, Tensor target, Tensor? row_weight, Tensor? grad_rows, str loss, {hyper}, bool standardize, "
    "int ignore_index, str reduction, float[] heads, str rest, SymInt[] span, str group, SymInt chunk_rows, "
    "ScalarType? compute, bool[] wanted",
    "(Tensor loss, Tensor parts, Tensor gradient, Tensor weight_gradient, Tensor bias_gradient)",
    _source_loss,
    _source_loss_fake,
    scheduled=True,
)
#: And its twin for hyper-parameters that may change in a compiled graph.
SOURCE_LOSS: tuple[Any, Any] = (ops.registered("source_loss"), ops.registered("source_loss_scheduled"))
