"""The op of :mod:`fused_kd.source_ops` as one differentiable function of checked sources, eager or compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_kd import autograd
from fused_kd.core import transforms
from fused_kd.core.source_rows import SourceRows
from fused_kd.source_ops import SOURCE_LOSS

__all__ = ["source_loss"]

_ROW_WEIGHT_AT, _GRAD_ROWS_AT, _WANTED_AT = 5, 6, -2  # among the op's arguments after the student's three


class _SourceLoss(torch.autograd.Function):
    """Gives autograd the gradients that the forward op computed, of what the student's logits are made of."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, weight: Tensor | None, bias: Tensor | None, op: Any, further: tuple[Any, ...]
    ) -> Any:
        loss, parts, *gradients = op(student, weight, bias, *further)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if each is None else each.dtype for each in (student, weight, bias)]
        ctx.backend = further[-1]
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _grad_parts: None) -> tuple[Tensor | None, ...]:
        results: list[Tensor | None] = [None, None, None]
        if grad_output is not None:
            norm = torch.ones((), dtype=grad_output.dtype, device=grad_output.device)
            for place, gradient in enumerate(ctx.saved_tensors):
                if ctx.needs_input_grad[place]:
                    matrix = gradient if gradient.dim() == 2 else gradient[None]
                    scaled = autograd.scale_stored(matrix, grad_output, norm, ctx.backend)
                    results[place] = scaled.reshape(gradient.shape).to(ctx.dtypes[place])
        return *results, None, None


class _SourceRowsLoss(torch.autograd.Function):
    """Of ``reduction="none"``: what a weight's gradient is depends on what comes in for each row, so the backward pass
    makes it, of the same sources."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, weight: Tensor | None, bias: Tensor | None, op: Any, further: tuple[Any, ...]
    ) -> Any:
        wanted = further[_WANTED_AT]
        loss, parts, *_ = op(student, weight, bias, *further[:_WANTED_AT], [False] * len(wanted), further[-1])
        tensors = [each if isinstance(each, Tensor) else None for each in further]
        ctx.save_for_backward(student, weight, bias, *tensors)
        ctx.further = [None if isinstance(each, Tensor) else each for each in further]
        ctx.op = op
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _grad_parts: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(transforms.DOUBLE_BACKWARD)
        student, weight, bias, *tensors = ctx.saved_tensors
        further = [given if tensor is None else tensor for given, tensor in zip(ctx.further, tensors, strict=True)]
        further[_GRAD_ROWS_AT] = grad_output
        _, _, *gradients = ctx.op(student, weight, bias, *further)
        given = (student, weight, bias)
        found = [
            gradient.to(of.dtype) if need and of is not None else None
            for need, gradient, of in zip(ctx.needs_input_grad, gradients, given, strict=False)
        ]
        return *found, None, None


def source_loss(
    student: SourceRows,
    teacher: SourceRows | None,
    inputs: tuple[Tensor, Tensor | None],
    loss: str,
    hyper: list[float],
    asked: tuple[Any, ...],
    where: tuple[Any, ...],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss and its three parts, stacked, of checked sources; differentiable in what the student's logits are made
    of. ``inputs`` are the target and the rows' weight, ``asked`` what the op has between the hyper-parameters and the
    heads' numbers, ``where`` the classes at hand, their group's name, the rows of a chunk and the products' dtype."""
    given = (student.values, student.weight, student.bias)
    transforms.refuse(*(each for each in given if each is not None))
    wanted = [each is not None and each.requires_grad and torch.is_grad_enabled() for each in given]
    scheduled, numbers = autograd.given_hyper(hyper)
    of_teacher = (None, None, None, None) if teacher is None else (*teacher[:3], teacher.indices)
    other = SourceRows(student.values) if teacher is None else teacher
    heads = [student.logit_scale, student.softcap, other.logit_scale, other.softcap]
    further = (*of_teacher, *inputs, None, loss, numbers, *asked, heads, other.rest, *where, wanted, backend)
    op = SOURCE_LOSS[int(scheduled)]
    if not any(wanted):
        return op(*given, *further)[:2]  # type: ignore[no-any-return]
    function = _SourceRowsLoss if asked[-1] == "none" else _SourceLoss
    return function.apply(*given, op, further)  # type: ignore[no-any-return,no-untyped-call]
