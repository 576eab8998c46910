"""The ops of a loss as one differentiable function of checked rows, eager or compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_kd import ops
from fused_kd.registry import Weights

__all__ = ["row_loss", "uskd", "uskd_batch_sums", "zipf_ls"]

# By int(whether hyper-parameters may change): PyTorch 2.11's compiler takes no bool for an index.
_ROW_LOSS, _USKD, _ZIPF_LS = (ops.LOSS_OPS[name] for name in ("row_loss", "uskd", "zipf_ls"))
_NO_DOUBLE_BACKWARD = (
    "fused_kd: the fused losses do not support double backward (create_graph=True); use backend='reference', which does"
)


class _FusedLoss(torch.autograd.Function):
    """Gives autograd the gradient that the forward op computed.

    Shaped by the time of a call, which at a thousand classes is a good part of a step: every argument of ``apply``
    costs a microsecond each way, so the op's further arguments come as one tuple; a second output costs five; and the
    argument binding that comes with ``setup_context`` twenty. torch.func needs the latter, so the losses refuse there.
    """

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, op: Any, want_parts: bool, further: tuple[Any, ...]) -> Any:
        return _keep(ctx, op(student_logits, *further), want_parts, further[-1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _grad_parts: None = None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None
        gradient, norm = ctx.saved_tensors
        return _apply(gradient, grad_output, norm, ctx.backend), None, None, None


class _FusedPairLoss(torch.autograd.Function):
    """As :class:`_FusedLoss`, which it would slow down, for two logits that have a gradient each, if wanted."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, other_logits: Tensor, op: Any, want_parts: bool, further: tuple[Any, ...]
    ) -> Any:
        return _keep(ctx, op(student_logits, other_logits, *further), want_parts, further[-1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _grad_parts: None = None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None, None
        student, other, student_norm, other_norm = ctx.saved_tensors
        want_student, want_other = ctx.needs_input_grad[:2]
        return (
            _apply(student, grad_output, student_norm, ctx.backend) if want_student else None,
            _apply(other, grad_output, other_norm, ctx.backend) if want_other else None,
            None,
            None,
            None,
        )


def _keep(ctx: Any, outputs: tuple[Tensor, ...], want_parts: bool, backend: str) -> Any:
    """Save what the forward op has made for backward; the loss, and the parts if they are wanted."""
    loss, parts, *stored = outputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*stored)
    ctx.backend = backend
    if not want_parts:
        return loss
    ctx.mark_non_differentiable(parts)
    return loss, parts


def _apply(gradient: Tensor, grad_output: Tensor, norm: Tensor, backend: str) -> Tensor:
    """The stored gradient times the incoming one, in place when nobody can ask for the stored one again."""
    compiling, differentiating = torch.compiler.is_compiling(), torch.is_grad_enabled()
    if compiling or differentiating or torch._C._autograd._get_current_graph_task_keep_graph():
        result: Tensor = ops.scale_gradient(gradient, grad_output, norm, backend)
        if differentiating and not compiling:
            result = torch._C._functions.DelayedError(_NO_DOUBLE_BACKWARD, 1)(result.requires_grad_())
        return result
    if _is_one(grad_output) and gradient.dtype != torch.float16:
        return gradient
    ops.scale_gradient_(gradient, grad_output, norm, backend)
    return gradient


def _is_one(grad_output: Tensor) -> bool:
    """Whether an incoming scalar is 1, where reading it costs nothing; on a GPU the kernel looks instead."""
    return grad_output.dim() == 0 and grad_output.device.type == "cpu" and grad_output.item() == 1.0


def _refuse_functorch() -> None:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "fused_kd: torch.func transforms do not reach into the fused kernels; use backend='reference' under them"
        )


def row_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    loss: str,
    weights: Weights,
    standardize: bool,
    ignore_index: int,
    reduction: str,
    backend: str,
    want_parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss and, if wanted, its three parts, stacked, of checked rows; differentiable in the student's logits."""
    _refuse_functorch()
    need_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    scheduled, given = _given(weights)
    options = (loss, given, standardize, ignore_index, reduction, need_gradient, backend)
    further = (teacher_logits, target, row_weight, *options)
    return _apply_fused(_ROW_LOSS[int(scheduled)], student_logits, further, need_gradient, want_parts)


def zipf_ls(
    student_logits: Tensor,
    dense_logits: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    weights: Weights,
    ignore_index: int,
    reduction: str,
    backend: str,
    want_parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """Zipf's label smoothing of checked rows, and if wanted its two parts, stacked; differentiable in the student's
    logits. ``weights`` are those of the divergence, the power, the CE and its label smoothing."""
    _refuse_functorch()
    need_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    scheduled, given = _given(weights)
    further = (dense_logits.detach(), target, row_weight, given, ignore_index, reduction, need_gradient, backend)
    return _apply_fused(_ZIPF_LS[int(scheduled)], student_logits, further, need_gradient, want_parts)


def _given(weights: Weights) -> tuple[bool, Weights | Tensor]:
    """Whether hyper-parameters may change in the graph that is being compiled, and they as the op then takes them.

    A float is a constant of a compiled graph until a call brings another value; then the graph is compiled once more,
    with a symbol in its place, of which nothing is known here.
    """
    if torch.compiler.is_compiling():
        # Asks for no bound: the checks of a range have left their guards, which settle a comparison of a symbol, too.
        from torch.fx.experimental.symbolic_shapes import has_static_value

        for weight in weights:
            if not has_static_value(weight):
                return True, torch.stack([torch.ones((), dtype=torch.float64) * each for each in weights])
    return False, weights


def _apply_fused(
    op: Any, student_logits: Tensor, further: tuple[Any, ...], need_gradient: bool, want_parts: bool
) -> tuple[Tensor, Tensor | None]:
    if not need_gradient:
        return op(student_logits, *further)[:2]  # type: ignore[no-any-return]
    result = _FusedLoss.apply(student_logits, op, want_parts, further)  # type: ignore[no-untyped-call]
    return result if want_parts else (result, None)


def uskd_batch_sums(student_logits: Tensor, target: Tensor, square: bool, ignore_index: int, backend: str) -> Tensor:
    """What couples the rows of USKD; see :func:`fused_kd.reference.uskd_batch_sums`."""
    _refuse_functorch()
    return ops.uskd_batch_sums(student_logits.detach(), target, square, ignore_index, backend)  # type: ignore[no-any-return]


def uskd(
    student_logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    batch_sums: Tensor,
    row_weight: Tensor | None,
    weights: Weights,
    rank: str,
    square: bool,
    ignore_index: int,
    reduction: str,
    backend: str,
    want_parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss and, if wanted, its four parts, stacked, of checked rows; differentiable in both logits. ``weights`` are
    alpha, beta, mu, those of the CE and its label smoothing."""
    _refuse_functorch()
    grad = torch.is_grad_enabled()
    need_student, need_weak = grad and student_logits.requires_grad, grad and weak_logits.requires_grad
    scheduled, given = _given(weights)
    op = _USKD[int(scheduled)]
    options = (given, rank, square, ignore_index, reduction)
    further = (target, batch_sums, row_weight, *options, need_student, need_weak, backend)
    if not (need_student or need_weak):
        return op(student_logits, weak_logits, *further)[:2]  # type: ignore[no-any-return]
    apply = _FusedPairLoss.apply
    result = apply(student_logits, weak_logits, op, want_parts, further)  # type: ignore[no-untyped-call]
    return result if want_parts else (result, None)
