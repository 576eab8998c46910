"""The path of a row loss with sources (:mod:`fused_kd.sources`) from its arguments to the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_kd import backends, reference, source_autograd
from fused_kd.backends.topk import check_indices
from fused_kd.core import checks
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES, has_column_term, parts_of
from fused_kd.core.options import HyperParameters, in_order
from fused_kd.core.row_errors import check_target_values
from fused_kd.core.rows import SourceRows, Span
from fused_kd.core.stored import counted_rows
from fused_kd.core.transforms import carries_gradient
from fused_kd.losses import _shards
from fused_kd.losses._options import Common, Parts, normalized_weight, returned
from fused_kd.losses._topk import check_log_probs, kernel_or_reference, topk_rows
from fused_kd.reference import USKDParts, accumulation_dtype
from fused_kd.sources import ClassShard, Head, Logits, TeacherLogits, TopK

_WHOLE = "FSDP gathers a weight only in the forward pass of the module that it wraps: compute the loss there"


def is_source(logits: Any) -> bool:
    return isinstance(logits, (Head, TopK, ClassShard))


def shape_of(name: str, logits: Any, class_dim: int | None) -> tuple[tuple[int, ...], int]:
    """Return the shape of the logits of a Tensor or a head, and the dimension of the classes."""
    if isinstance(logits, Head):
        shape = _head(name, logits, class_dim).shape
        return shape, len(shape) - 1
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: expected a Tensor or a Head, got {type(logits).__name__}")
    return tuple(logits.shape), checks.class_dimension(logits, class_dim)


class _Source(NamedTuple):
    """A source, checked and flattened."""

    rows: SourceRows
    shape: tuple[int, ...]  # of its logits, padding included
    chunk_rows: int  # 0 if not given
    span: Span | None = None  # of a ClassShard


def row_loss(
    name: str,
    parts_type: type[Parts],
    tensors: tuple[Logits, TeacherLogits | None, Tensor | None],
    numbers: dict[str, float],
    settings: dict[str, Any],
    common: Common,
) -> Tensor | tuple[Tensor, Parts]:
    """As :func:`fused_kd.losses._call.row_loss`, with checked numbers."""
    student_logits, teacher_logits, target = tensors
    _, _, class_dim, num_classes, backend, return_parts = common
    if isinstance(teacher_logits, TopK) and settings["logit_standardization"]:
        raise ValueError("logit_standardization: expected False with a TopK, which does not have all logits; got True")
    student, teacher = _student_and_teacher(name, student_logits, teacher_logits, class_dim, num_classes)
    rows = _row_inputs(student, target, common, settings, ROW_LOSSES[name].labels)
    hyper = in_order(numbers)
    if has_column_term(name, HyperParameters._make(hyper)):
        raise ValueError(
            f"gamma: expected 0 for {LOSSES[name].title} of a Head, a TopK or sharded classes, since the "
            f"term of the batch's columns needs the logits of all rows at once; got {numbers['gamma']}"
        )
    chosen = backends.choose(backend, student.rows.values.device, name)
    if teacher is not None and isinstance(teacher_logits, TopK):
        check_log_probs(teacher.rows, *rows, settings["ignore_index"])
        if chosen != "reference":
            shared_labels = student.span is not None and rows[0].is_floating_point()
            chosen = kernel_or_reference(name, teacher_logits.rest, numbers, (backend, chosen), shared_labels)
    if chosen == "reference":
        loss, parts = _by_reference(name, student, teacher, *rows, numbers, settings)
    else:
        span = student.span or Span(0, student.shape[-1])
        chunk_rows = student.chunk_rows or (teacher.chunk_rows if teacher is not None else 0)
        dtype = _products_dtype(student.rows.values)
        placement = ([span.first_class, span.num_classes], span.group, chunk_rows, dtype)
        loss, stacked = source_autograd.row_loss(
            student.rows, teacher and teacher.rows, rows, name, hyper, settings, placement, chosen, return_parts
        )
        parts = [] if stacked is None else parts_of(name, stacked)
    return returned(loss, parts if return_parts else None, parts_type, student.shape[:-1], settings["reduction"])


def _student_and_teacher(
    name: str, student_logits: Any, teacher_logits: Any, class_dim: int | None, num_classes: int | None
) -> tuple[_Source, _Source | None]:
    student = _flattened("student_logits", student_logits, class_dim)
    if student.span is None and student.shape[-1] < 2:
        raise ValueError(f"student_logits: expected at least 2 classes, got shape {student.shape}")
    student = _without_padding("student_logits", student, num_classes)
    if isinstance(teacher_logits, TopK):
        classes = student.span.num_classes if student.span else student.shape[-1]
        rows = topk_rows(teacher_logits, (*student.shape[:-1], classes))
        teacher = _Source(rows, student.shape, 0, student.span)
    elif teacher_logits is not None or "teacher" in ROW_LOSSES[name].needs:
        teacher_dim = class_dim if isinstance(teacher_logits, Tensor) else None
        teacher = _flattened("teacher_logits", teacher_logits, teacher_dim)
        teacher = _without_padding("teacher_logits", teacher, num_classes)
    else:
        return student, None
    _check_teacher(teacher, student)
    return student, teacher


def _by_reference(
    name: str,
    student: _Source,
    teacher: _Source | None,
    target: Tensor,
    weight: Tensor | None,
    numbers: dict[str, float],
    settings: dict[str, Any],
) -> tuple[Tensor, list[Tensor]]:
    """Makes all logits, and brings the columns of all processes together."""
    ignore_index = settings["ignore_index"]
    counted = counted_rows(weight, target, ignore_index)

    def whole(source: _Source) -> Tensor:
        rows = _shards.shared_hidden(source.rows, source.span)
        return _shards.all_columns(_logits(rows, student.shape[-1], counted), student.span)

    logits = whole(student)
    if target.is_floating_point():
        target = _shards.all_columns(target, student.span)
    check_target_values(target, weight, logits.shape[1], ignore_index)
    if teacher is not None and teacher.rows.indices is not None:
        kept, indices = teacher.rows, teacher.rows.indices
        check_indices(indices, logits.shape[1], counted, kept.rest)
        options = {"ignore_index": ignore_index, "reduction": settings["reduction"], "weight": weight}
        loss, parts = reference.topk.topk_loss(
            name, logits, kept.values, indices, kept.rest, target, numbers, **options
        )
        return loss, [*parts]
    both = [logits] if teacher is None else [logits, whole(teacher)]
    loss, packed = getattr(reference, LOSSES[name].function)(*both, target, **numbers, **settings, weight=weight)
    return loss, [*packed]


def uskd(
    eager: Callable[..., tuple[Tensor, USKDParts]],
    tensors: tuple[Logits, Logits, Tensor],
    numbers: dict[str, float],
    settings: dict[str, Any],
    common: Common,
) -> Tensor | tuple[Tensor, USKDParts]:
    """USKD with checked numbers."""
    student_logits, weak_logits, target = tensors
    _, _, class_dim, _, backend, return_parts = common
    student = _flattened("student_logits", student_logits, class_dim)
    weak = _flattened("weak_logits", weak_logits, None)
    shape, values = student.shape, student.rows.values
    if student.span is not None or weak.span is not None:
        raise ValueError("student_logits: expected no ClassShard for USKD, which ranks all classes of a row")
    if weak.shape != shape or weak.rows.values.device != values.device:
        raise ValueError(
            f"weak_logits: expected the shape and device of student_logits, {shape} on {values.device}, got "
            f"{weak.shape} on {weak.rows.values.device}"
        )
    if (weak.rows.values.dtype == torch.float64) != (values.dtype == torch.float64):
        raise TypeError("weak_logits: expected float64 if student_logits are float64, else another dtype")
    target, weight = _row_inputs(student, target, common, settings)
    reduction = settings["reduction"]  # "sum" with a normalizer
    chosen = backends.choose(backend, values.device, "uskd")
    if chosen == "reference":
        # A row of weight 0 is part of the batch mean, so its hidden states stay as they are.
        counted = counted_rows(None, target, settings["ignore_index"])
        logits = [_logits(each.rows, shape[-1], counted) for each in (student, weak)]
        check_target_values(target, weight, shape[-1], settings["ignore_index"])
        loss, packed = eager(*logits, target, **numbers, **settings, weight=weight)
        parts = [*packed]
    else:
        rank, square, ignore_index = (settings[name] for name in ("rank", "square", "ignore_index"))
        placement = (shape[-1], student.chunk_rows or weak.chunk_rows, _products_dtype(values))
        sums = source_autograd.uskd_batch_sums(student.rows, target, (square, ignore_index, *placement), chosen)
        sums = _shards.sum_over_processes(sums, settings["process_group"])
        inputs, options = (target, sums, weight), (rank, square, ignore_index)
        loss, stacked = source_autograd.uskd(
            student.rows, weak.rows, inputs, in_order(numbers), options, placement, reduction, chosen, return_parts
        )
        parts = [] if stacked is None else [*stacked]
    return returned(loss, parts if return_parts else None, USKDParts, shape[:-1], reduction)


def _row_inputs(
    student: _Source, target: Tensor | None, common: Common, settings: dict[str, Any], labels: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Check the target and the weight, and flatten them to rows. The weight includes a normalizer."""
    weight, normalizer, class_dim, *_ = common
    shape, values = student.shape, student.rows.values
    if target is None and not labels:
        target = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    else:
        target = checks.check_tensor("target", target)
        rows, dim = shape[:-1], (-1 if class_dim is None else class_dim) % len(shape)
        target = checks.check_target(target, (*rows[:dim], shape[-1], *rows[dim:]), dim, values.device)
        target = checks.target_rows(target, dim)
    weight = checks.flatten_weight(weight, shape[:-1], shape, shape[-1], values.device)
    return target, weight if normalizer is None else normalized_weight(weight, normalizer, settings, target)


