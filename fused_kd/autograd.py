"""The ops of a loss as one differentiable function of checked rows, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd import backends, ops
from fused_kd.core import transforms
from fused_kd.core.catalogue import has_column_term
from fused_kd.core.options import HyperParameters
from fused_kd.core.stored import counted_weight


class _FusedLoss(torch.autograd.Function):
    """Gives autograd the gradients that the forward op computed for ``logits``, its first arguments.

    The time of a call, a good part of a step at a thousand classes, decides the form. Each argument of ``apply`` costs
    a microsecond each way, so the op's further arguments are one tuple. A second output costs five microseconds, and
    the argument binding of ``setup_context`` twenty. torch.func needs the latter, so the losses raise an error there.
    The inputs are not kept, to save their memory. So there is no second derivative, and the backward raises an error
    with create_graph=True.
    """

    @staticmethod
    def forward(ctx: Any, op: Any, want_parts: bool, further: tuple[Any, ...], *logits: Tensor) -> Any:
        loss, parts, *stored = op(*logits, *further)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*stored)
        ctx.backend = further[-1]
        if not want_parts:
            return loss
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _grad_parts: None = None) -> tuple[Tensor | None, ...]:
        return _stored_gradients(ctx, grad_output)


class _DistRows(torch.autograd.Function):
    """DIST with ``reduction="none"``: the backward pass computes the gradient from the logits (:mod:`fused_kd.ops`).

    ``saved`` are the student's logits, the teacher's and the target, before flattening to rows may have copied them.
    Returns the op's results, without a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, op: Any, saved: tuple[Tensor, Tensor, Tensor], further: tuple[Any, ...]
    ) -> Any:
        outputs = op(student_logits, *further)
        _, _, row_weight, _, hyper, *options, _, _, backend = further
        scheduled = isinstance(hyper, Tensor)
        ctx.save_for_backward(*map(savable, (*saved, row_weight)), hyper if scheduled else None)
        ctx.hyper, ctx.options, ctx.backend = None if scheduled else hyper, options, backend
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        transforms.refuse_double_backward()
        compiling = torch.compiler.is_compiling()
        *saved, row_weight, hyper = ctx.saved_tensors
        student, teacher, target = (
            each.reshape(-1, each.shape[-1]) if each.is_floating_point() else each for each in saved
        )
        op = ops.DIST_GRADIENT[int(hyper is not None)]
        hyper = ctx.hyper if hyper is None else hyper

        def gradient(student: Tensor, *grads: Tensor) -> Tensor:
            given = (student, teacher, target, row_weight, hyper, *ctx.options)
            return op(*given, *grads, ctx.backend)  # type: ignore[no-any-return]

        # The column term is part of every row that counts, so its incoming gradient is a sum over them.
        share = counted_weight(row_weight, target, ctx.options[-1], grad_output.dtype)
        grad_columns = torch.where(share == 0, 0.0, grad_output * share).sum(-1)
        if compiling or not transforms.tangents_exist():  # for a batch PyTorch calls the op once per item
            return gradient(student, grad_output, grad_columns), None, None, None
        wide = student.to(share.dtype)
        ones, one = torch.ones_like(share), torch.ones_like(share[0])
        by_rows, by_columns = gradient(wide, ones, one - one), gradient(wide, ones - ones, one)
        both = _scaled(by_rows, grad_output, one) + _scaled(by_columns, grad_columns, one)
        return both.to(student.dtype), None, None, None


