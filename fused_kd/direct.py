"""Ordinary calls, on the CPU and of plain tensors, straight to the C++ core.

A loss asks here first, with unchecked arguments. What is not ordinary gets None, and goes the way of
:mod:`fused_kd.ops`: whatever is compiled, recorded, transformed or wrong, other sources and devices, row weights, loss
by row. Both ways run the same kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_kd.autograd import scale_stored
from fused_kd.backends import native
from fused_kd.core.catalogue import NUMBERS, as_run

_loss, _scale = native.direct_loss, native.direct_scale
_ONE = torch.ones((), device="cpu")


class _Loss(torch.autograd.Function):
    """Gives autograd the gradients that the core has made: of each of ``logits``, None where it is not wanted."""

    @staticmethod
    def forward(ctx: Any, made: tuple[Any, ...], *logits: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*made[2:])
        return made[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors
        if grad_output is None:
            return None, *(None for _ in stored)
        return None, *(None if gradient is None else _scaled(gradient, grad_output) for gradient in stored)


# The C++ apply below that of torch.autograd.Function, which looks for transforms first: none is ordinary.
_apply: Any = super(torch.autograd.Function, _Loss).apply


def _scaled(gradient: Tensor, grad_output: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and _scale(
        gradient, grad_output, native.instruction_set, torch.get_num_threads()
    ):
        return gradient
    return scale_stored(gradient, grad_output, _ONE, "native")


def loss(
    name: str,
    tensors: tuple[Any, Any, Any],
    numbers: dict[str, float],
    settings: dict[str, Any],
    common: tuple[Any, ...],
) -> tuple[Tensor, Tensor | None] | None:
    """The loss and, if wanted, its parts, stacked; None of a call that is not ordinary.

    ``tensors`` are the student's logits, others and the target; ``numbers`` the hyper-parameters, ``settings`` the
    other options of the loss, ``common`` what all losses take.
    """
    if _loss is None or torch.compiler.is_compiling():
        return None
    which = NUMBERS.get(name, name)
    if name == "js" and type(numbers["beta"]) in (float, int):  # what is no number is left to the checks
        which = NUMBERS[as_run(name, numbers["beta"])]
    made = _loss(which, tensors, numbers, settings, common, native.instruction_set, torch.get_num_threads())
    if type(made) is not tuple:
        return None if made is None else (made, None)
    gradients = len(made) - 2  # of each logits, where any is wanted
    return (_apply(made, *tensors[:gradients]) if gradients else made[0]), made[1]