def _products_dtype(values: Tensor) -> torch.dtype | None:
    """Return the dtype of the factors of a head's products under autocast, as in a linear layer; else None."""
    enabled = torch.is_autocast_enabled(values.device.type) and values.dtype != torch.float64
    return torch.get_autocast_dtype(values.device.type) if enabled else None


def _flattened(name: str, logits: Any, class_dim: int | None) -> _Source:
    if isinstance(logits, ClassShard):
        span = _shards.span_of(name, logits, class_dim)
        if isinstance(logits.logits, Head):
            return _head(f"{name}.logits", logits.logits, None, least=0)._replace(span=span)
        rows = _shards.shard_rows(f"{name}.logits", logits.logits)
        return _Source(SourceRows(rows), tuple(logits.logits.shape), 0, span)
    if isinstance(logits, Head):
        return _head(name, logits, class_dim)
    if isinstance(logits, Tensor):
        logits = checks.check_logits(name, logits)
        shape, dim = tuple(logits.shape), checks.class_dimension(logits, class_dim)
        return _Source(SourceRows(checks.as_rows(logits, dim)), (*checks.rows_shape(shape, dim), shape[dim]), 0)
    raise TypeError(f"{name}: expected a Tensor or a source such as a Head, got {type(logits).__name__}")


def _head(name: str, head: Head, class_dim: int | None, least: int = 2) -> _Source:
    if class_dim is not None:
        raise ValueError(f"class_dim: expected None with a Head, whose hidden states are (..., D), got {class_dim}")
    if any(map(checks.is_dtensor, (head.hidden, head.weight, head.bias))):
        raise TypeError(
            f"{name}: expected Tensors in a Head, got a DTensor. {_WHOLE}. If the classes are sharded, pass a "
            "ClassShard of a Head with weight.to_local() and hidden.full_tensor(), or the logits as a DTensor"
        )
    hidden, weight = (checks.check_logits(f"{name}.{at}", getattr(head, at)) for at in ("hidden", "weight"))
    fits = weight.dim() == 2 and hidden.dim() >= 2 and hidden.shape[-1] == weight.shape[1] > 0
    if not fits or weight.shape[0] < least:
        raise ValueError(
            f"{name}: expected a Head of hidden states (..., D) and a weight (C, D) with C at least {least} and D at "
            f"least 1, got {tuple(hidden.shape)} and {tuple(weight.shape)}{f'. {_WHOLE}' if weight.dim() == 1 else ''}"
        )
    tensors = [hidden, weight]
    if head.bias is not None:
        bias = checks.check_logits(f"{name}.bias", head.bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}.bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        tensors.append(bias)
    for tensor in tensors:
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: expected a Head on one device, got {hidden.device} and {tensor.device}")
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(
            f"{name}: expected hidden states and weight both float64 or neither, got {hidden.dtype} and {weight.dtype}"
        )
    softcap = 0.0 if head.softcap is None else checks.check_scalar(f"{name}.softcap", head.softcap, positive=True)
    scale = checks.check_scalar(f"{name}.logit_scale", head.logit_scale, positive=True)
    chunk_rows = 0
    if head.chunk_rows is not None:
        checks.check_count(f"{name}.chunk_rows", head.chunk_rows, 1)
        chunk_rows = head.chunk_rows
    rows = SourceRows(hidden.reshape(-1, hidden.shape[-1]), weight, head.bias, scale, softcap)
    return _Source(rows, (*hidden.shape[:-1], weight.shape[0]), chunk_rows)


