"""A row loss with a top-k teacher; :mod:`fused_kd.reference.topk` has what it
is.

No row of the teacher is made, and of the student's only the gradient. A backend's ``topk_loss`` does it: the C++ core
in one visit to each row, Triton by four kernels, of which two walk over the student's logits.
Where processes share the classes, each has two visits to its own columns, and what the first has found of all of them,
``(5 + k, N)`` float64, decides the second: the largest logit of the classes that are neither kept nor the target, their
sums of exponentials relative to it at T and at 1, and their sum; then the logits of the target and of the kept classes,
0 where a process does not have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd.core.catalogue import ROW_LOSSES, as_run
from fused_kd.core.options import Options
from fused_kd.reference import accumulation_dtype
from fused_kd.reference.topk import check_rest

#: What a process finds of a row beside the logits of kept classes; csrc/cpu/kernels.h has the same.
FIELDS = 5


class Shared(NamedTuple):
    """Which of the classes are at hand, where several processes share them, and what stacks their findings."""

    first_class: int
    num_classes: int
    exchange: Callable[[list[Tensor]], Tensor]


def is_fused(loss: str, rest: str) -> bool:
    """Whether there is a kernel; the reference serves the others that have a meaning."""
    return loss in ROW_LOSSES and rest in ROW_LOSSES[loss].rests


def merged(found: Tensor, temperature: float) -> Tensor:
    """What all processes have found, (5 + k, N), from that of each, (processes, 5 + k, N)."""
    top, soft, sharp = found[:, :3].unbind(1)
    some = soft != 0
    origin = torch.where(some, top, -math.inf).amax(0)
    origin = torch.where(origin == -math.inf, 0.0, origin)
    down = torch.where(some, top - origin, 0.0)
    sums = [(soft * (down / temperature).exp()).sum(0), (sharp * down.exp()).sum(0)]
    return torch.cat([torch.stack([origin, *sums]), found[:, 3:].sum(0)])


def row_loss(
    kernels: Any,
    student: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    rest: str,
    target: Tensor,
    factors: Tensor | None,
    options: Options,
    shared: Shared | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of each row ``(N,)``, its parts ``(3, N)`` and the student's gradient, None where it is not wanted.

    ``kernels`` is a backend. Rows are not reduced, whatever ``options`` say. ``factors`` ``(2, N)`` float64 multiply a
    row's loss and parts, and its gradient; a row whose first is 0 does not count. With ``shared``, ``student`` has the
    columns of this process; indices and target are among all classes, and the same on every process.

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
        student, log_probs, indices, rest, target, factors, options, shared
    )
    return result
