"""The one boundary between PyTorch and the kernels: torch.library ops, their fakes, and autograd.

Two ops serve a loss: one forward, which computes the loss, its parts and, where it is wanted, the gradient for an
incoming gradient of 1; and one backward, shared by every loss, which multiplies that stored gradient by what came in.
USKD, whose rows a batch mean couples, has a small op before, so that an all-reduce can come between. Pointers are taken
inside a registered op only, so torch.compile keeps the whole in one graph.

What is stored is one tensor of the shape and dtype of the logits that want a gradient. It is already divided by the
number of rows for ``reduction="mean"``, so that an incoming 1 leaves nothing to do. Except in float16, where dividing
would underflow just when GradScaler is about to multiply: there it is stored times a power of two that uses the upper
end of the format's range, and ``norm`` undoes that, and divides, in float32 in the backward op.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_kd import backends
from fused_kd.reference import accumulation_dtype
from fused_kd.registry import ROW_LOSSES, Weights

__all__ = ["row_loss", "uskd", "uskd_batch_sums"]

_library: Any = torch.library.Library("fused_kd", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "row_loss(Tensor student_logits, Tensor? teacher_logits, Tensor target, str loss, float[] weights, "
    "Tensor? traced_weights, bool standardize, int ignore_index, str reduction, bool need_gradient, str backend) "
    "-> (Tensor loss, Tensor parts, Tensor gradient, Tensor norm)"
)
_library.define(
    "uskd_batch_sums(Tensor student_logits, Tensor target, bool square, int ignore_index, str backend) -> Tensor"
)
_library.define(
    "uskd(Tensor student_logits, Tensor weak_logits, Tensor target, Tensor batch_sums, float alpha, float beta, "
    "float mu, float ce_weight, str rank, bool square, int ignore_index, str reduction, bool need_student, "
    "bool need_weak, str backend) -> (Tensor loss, Tensor parts, Tensor student_gradient, Tensor weak_gradient, "
    "Tensor student_norm, Tensor weak_norm)"
)
_library.define("scale_gradient(Tensor gradient, Tensor grad_output, Tensor norm, str backend) -> Tensor")
_library.define("scale_gradient_(Tensor(a!) gradient, Tensor grad_output, Tensor norm, str backend) -> ()")


def _stored_scale(dtype: torch.dtype, bound: float) -> float:
    """The power of two times which a gradient of magnitude up to ``bound`` is stored, one that float32 can undo."""
    return 2.0 ** math.floor(math.log2(2.0**15 / max(bound, 2.0**-64))) if dtype == torch.float16 else 1.0


def _row_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    loss: str,
    weights: list[float],
    traced_weights: Tensor | None,
    standardize: bool,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if traced_weights is not None:
        weights = traced_weights.tolist()
    bound = ROW_LOSSES[loss].bound(*weights[:3]) + weights[3]
    if standardize:
        bound *= 2.0**8  # one over the deviation of a row's logits, as long as that is no smaller than a constant's
    scale = _stored_scale(student_logits.dtype, bound)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = backends.get(backend).row_loss(
        student_logits,
        teacher_logits,
        target,
        loss,
        weights,
        standardize,
        ignore_index,
        reduction,
        need_gradient,
        scale,
    )
    return result


def _uskd_batch_sums(student_logits: Tensor, target: Tensor, square: bool, ignore_index: int, backend: str) -> Tensor:
    sums: Tensor = backends.get(backend).uskd_batch_sums(student_logits, target, square, ignore_index)
    return sums


def _uskd(
    student_logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    batch_sums: Tensor,
    alpha: float,
    beta: float,
    mu: float,
    ce_weight: float,
    rank: str,
    square: bool,
    ignore_index: int,
    reduction: str,
    need_student: bool,
    need_weak: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # P_k and P_1 + P_2 are from -1 to 2. At a target, p_k (P_1 + P_2) - P_k averages -P_k and the other target's P.
    student_scale = _stored_scale(student_logits.dtype, 2.0 * alpha + beta + ce_weight)
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = backends.get(backend).uskd(
        student_logits,
        weak_logits,
        target,
        batch_sums,
        alpha,
        beta,
        mu,
        ce_weight,
        rank,
        square,
        ignore_index,
        reduction,
        need_student,
        need_weak,
        student_scale,
        _stored_scale(weak_logits.dtype, mu),
    )
    return result


def _scale_gradient(gradient: Tensor, grad_output: Tensor, norm: Tensor, backend: str) -> Tensor:
    out = torch.empty_like(gradient)
    backends.get(backend).scale_gradient(gradient, grad_output, norm, out)
    return out


def _scale_gradient_(gradient: Tensor, grad_output: Tensor, norm: Tensor, backend: str) -> None:
    backends.get(backend).scale_gradient(gradient, grad_output, norm, gradient)


for _name, _function in (
    ("row_loss", _row_loss),
    ("uskd_batch_sums", _uskd_batch_sums),
    ("uskd", _uskd),
    ("scale_gradient", _scale_gradient),
    ("scale_gradient_", _scale_gradient_),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)


def _row_loss_fake(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    loss: str,
    weights: list[float],
    traced_weights: Tensor | None,
    standardize: bool,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(student_logits, student_logits if teacher_logits is None else teacher_logits)
    rows = student_logits.shape[:1] if reduction == "none" else ()
    return (
        student_logits.new_empty(rows, dtype=dtype),
        student_logits.new_empty((3, *rows), dtype=dtype),
        student_logits.new_empty(student_logits.shape if need_gradient else (0,)),
        student_logits.new_empty((), dtype=dtype),
    )


def _uskd_batch_sums_fake(
    student_logits: Tensor, target: Tensor, square: bool, ignore_index: int, backend: str
) -> Tensor:
    return student_logits.new_empty((3,), dtype=torch.float64)


def _uskd_fake(
    student_logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    batch_sums: Tensor,
    alpha: float,
    beta: float,
    mu: float,
    ce_weight: float,
    rank: str,
    square: bool,
    ignore_index: int,
    reduction: str,
    need_student: bool,
    need_weak: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(student_logits, weak_logits)
    rows = student_logits.shape[:1] if reduction == "none" else ()
    return (
        student_logits.new_empty(rows, dtype=dtype),
        student_logits.new_empty((4, *rows), dtype=dtype),
        student_logits.new_empty(student_logits.shape if need_student else (0,)),
        weak_logits.new_empty(weak_logits.shape if need_weak else (0,)),
        student_logits.new_empty((), dtype=dtype),
        student_logits.new_empty((), dtype=dtype),
    )


def _scale_gradient_fake(gradient: Tensor, grad_output: Tensor, norm: Tensor, backend: str) -> Tensor:
    return torch.empty_like(gradient)


def _scale_gradient_inplace_fake(gradient: Tensor, grad_output: Tensor, norm: Tensor, backend: str) -> None:
    return None


for _name, _fake in (
    ("row_loss", _row_loss_fake),
    ("uskd_batch_sums", _uskd_batch_sums_fake),
    ("uskd", _uskd_fake),
    ("scale_gradient", _scale_gradient_fake),
    ("scale_gradient_", _scale_gradient_inplace_fake),
):
    torch.library.register_fake(f"fused_kd::{_name}", _fake, lib=_library)

_row_loss_op = torch.ops.fused_kd.row_loss.default
_uskd_batch_sums_op = torch.ops.fused_kd.uskd_batch_sums.default
_uskd_op = torch.ops.fused_kd.uskd.default
_scale_op = torch.ops.fused_kd.scale_gradient.default
_scale_inplace_op = torch.ops.fused_kd.scale_gradient_.default

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
        result: Tensor = _scale_op(gradient, grad_output, norm, backend)
        if differentiating and not compiling:
            result = torch._C._functions.DelayedError(_NO_DOUBLE_BACKWARD, 1)(result.requires_grad_())
        return result
    if _is_one(grad_output) and gradient.dtype != torch.float16:
        return gradient
    _scale_inplace_op(gradient, grad_output, norm, backend)
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
    traced = None
    if torch.compiler.is_compiling() and student_logits.device.type == "cpu":
        # A float that an op takes is a constant of the graph; one that a tensor is multiplied with is an input.
        traced, weights = torch.stack([torch.ones((), dtype=torch.float64) * weight for weight in weights]), ()
    further = (
        teacher_logits,
        target,
        loss,
        weights,
        traced,
        standardize,
        ignore_index,
        reduction,
        need_gradient,
        backend,
    )
    if not need_gradient:
        return _row_loss_op(student_logits, *further)[:2]  # type: ignore[no-any-return]
    result = _FusedLoss.apply(student_logits, _row_loss_op, want_parts, further)  # type: ignore[no-untyped-call]
    return result if want_parts else (result, None)


def uskd_batch_sums(student_logits: Tensor, target: Tensor, square: bool, ignore_index: int, backend: str) -> Tensor:
    """What couples the rows of USKD; see :func:`fused_kd.reference.uskd_batch_sums`."""
    _refuse_functorch()
    return _uskd_batch_sums_op(student_logits.detach(), target, square, ignore_index, backend)  # type: ignore[no-any-return]


def uskd(
    student_logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    batch_sums: Tensor,
    alpha: float,
    beta: float,
    mu: float,
    ce_weight: float,
    rank: str,
    square: bool,
    ignore_index: int,
    reduction: str,
    backend: str,
    want_parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss and, if wanted, its four parts, stacked, of checked rows; differentiable in both logits."""
    _refuse_functorch()
    grad = torch.is_grad_enabled()
    need_student, need_weak = grad and student_logits.requires_grad, grad and weak_logits.requires_grad
    options = (alpha, beta, mu, ce_weight, rank, square, ignore_index, reduction)
    further = (target, batch_sums, *options, need_student, need_weak, backend)
    if not (need_student or need_weak):
        return _uskd_op(student_logits, weak_logits, *further)[:2]  # type: ignore[no-any-return]
    apply = _FusedPairLoss.apply
    result = apply(student_logits, weak_logits, _uskd_op, want_parts, further)  # type: ignore[no-untyped-call]
    return result if want_parts else (result, None)