def _without_padding(name: str, source: _Source, num_classes: int | None) -> _Source:
    """Drop the padding from the shape. Logits keep it, and a head its whole weight, so that the gradient needs no
    copy."""
    if num_classes is None:
        return source
    if source.span is not None:
        raise ValueError(
            f"num_classes: expected None with sharded classes, got {num_classes}; without the padding, "
            f"give each a ClassShard of its columns and num_classes={num_classes}"
        )
    checks.check_num_classes("num_classes", num_classes, source.shape[-1], name)
    return source._replace(shape=(*source.shape[:-1], num_classes))


def _check_teacher(teacher: _Source, student: _Source) -> None:
    _shards.check_same(student.span, teacher.span)
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher_logits: expected the shape of student_logits, {student.shape}, got a source of {teacher.shape}"
            f"{'' if student.span else checks.padding_hint(student.shape, teacher.shape, len(student.shape) - 1)}"
        )
    tensors = [each for each in teacher.rows[:3] if isinstance(each, Tensor)]
    device = student.rows.values.device
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"teacher_logits: expected the device of student_logits, {device}, got {tensor.device}")
    if any(map(carries_gradient, tensors)):
        learns = any(isinstance(each, Tensor) and carries_gradient(each) for each in student.rows[:3])
        raise ValueError(
            "teacher_logits: expected a source whose tensors do not require grad, since no backend gives the teacher a "
            "gradient; detach them"
            f"{'' if learns else '. The tensors of student_logits require none: are the two swapped?'}"
        )


def _logits(source: SourceRows, num_classes: int, counted: Tensor) -> Tensor:
    """Return the logits of a source, differentiable, for the reference. A head's rows that do not count become 0, since
    a NaN there would reach the weight's gradient."""
    if source.weight is None:
        return source.values[:, :num_classes]
    dtype = accumulation_dtype(source.values)
    weight = source.weight[:num_classes].to(dtype)
    bias = None if source.bias is None else source.bias[:num_classes].to(dtype)
    hidden = torch.where(counted[:, None], source.values.to(dtype), 0.0)
    logits = F.linear(hidden, weight, bias) * source.logit_scale
    return source.softcap * torch.tanh(logits / source.softcap) if source.softcap else logits
