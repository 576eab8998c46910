"""A row loss with a top-k teacher; :mod:`fused_kd.reference.topk` has what it
is.

No row of the teacher is made, and of the student's only the gradient. A backend's ``topk_loss`` does it: the C++ core
in one visit to each row, Triton by a kernel for what the loss needs of the other classes and one for their gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_kd.core.catalogue import ROW_LOSSES, as_run
from fused_kd.core.options import Options
from fused_kd.reference import accumulation_dtype
from fused_kd.reference.topk import check_rest


def is_fused(loss: str, rest: str, sharded: bool = False) -> bool:
    """Whether there is a kernel, of which none is for classes over processes; the reference serves the others that have
    a meaning."""
    return not sharded and loss in ROW_LOSSES and rest in ROW_LOSSES[loss].rests


def row_loss(
    kernels: Any,
    student: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    rest: str,
    target: Tensor,
    factors: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of each row ``(N,)``, its parts ``(3, N)`` and the student's gradient, None where it is not wanted.

    ``kernels`` is a backend. Rows are not reduced, whatever ``options`` say. ``factors`` ``(2, N)`` float64 multiply a
    row's loss and parts, and its gradient; a row whose first is 0 does not count.

    Raises:
        NotImplementedError: The loss has no kernel for this rest.
        IndexError, ValueError: On the CPU, of a target or a kept class that is none, or one that is twice in a row.
    """
    options = options._replace(loss=as_run(options.loss, options.hyper.beta))
    loss = options.loss
    check_rest(loss, rest, options.hyper.beta)
    if not is_fused(loss, rest):
        raise NotImplementedError(f"rest: {loss}_loss has no kernel for {rest!r}; take backend='reference'")
    if options.standardize:
        raise NotImplementedError("logit_standardization: the kernels have no z-scores of a teacher that is not whole")
    if student.shape[0] == 0:
        dtype = accumulation_dtype(student, log_probs)
        nothing = student.new_empty((3, 0), dtype=dtype)
        return nothing[0], nothing, torch.empty_like(student) if options.wanted[0] else None
    result: tuple[Tensor, Tensor, Tensor | None] = kernels.topk_loss(
        student, log_probs, indices, rest, target, factors, options
    )
    return result
