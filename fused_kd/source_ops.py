"""The ops of losses of :mod:`fused_kd.sources`; :mod:`fused_kd.backends.sources` runs them.

They work as the ops of :mod:`fused_kd.ops`, but for a head they store the gradients of the hidden states, the weight
and the bias, for an incoming gradient of 1. The gradient of a float16 tensor is stored in float32, so that nothing
underflows before the incoming gradient is known. With ``reduction="none"`` the backward pass computes the gradient,
and ``grad_rows`` multiplies the gradient of each row.

The hyper-parameters include the numbers of heads, their logit_scale and softcap: a schedule may change these, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_kd import backends, ops
from fused_kd.backends import sources
from fused_kd.backends.heads import empty_gradients
from fused_kd.core import transforms
from fused_kd.core.catalogue import as_run
from fused_kd.core.options import HyperParameters, Options, outputs
from fused_kd.core.rows import SourceRows, Span
from fused_kd.core.stored import reduction_weight
from fused_kd.reference import accumulation_dtype


def _numbers(hyper: list[float] | Tensor) -> tuple[HyperParameters, tuple[float, float], tuple[float, float]]:
    """Return the hyper-parameters, and each head's logit_scale and softcap, which follow them."""
    *named, scale, softcap, other_scale, other_softcap = ops.listed(hyper)
    return HyperParameters._make(named), (scale, softcap), (other_scale, other_softcap)


def _refuse(grad_rows: Tensor | None, *tensors: Tensor | None) -> None:
    if grad_rows is not None:
        transforms.refuse_create_graph()
    transforms.refuse_recorded(*(each for each in (grad_rows, *tensors) if each is not None))


