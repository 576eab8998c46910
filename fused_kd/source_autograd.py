"""The ops of :mod:`fused_kd.source_ops` as differentiable functions of checked sources, eager or compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_kd import autograd, ops
from fused_kd.core import transforms
from fused_kd.core.rows import SourceRows
from fused_kd.source_ops import SOURCE_LOSS, SOURCE_USKD, SOURCE_USKD_BATCH_SUMS

_EXPORTED = (
    "torch.export cannot record the gradient of a loss of a Head, a TopK or a ClassShard: export it under "
    "torch.no_grad(), with backend='reference', or with logits for the student"
)


class _SourceLoss(torch.autograd.Function):
    """Gives autograd the gradients that the forward op computed for ``tensors``, its first arguments. Parts that are
    not wanted would cost time, as in :class:`fused_kd.autograd._FusedLoss`."""

    @staticmethod
    def forward(ctx: Any, op: Any, want_parts: bool, further: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        loss, parts, *gradients = op(*tensors, *further)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if each is None else each.dtype for each in tensors]
        ctx.backend = further[-1]
        if not want_parts:
            return loss
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _grad_parts: None = None) -> tuple[Tensor | None, ...]:
        results: list[Tensor | None] = [None] * len(ctx.dtypes)
        if grad_output is not None:
            norm = torch.ones((), dtype=grad_output.dtype, device=grad_output.device)
            for place, gradient in enumerate(ctx.saved_tensors):
                if ctx.needs_input_grad[3 + place]:
                    matrix = gradient if gradient.dim() == 2 else gradient[None]
                    scaled = autograd.scale_stored(matrix, grad_output, norm, ctx.backend)
                    results[place] = scaled.reshape(gradient.shape).to(ctx.dtypes[place])
        return None, None, None, *results


class _SourceRowsLoss(torch.autograd.Function):
    """``reduction="none"``: a weight's gradient depends on the incoming gradient of each row, so the backward pass
    computes it from the same sources. The incoming gradient is the first of the op's ``further`` arguments, else
    None."""

    @staticmethod
    def forward(ctx: Any, op: Any, want_parts: bool, further: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        *given, wanted, backend = further
        loss, parts, *_ = op(*tensors, *given, [False] * len(wanted), backend)
        others = [each if isinstance(each, Tensor) else None for each in further]
        ctx.save_for_backward(*map(autograd.savable, (*tensors, *others)))
        ctx.further = [None if isinstance(each, Tensor) else each for each in further]
        ctx.op, ctx.count = op, len(tensors)
        if not want_parts:
            return loss
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _grad_parts: Any = None) -> tuple[Tensor | None, ...]:
        transforms.refuse_double_backward()
        saved = ctx.saved_tensors  # once: checkpointing unpacks them only once
        tensors, others = saved[: ctx.count], saved[ctx.count :]
        _, *further = [given if other is None else other for given, other in zip(ctx.further, others, strict=True)]
        _, _, *gradients = ctx.op(*tensors, grad_output, *further)
        results = [
            gradient.to(of.dtype) if need and of is not None else None
            for need, gradient, of in zip(ctx.needs_input_grad[3:], gradients, tensors, strict=True)
        ]
        return None, None, None, *results


def _apply(
    twins: tuple[Any, Any],
    tensors: Sequence[Tensor | None],
    inputs: tuple[Any, ...],
    hyper: list[float],
    options: tuple[Any, ...],
    reduction: str,
    backend: str,
    want_parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run one of the ``twins`` and make it differentiable in ``tensors``, its first arguments. ``inputs`` are its
    arguments between these and the hyper-parameters, and ``options`` those between these and the reduction."""
    transforms.refuse(*(each for each in tensors if each is not None))
    wanted = [each is not None and each.requires_grad and torch.is_grad_enabled() for each in tensors]
    if any(wanted) and transforms.is_exporting():
        raise RuntimeError(_EXPORTED)
    op, numbers = autograd.choose_op(twins, hyper)
    further = (None, *inputs, numbers, *options, reduction, wanted, backend)
    if not any(wanted):
        return op(*tensors, *further)[:2]  # type: ignore[no-any-return]
    given = autograd.each_once(tensors)
    if reduction == "none":
        result = _SourceRowsLoss.apply(op, want_parts, further, *given)  # type: ignore[no-untyped-call]
    else:
        function = ops.function_for(op, (*tensors, *further)) or op
        result = _SourceLoss.apply(function, want_parts, further, *given)  # type: ignore[no-untyped-call]
    return result if want_parts else (result, None)


def row_loss(
    student: SourceRows,
    teacher: SourceRows | None,
    inputs: tuple[Tensor, Tensor | None],
    loss: str,
    hyper: list[float],
    settings: dict[str, Any],
    placement: tuple[Any, ...],
    backend: str,
    want_parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of checked sources and, if wanted, its three stacked parts; differentiable in the student's
    tensors.

    ``inputs`` are the target and the row weights, ``settings`` the loss's options that are no numbers. ``placement``
    has the classes of this process, their group's name, the rows of a chunk and the products' dtype.
    """
    teacher_tensors = (None, None, None, None) if teacher is None else (*teacher[:3], teacher.indices)
    other = SourceRows(student.values) if teacher is None else teacher
    heads = [student.logit_scale, student.softcap, other.logit_scale, other.softcap]
    all_inputs = (*teacher_tensors, *inputs, loss)
    standardize, reduction = settings.get("logit_standardization", False), settings["reduction"]
    options = (standardize, settings["ignore_index"], other.rest, *placement)
    return _apply(SOURCE_LOSS, student[:3], all_inputs, [*hyper, *heads], options, reduction, backend, want_parts)


def uskd_batch_sums(student: SourceRows, target: Tensor, options: tuple[Any, ...], backend: str) -> Tensor:
    """Return the sums that couple the rows of USKD. ``options`` are square, ignore_index, the number of classes, the
    rows of a chunk and the products' dtype."""
    head = [student.logit_scale, student.softcap]
    op, numbers = autograd.choose_op(SOURCE_USKD_BATCH_SUMS, head)
    tensors = [None if each is None else each.detach() for each in student[:3]]
    return op(*tensors, target, numbers, *options, backend)  # type: ignore[no-any-return]


def uskd(
    student: SourceRows,
    weak: SourceRows,
    inputs: tuple[Tensor | None, ...],
    hyper: list[float],
    options: tuple[Any, ...],
    placement: tuple[Any, ...],
    reduction: str,
    backend: str,
    want_parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return USKD of checked sources and, if wanted, its four stacked parts; differentiable in the tensors of both.
    ``inputs`` are the target, the batch sums and the row weights."""
    heads = [student.logit_scale, student.softcap, weak.logit_scale, weak.softcap]
    tensors, all_options = (*student[:3], *weak[:3]), (*options, *placement)
    return _apply(SOURCE_USKD, tensors, inputs, [*hyper, *heads], all_options, reduction, backend, want_parts)
