"""What the fused kernels cannot do (second derivatives, torch.func, tracers), and where values cannot be read.

A kernel computes a gradient and keeps nothing else. So nothing is left to compute a second derivative or a tangent
from, and no graph records the kernel's arithmetic. Such a request raises an error, because autograd alone would return
0 or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_REFERENCE = "use backend='reference', which is eager PyTorch"
DOUBLE_BACKWARD = (
    "fused_kd: the fused losses do not support double backward (create_graph=True, and so hessian, hvp, vhp and jvp of "
    f"torch.autograd.functional); {_REFERENCE}"
)
_FUNCTORCH = (
    "fused_kd: torch.func transforms (and vectorize=True of torch.autograd.functional, where it transforms the loss "
    f"itself) cannot transform the fused kernels; {_REFERENCE}"
)
_FORWARD_MODE = f"fused_kd: the fused losses do not support forward-mode differentiation; {_REFERENCE}"
_TRACED = (
    "fused_kd: torch.jit.trace, and torch.onnx.export with dynamo=False, which uses it, cannot record the fused "
    f"kernels; {_REFERENCE}"
)
_RECORDED = (
    "fused_kd: autograd cannot differentiate a fused kernel in a recorded graph other than one of torch.export; "
    f"{_REFERENCE}"
)
_ONNX = f"fused_kd: torch.onnx.export has no operators for the fused kernels; {_REFERENCE}"
_NO_RANKS = (
    ". USKD and Zipf's label smoothing cannot be exported at all: ONNX lacks the operators that rank the classes"
)


_AUTOGRAD = torch._C.DispatchKey.AutogradCPU

# Looked up once, because each call of a loss calls them.
_functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_is_tracing: Callable[[], bool] = torch._C._is_tracing
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_is_profiled: Callable[[], bool] = torch._C._autograd._profiler_enabled
#: With one of these PyTorch must see an op: a torch.func transform, torch.jit's tracer, a mode, or a profiler.
OBSERVERS = (_functorch_active, _is_tracing, dispatch_modes, _is_profiled)
_is_legacy_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def _special() -> bool:
    """Whether a torch.func transform, forward-mode differentiation or torch.jit's tracer is active."""
    return _functorch_active() or forward_ad._current_level >= 0 or _is_tracing()


def unobserved() -> bool:
    """Whether nothing records or transforms tensor operations, so that a call of an op only calls its function."""
    return not (torch.compiler.is_compiling() or _special() or dispatch_modes() or _is_profiled())


def plain(tensor: Any) -> bool:
    """Whether this is a Tensor, not a subclass, whose memory holds its values, and which has strides."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_nested:
        return False
    return not (tensor.is_neg() or tensor._is_zerotensor())


def _onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


# The compiler must call these while it traces, when the transforms of the traced code are active. This is what
# torch.compiler.assume_constant_result does; the decorator itself imports the whole compiler.
_special._dynamo_marked_constant = True  # type: ignore[attr-defined]
_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse(*logits: Tensor) -> None:
    """Raise a RuntimeError if an active transform would differentiate these logits in a way no fused kernel can."""
    if _special():
        _refuse(logits)


def _refuse(logits: tuple[Tensor, ...]) -> None:
    if torch.compiler.is_compiling():
        # Without fullgraph=True, this leaves the call to eager PyTorch, which runs the exact checks below.
        raise RuntimeError(f"{_FUNCTORCH}. {_FORWARD_MODE}")
    if _functorch_active():
        raise RuntimeError(_FUNCTORCH)
    if _is_tracing():
        raise RuntimeError(_TRACED + (_NO_RANKS if _onnx_export() else ""))
    # The compiler would see its own tensors here, without the tangents of these.
    torch.compiler.disable(_refuse_tangents)(logits)  # type: ignore[no-untyped-call]


def _refuse_tangents(tensors: tuple[Tensor, ...]) -> None:
    if any(map(_has_tangent, tensors)):
        raise RuntimeError(_FORWARD_MODE)


def is_exporting() -> bool:
    """As torch.compiler.is_exporting, which PyTorch 2.11's compiler takes for True in every graph."""
    return torch.compiler._is_exporting_flag


def refuse_onnx() -> None:
    """Raise a RuntimeError in an export to ONNX through torch.export."""
    if _onnx_export():
        raise RuntimeError(_ONNX + _NO_RANKS)


def refuse_double_backward() -> None:
    """Raise a RuntimeError in the backward of a Function if create_graph=True. The compiler, which traces a backward
    without gradients, needs :func:`refuse_create_graph`; compiled autograd traces it with those of create_graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(DOUBLE_BACKWARD)


def refuse_create_graph() -> None:
    """Raise a RuntimeError in an op of a backward pass with create_graph=True.

    A compiled graph's backward then runs as the forward of another function. There PyTorch disables the gradient and
    also forward mode, which an ordinary backward keeps enabled.
    """
    if torch._C._current_graph_task_id() == -1:
        return
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    if torch.is_grad_enabled() or (keeps_graph and not torch._C._is_fwd_grad_enabled()):
        raise RuntimeError(DOUBLE_BACKWARD)


def refuse_recorded(*tensors: Tensor) -> None:
    """Raise a RuntimeError in an op of a recorded graph, such as make_fx's, if its inputs need a gradient.

    Autograd would give None for that gradient. The functions of :mod:`fused_kd.autograd` never call an op this way.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(_RECORDED)
    # Where autograd is excluded, as in compiled code, no tangents are visible.
    if forward_ad._current_level >= 0 and not torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD):
        _refuse_tangents(tensors)


def wraps_values(grad_output: Tensor) -> bool:
    """Whether an incoming gradient is batched, by either vmap, or has a tangent."""
    return _is_legacy_batched(grad_output) or _functorch_active() or tangents_exist()


def tangents_exist() -> bool:
    """Whether forward-mode differentiation is active, so that a tensor may have a tangent."""
    return forward_ad._current_level >= 0


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def carries_gradient(tensor: Tensor) -> bool:
    """Whether a tensor takes part in backward or forward differentiation."""
    return tensor.requires_grad or _has_tangent(tensor)


def readable(tensor: Tensor) -> bool:
    """Whether a check may read a tensor's values: they exist, on the CPU, and nothing records or batches the tensor."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or _is_tracing():
        return False
    modes = torch._C._TorchDispatchModeKey
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY)):
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return type(tensor) is Tensor or not torch._subclasses.fake_tensor.is_fake(tensor)