def _factors(
    row_weight: Tensor | None, grad_rows: Tensor | None, target: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    """Return the factors of each row's parts and of its gradient, (2, N) float64."""
    weight = reduction_weight(row_weight, target, ignore_index, reduction)
    gradient_factor = weight if grad_rows is None else torch.where(weight == 0, 0.0, weight * grad_rows)
    return torch.stack([weight, gradient_factor])


def _source_loss(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_rows: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    indices: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    loss: str,
    hyper: list[float] | Tensor,
    standardize: bool,
    ignore_index: int,
    rest: str,
    span: list[int],
    group: str,
    chunk_rows: int,
    compute: torch.dtype | None,
    reduction: str,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    _refuse(grad_rows, student, weight, bias)
    named, head, other_head = _numbers(hyper)
    given, other = SourceRows(student, weight, bias, *head), None
    if teacher is not None:
        other = SourceRows(teacher, teacher_weight, teacher_bias, *other_head, indices, rest)
    factors = _factors(row_weight, grad_rows, target, ignore_index, reduction)
    placement = sources.Placement(Span(span[0], span[1], group), chunk_rows, compute)
    task = sources.Task(target, factors, wanted, placement)
    options = Options(named, ignore_index, "none", (any(wanted),), (1.0,), as_run(loss, named.beta), standardize)
    with torch.autocast(student.device.type, enabled=False):
        rows, parts, gradients = sources.run(backends.get(backend), given, other, task, options)
        return *_reduced(reduction, rows, parts), *gradients


def _reduced(reduction: str, *rows: Tensor) -> list[Tensor]:
    return [*rows] if reduction == "none" else [each.sum(-1, dtype=torch.float64).to(each.dtype) for each in rows]


def _empty_results(
    given: Sequence[SourceRows], parts: int, reduction: str, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Allocate results like an op's, for its fake."""
    dtype = accumulation_dtype(*(each.values for each in given))
    loss, all_parts, *_ = outputs(given[0].values, False, parts, reduction, dtype)
    gradients = empty_gradients(given[0], wanted[:3], dtype)
    if len(wanted) > 3:
        gradients += empty_gradients(given[1], wanted[3:], dtype)
    return loss, all_parts, *gradients


def _source_loss_fake(
    student: Tensor, weight: Tensor | None, bias: Tensor | None, _grad_rows: Any, teacher: Tensor | None, *further: Any
) -> tuple[Tensor, ...]:
    given = [SourceRows(student, weight, bias), *([] if teacher is None else [SourceRows(teacher)])]
    *_, reduction, wanted, _backend = further
    return _empty_results(given, 3, reduction, wanted)


#: The ops, and their twins for hyper-parameters that may change in a compiled graph.
SOURCE_LOSS: tuple[Any, Any] = ops.define(
    "source_loss",
    "Tensor student, Tensor? weight, Tensor? bias, Tensor? grad_rows, Tensor? teacher, Tensor? teacher_weight, "
    "Tensor? teacher_bias, Tensor? indices, Tensor target, Tensor? row_weight, str loss, {hyper}, bool standardize, "
    "int ignore_index, str rest, SymInt[] span, str group, SymInt chunk_rows, ScalarType? compute, str reduction, "
    "bool[] wanted",
    "(Tensor loss, Tensor parts, Tensor gradient, Tensor weight_gradient, Tensor bias_gradient)",
    _source_loss,
    _source_loss_fake,
)


def _source_uskd_batch_sums(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    hyper: list[float] | Tensor,
    square: bool,
    ignore_index: int,
    num_classes: int,
    chunk_rows: int,
    compute: torch.dtype | None,
    backend: str,
) -> Tensor:
    logit_scale, softcap = ops.listed(hyper)
    given = SourceRows(student, weight, bias, logit_scale, softcap)
    placement = sources.Placement(Span(0, num_classes), chunk_rows, compute)
    with torch.autocast(student.device.type, enabled=False):
        return sources.uskd_batch_sums(backends.get(backend), given, target, placement, (square, ignore_index))


SOURCE_USKD_BATCH_SUMS: tuple[Any, Any] = ops.define(
    "source_uskd_batch_sums",
    "Tensor student, Tensor? weight, Tensor? bias, Tensor target, {hyper}, bool square, int ignore_index, "
    "SymInt num_classes, SymInt chunk_rows, ScalarType? compute",
    "Tensor",
    _source_uskd_batch_sums,
    lambda student, *_: student.new_empty((3,), dtype=torch.float64),
)


def _source_uskd(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weak: Tensor,
    weak_weight: Tensor | None,
    weak_bias: Tensor | None,
    grad_rows: Tensor | None,
    target: Tensor,
    batch_sums: Tensor,
    row_weight: Tensor | None,
    hyper: list[float] | Tensor,
    rank: str,
    square: bool,
    ignore_index: int,
    num_classes: int,
    chunk_rows: int,
    compute: torch.dtype | None,
    reduction: str,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    _refuse(grad_rows, student, weight, bias, weak, weak_weight, weak_bias)
    named, head, other_head = _numbers(hyper)
    given, other = SourceRows(student, weight, bias, *head), SourceRows(weak, weak_weight, weak_bias, *other_head)
    factors = _factors(row_weight, grad_rows, target, ignore_index, reduction)[[0, 1, 1]]
    task = sources.Task(target, factors, wanted, sources.Placement(Span(0, num_classes), chunk_rows, compute))
    want = (any(wanted[:3]), any(wanted[3:]))
    options = Options(named, ignore_index, "none", want, (1.0, 1.0), rank=rank, square=square)
    with torch.autocast(student.device.type, enabled=False):
        rows, parts, gradients = sources.run_uskd(backends.get(backend), given, other, task, batch_sums, options)
        return *_reduced(reduction, rows, parts), *gradients


def _source_uskd_fake(student: Tensor, *further: Any) -> tuple[Tensor, ...]:
    weight, bias, weak, weak_weight, weak_bias, *_, reduction, wanted, _backend = further
    given = (SourceRows(student, weight, bias), SourceRows(weak, weak_weight, weak_bias))
    return _empty_results(given, 4, reduction, wanted)


SOURCE_USKD: tuple[Any, Any] = ops.define(
    "source_uskd",
    "Tensor student, Tensor? weight, Tensor? bias, Tensor weak, Tensor? weak_weight, Tensor? weak_bias, "
    "Tensor? grad_rows, Tensor target, Tensor batch_sums, Tensor? row_weight, {hyper}, str rank, bool square, "
    "int ignore_index, SymInt num_classes, SymInt chunk_rows, ScalarType? compute, str reduction, bool[] wanted",
    "(Tensor loss, Tensor parts, Tensor student_gradient, Tensor student_weight_gradient, "
    "Tensor student_bias_gradient, Tensor weak_gradient, Tensor weak_weight_gradient, Tensor weak_bias_gradient)",
    _source_uskd,
    _source_uskd_fake,
)
