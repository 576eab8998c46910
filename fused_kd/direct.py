"""Direct calls of the C++ core, for plain CPU tensors or a top-k teacher of such.

A loss first tries a direct call, with unchecked arguments; on a GPU it tries :mod:`fused_kd.repeated`. For any other
call :func:`loss` returns None, and the loss goes through :mod:`fused_kd.ops`: anything compiled, recorded, transformed
or wrong, other sources and devices, row weights, and ``reduction="none"``. Both run the same kernels.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_kd import repeated
from fused_kd.autograd import scale_stored
from fused_kd.backends import native
from fused_kd.backends.topk import is_fused
from fused_kd.core.catalogue import NUMBERS, REST_NUMBERS, as_run, parts_of
from fused_kd.sources import TopK

Parts = TypeVar("Parts", bound=tuple[Tensor, ...])

_loss, _scale = native.direct_loss, native.direct_scale
_ONE = torch.ones((), device="cpu")


class _Loss(torch.autograd.Function):
    """Gives autograd the gradients that the core has computed, one for each of ``logits``, or None if not wanted."""

    @staticmethod
    def forward(ctx: Any, outputs: tuple[Any, ...], *logits: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*outputs[2:])
        return outputs[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors
        if grad_output is None:
            return None, *(None for _ in stored)
        return None, *(None if gradient is None else _scaled(gradient, grad_output) for gradient in stored)


# The C++ apply. The one of torch.autograd.Function looks for transforms first, and an ordinary call has none.
_apply: Any = super(torch.autograd.Function, _Loss).apply


def _scaled(gradient: Tensor, grad_output: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and _scale(
        gradient, grad_output, native.instruction_set, torch.get_num_threads()
    ):
        return gradient
    return scale_stored(gradient, grad_output, _ONE, "native")


def loss(
    name: str,
    parts_type: type[Parts],
    tensors: tuple[Any, Any, Any],
    numbers: dict[str, float],
    settings: dict[str, Any],
    common: tuple[Any, ...],
) -> Tensor | tuple[Tensor, Parts] | None:
    """Return the loss or, if wanted, the loss and its parts; None if the call is not ordinary.

    ``tensors`` are the student's logits, other logits and the target. ``numbers`` are the hyper-parameters,
    ``settings`` the loss's other options, and ``common`` the options that all losses take.
    """
    if torch.compiler.is_compiling():
        return None
    run = name
    if name == "js":
        if not isinstance(numbers["beta"], float) and type(numbers["beta"]) is not int:
            return None  # the checks handle anything else
        run = as_run(name, numbers["beta"])
    if type(tensors[1]) is TopK:
        kept = tensors[1]
        # The checks handle Jensen–Shannon with beta = 1, which not every rest has.
        if type(kept.rest) is not str or not is_fused(run, kept.rest) or (run == "js" and numbers["beta"] == 1):
            return None
        tensors = tensors[0], (kept.log_probs, kept.indices, REST_NUMBERS[kept.rest]), tensors[2]
    outputs: Any = None
    if _loss is not None:
        which, threads = NUMBERS.get(run, run), torch.get_num_threads()
        outputs = _loss(which, tensors, numbers, settings, common, native.instruction_set, threads)
    if type(outputs) is tuple:
        gradients = len(outputs) - 2  # one for each logits, or none at all
        value, stacked = _apply(outputs, *tensors[:gradients]) if gradients else outputs[0], outputs[1]
    elif outputs is None and repeated.on_gpu(tensors[0]):
        found = repeated.loss(name, tensors, numbers, settings, common)
        if found is None:
            return None
        value, stacked = found
    else:
        return outputs  # type: ignore[no-any-return]  # the loss alone, or None
    return value if stacked is None else (value, parts_type(*parts_of(name, stacked)))
