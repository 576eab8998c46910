"""The one boundary between PyTorch and the kernels: torch.library ops, their fakes, and autograd.

Two ops serve a loss: one forward, which computes the loss, its parts and, where it is wanted, the gradient for an
incoming gradient of 1; and one backward, shared by every loss, which multiplies that stored gradient by what came in.
Pointers are taken inside a registered op only, so torch.compile keeps the whole in one graph.

What is stored is one tensor of the logits' shape and dtype. It is already divided by the number of rows for
``reduction="mean"``, so that an incoming 1 leaves nothing to do. Except in float16, where dividing would underflow just
when GradScaler is about to multiply: there it is stored times a power of two that uses the upper end of the format's
range, and ``norm`` undoes that, and divides, in float32 in the backward op.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_kd import backends
from fused_kd.reference import accumulation_dtype

__all__ = ["nkd"]

_library = torch.library.Library("fused_kd", "DEF")
_library.define(
    "nkd(Tensor student_logits, Tensor teacher_logits, Tensor target, float gamma, float temperature, float ce_weight, "
    "int ignore_index, str reduction, bool need_gradient, str backend) "
    "-> (Tensor loss, Tensor parts, Tensor gradient, Tensor norm)"
)
_library.define("scale_gradient(Tensor gradient, Tensor grad_output, Tensor norm, str backend) -> Tensor")
_library.define("scale_gradient_(Tensor(a!) gradient, Tensor grad_output, Tensor norm, str backend) -> ()")


def _stored_scale(dtype: torch.dtype, bound: float) -> float:
    """The power of two times which a gradient of magnitude up to ``bound`` is stored."""
    return 2.0 ** math.floor(math.log2(2.0**15 / bound)) if dtype == torch.float16 else 1.0


def _nkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    gamma: float,
    temperature: float,
    ce_weight: float,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # |q_y (p - 1)| <= 1, |p^ - q^| <= 1 and |p - V| <= 1 bound the gradient's entries.
    scale = _stored_scale(student_logits.dtype, 1.0 + gamma * temperature + ce_weight)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = backends.get(backend).nkd(
        student_logits,
        teacher_logits,
        target,
        gamma,
        temperature,
        ce_weight,
        ignore_index,
        reduction,
        need_gradient,
        scale,
    )
    return result


def _scale_gradient(gradient: Tensor, grad_output: Tensor, norm: Tensor, backend: str) -> Tensor:
    out = torch.empty_like(gradient)
    backends.get(backend).scale_gradient(gradient, grad_output, norm, out)
    return out


def _scale_gradient_(gradient: Tensor, grad_output: Tensor, norm: Tensor, backend: str) -> None:
    backends.get(backend).scale_gradient(gradient, grad_output, norm, gradient)


for _name, _function in (("nkd", _nkd), ("scale_gradient", _scale_gradient), ("scale_gradient_", _scale_gradient_)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)


@torch.library.register_fake("fused_kd::nkd", lib=_library)
def _nkd_fake(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    gamma: float,
    temperature: float,
    ce_weight: float,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(student_logits, teacher_logits)
    rows = student_logits.shape[:1] if reduction == "none" else ()
    return (
        student_logits.new_empty(rows, dtype=dtype),
        student_logits.new_empty((3, *rows), dtype=dtype),
        student_logits.new_empty(student_logits.shape if need_gradient else (0,)),
        student_logits.new_empty((), dtype=dtype),
    )


@torch.library.register_fake("fused_kd::scale_gradient", lib=_library)
def _scale_gradient_fake(gradient: Tensor, grad_output: Tensor, norm: Tensor, backend: str) -> Tensor:
    return torch.empty_like(gradient)


@torch.library.register_fake("fused_kd::scale_gradient_", lib=_library)
def _scale_gradient_inplace_fake(gradient: Tensor, grad_output: Tensor, norm: Tensor, backend: str) -> None:
    return None


_nkd_op = torch.ops.fused_kd.nkd.default

_NO_DOUBLE_BACKWARD = (
    "fused_kd: the fused losses do not support double backward (create_graph=True); "
    "use backend='reference', which does"
)


class _FusedLoss(torch.autograd.Function):
    """Gives autograd the gradient that the forward op computed.

    Shaped by the time of a call, which at a thousand classes is a good part of a step: every argument of ``apply`` costs
    a microsecond each way, so the op's further arguments come as one tuple; a second output costs five; and the argument
    binding that comes with ``setup_context`` twenty. torch.func needs the latter, so :func:`nkd` refuses there.
    """

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, op: Any, want_parts: bool, further: tuple[Any, ...]) -> Any:
        loss, parts, gradient, norm = op(student_logits, *further)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, norm)
        ctx.backend = further[-1]
        if not want_parts:
            return loss
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _grad_parts: None = None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None
        gradient, norm = ctx.saved_tensors
        return _apply(gradient, grad_output, norm, ctx.backend), None, None, None


def _apply(gradient: Tensor, grad_output: Tensor, norm: Tensor, backend: str) -> Tensor:
    """The stored gradient times the incoming one, in place when nobody can ask for the stored one again."""
    if torch.compiler.is_compiling():
        return torch.ops.fused_kd.scale_gradient(gradient, grad_output, norm, backend)
    if torch.is_grad_enabled():
        result = torch.ops.fused_kd.scale_gradient(gradient, grad_output, norm, backend)
        return torch._C._functions.DelayedError(_NO_DOUBLE_BACKWARD, 1)(result.requires_grad_())  # type: ignore[attr-defined]
    if torch._C._autograd._get_current_graph_task_keep_graph():  # type: ignore[attr-defined]
        return torch.ops.fused_kd.scale_gradient(gradient, grad_output, norm, backend)
    if _is_one(grad_output) and gradient.dtype != torch.float16:
        return gradient
    torch.ops.fused_kd.scale_gradient_(gradient, grad_output, norm, backend)
    return gradient


def _is_one(grad_output: Tensor) -> bool:
    """Whether an incoming scalar is 1, where reading it costs nothing; on a GPU the kernel looks instead."""
    return grad_output.dim() == 0 and grad_output.device.type == "cpu" and grad_output.item() == 1.0


def nkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    gamma: float,
    temperature: float,
    ce_weight: float,
    ignore_index: int,
    reduction: str,
    backend: str,
    want_parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss and, if wanted, its three parts, stacked, of checked rows; differentiable in the student's logits."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "fused_kd: torch.func transforms do not reach into the fused kernels; use backend='reference' under them"
        )
    need_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    further = (
        teacher_logits,
        target,
        gamma,
        temperature,
        ce_weight,
        ignore_index,
        reduction,
        need_gradient,
        backend,
    )
    if not need_gradient:
        return _nkd_op(student_logits, *further)[:2]  # type: ignore[no-any-return]
    result = _FusedLoss.apply(student_logits, _nkd_op, want_parts, further)
    return result if want_parts else (result, None)