def savable(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor that autograd can save for backward: a copy if it was made in inference mode."""
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def _stored_gradients(ctx: Any, grad_output: Tensor | None, keep: bool = False) -> tuple[Tensor | None, ...]:
    """Return the gradient of each argument of ``apply``, of which the last are the logits."""
    needed = ctx.needs_input_grad
    if grad_output is None:
        return (None,) * len(needed)
    saved = ctx.saved_tensors  # once: checkpointing unpacks them only once
    count = len(saved) // 2
    results: list[Tensor | None] = [None] * (len(needed) - count)
    for want, gradient, norm in zip(needed[-count:], saved[:count], saved[count:], strict=True):
        results.append(scale_stored(gradient, grad_output, norm, ctx.backend, keep) if want else None)
    return tuple(results)


def scale_stored(gradient: Tensor, grad_output: Tensor, norm: Tensor, backend: str, keep: bool = False) -> Tensor:
    """Return the stored gradient times the incoming one, in place if nobody can ask for the stored one again."""
    transforms.refuse_double_backward()
    compiling = torch.compiler.is_compiling()
    if not compiling and transforms.wraps_values(grad_output):
        return _scaled(gradient, grad_output, norm)
    if compiling or keep:  # an exported graph, where it is kept, may have been compiled
        return ops.scale_gradient_compiled(gradient, grad_output, norm, backend)  # type: ignore[no-any-return]
    # Kernels scale rows one after the other, and a hook of saved tensors may return another layout.
    if torch._C._autograd._get_current_graph_task_keep_graph() or not gradient.is_contiguous():
        return ops.scale_gradient(gradient, grad_output, norm, backend)  # type: ignore[no-any-return]
    if _is_one(grad_output) and gradient.dtype != torch.float16:
        return gradient
    if transforms.plain(grad_output) and type(gradient) is Tensor and transforms.unobserved():
        backends.get(backend).scale_gradient(gradient, grad_output, norm, gradient)
    else:
        ops.scale_gradient_(gradient, grad_output, norm, backend)
    return gradient


def _is_one(grad_output: Tensor) -> bool:
    """Whether an incoming CPU scalar is 1. Reading it costs nothing there; on a GPU the kernel checks instead."""
    if grad_output.dim() != 0 or grad_output.device.type != "cpu":
        return False
    # Under FakeTensorMode there is no value, and a recorded backward must not take this value for every call.
    return type(grad_output) is Tensor and transforms.dispatch_modes() == 0 and grad_output.item() == 1.0


def _scaled(gradient: Tensor, grad_output: Tensor, norm: Tensor) -> Tensor:
    """Scale as the kernels do, for an incoming gradient that vmap batches (is_grads_batched, jacobian's vectorize) or
    that has a tangent."""
    scaled = gradient * (grad_output * norm).reshape(*grad_output.shape, 1)
    return torch.where(gradient == 0, gradient, scaled.to(gradient.dtype))


class OpCall(NamedTuple):
    """A call of an op of :data:`fused_kd.ops.LOSS_OPS`. The first of its ``arguments`` are the logits, and ``wanted``
    says which of them get a gradient. With ``saved`` the backward pass computes it from these: see :class:`_DistRows`.
    """

    op: Any
    arguments: Sequence[Any]
    wanted: Sequence[bool]
    saved: tuple[Tensor, Tensor, Tensor] | None = None


def op_call(
    name: str,
    logits: tuple[Tensor, ...],
    inputs: tuple[Any, ...],
    hyper: list[float],
    options: tuple[Any, ...],
    backend: str,
    saved: tuple[Tensor, Tensor, Tensor] | None = None,
) -> OpCall:
    """Return the call for checked rows. ``hyper`` are the fields of :class:`fused_kd.core.options.HyperParameters`.
    ``inputs`` are the op's arguments between the logits and these, and ``options`` those up to the ones that say which
    gradients it computes."""
    wanted = [tensor.requires_grad and torch.is_grad_enabled() for tensor in logits]
    op, numbers = choose_op(ops.LOSS_OPS[name], hyper)
    computed = wanted if saved is None else [False]
    return OpCall(op, (*logits, *inputs, numbers, *options, *computed, backend), wanted, saved)


def run(call: OpCall, want_parts: bool) -> tuple[Tensor, Tensor | None]:
    """Return the loss and, if wanted, its stacked parts; differentiable in the logits."""
    op, arguments, wanted, saved = call
    logits, further = arguments[: len(wanted)], arguments[len(wanted) :]
    transforms.refuse(*logits)
    if transforms.is_exporting():
        transforms.refuse_onnx()
        op = ops.EXPORTED_OPS[op]  # an export keeps only ops, so this one has an autograd kernel of its own
    elif saved is None and (function := ops.function_for(op, arguments)) is not None:
        return run_function(function, arguments, len(wanted) if any(wanted) else 0, want_parts)
    elif any(wanted):
        if saved is not None:
            return _DistRows.apply(*logits, op, saved, further)[:2]  # type: ignore[no-any-return,no-untyped-call]
        result = _FusedLoss.apply(op, want_parts, further, *each_once(logits))  # type: ignore[no-untyped-call]
        return result if want_parts else (result, None)
    return op(*arguments)[:2]  # type: ignore[no-any-return]


# The C++ apply. The one of torch.autograd.Function looks for transforms first.
_apply: Any = super(torch.autograd.Function, _FusedLoss).apply


def run_function(
    function: Callable[..., Any], arguments: Sequence[Any], gradients: int, want_parts: bool
) -> tuple[Tensor, Tensor | None]:
    """As :func:`run`, with an op's function in place of the op. The first ``gradients`` of the arguments are logits
    that may get one; with 0 none does."""
    if not gradients:
        with torch.no_grad():
            loss, parts, *_ = function(*arguments)
        return loss, parts if want_parts else None
    result = _apply(function, want_parts, arguments[gradients:], *arguments[:gradients])
    return result if want_parts else (result, None)


def each_once(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return the tensors, but views of those that came before, as a head's weight that two heads share: the compiler
    gives a Function no tensor twice."""
    if len(tensors) == 1 or not torch.compiler.is_compiling():
        return tensors
    return [
        each.view_as(each) if each is not None and any(each is other for other in tensors[:place]) else each
        for place, each in enumerate(tensors)
    ]


def choose_op(twins: tuple[Any, Any], hyper: list[float]) -> tuple[Any, list[float] | Tensor]:
    """Return the op to call, and the hyper-parameters in its form: a tensor if they may change in the graph that is
    being compiled.

    A float is a constant of a compiled graph until a call has another value. Then the graph is compiled once more, with
    a symbol in its place.
    """
    op, scheduled = twins
    if torch.compiler.is_compiling():
        # This adds no guard. A comparison would not do: guards of the range checks settle it even for a symbol.
        from torch.fx.experimental.symbolic_shapes import has_static_value

        for value in hyper:
            if not has_static_value(value):
                one = torch.ones((), dtype=torch.float64, device="cpu")
                return scheduled, torch.stack([one * each for each in hyper])
    return op, hyper


def uskd_batch_sums(student_logits: Tensor, target: Tensor, square: bool, ignore_index: int, backend: str) -> Tensor:
    """Return the sums that couple the rows of USKD; see :func:`fused_kd.reference.uskd_batch_sums`."""
    transforms.refuse(student_logits)
    return ops.uskd_batch_sums(student_logits.detach(), target, square, ignore_index, backend)  # type: ignore[no-any-return]


class _ExportedLoss(torch.autograd.Function):
    """The autograd of any op in an exported graph, written without regard to the time of a call."""

    @staticmethod
    def forward(ctx: Any, op: Any, further: tuple[Any, ...], *logits: Tensor) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op(*logits, *further)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*outputs[2:])
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.backend = further[-1]
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _stored_gradients(ctx, grad_output, keep=True)  # not in place: the stored gradients are outputs


def _autograd_of(name: str, op: Any) -> Any:
    """Return the autograd kernel of ``op``, the exported form of :data:`fused_kd.ops.LOSS_OPS` ``[name]``."""
    # Its results are the loss, the parts, the gradients and their norms; its last arguments say which to compute.
    wanted = len(op._schema.returns) // 2 - 1

    def kernel(*arguments: Any) -> Any:
        logits, backend = arguments[:wanted], arguments[-1]
        transforms.refuse(*logits)
        need = [torch.is_grad_enabled() and tensor.requires_grad for tensor in logits]
        if not any(need):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments)
        if name == "row_loss":
            student_logits, teacher_logits, target, _, loss, hyper, *_, reduction, _, _ = arguments
            # While a graph is recorded, a schedule has no value.
            known = not isinstance(hyper, Tensor)
            coupled = has_column_term(loss, HyperParameters._make(hyper) if known else None)
            if coupled and reduction == "none":
                further, saved = (*arguments[1:-2], False, backend), (student_logits, teacher_logits, target)
                return _DistRows.apply(student_logits, op, saved, further)  # type: ignore[no-untyped-call]
        # The export may have seen logits that did not require grad.
        further = (*arguments[wanted : -1 - wanted], *need, backend)
        return _ExportedLoss.apply(op, further, *logits)  # type: ignore[no-untyped-call]

    return kernel


for _name, _twins in ops.LOSS_OPS.items():
    for _op in map(ops.EXPORTED_OPS.__getitem__, _twins):
        ops.implement_autograd(_op, _autograd_of(_name, _op))
