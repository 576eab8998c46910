"""A row loss with a top-k teacher; :mod:`fused_kd.reference.topk` defines it.

No full row of the teacher is stored, and the gradient is the only full row of the student. A backend's ``topk_loss``
computes it: the C++ core in one visit to each row, Triton with four kernels, two of which walk over the student's
logits.
If the classes are sharded, each process visits its columns twice. After the first visit the processes exchange
``(5 + k, N)`` float64. For the classes that are neither kept nor the target these are the largest logit, the sums of
exponentials relative to it at T and at 1, and the sum of logits. Then come the logits of the target and of the kept
classes, 0 in a process that does not have them.

For some losses and rests there is no such kernel. Where the loss equals the ordinary one with a dense teacher,
:class:`DenseRows` makes that teacher's logits for a chunk of rows, and the ordinary kernel takes them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_kd.core.catalogue import ROW_LOSSES, as_run
from fused_kd.core.options import Options, empty_gradient
from fused_kd.core.row_errors import kept_error
from fused_kd.core.rows import SourceRows, TopKPiece
from fused_kd.core.transforms import readable
from fused_kd.reference import accumulation_dtype
from fused_kd.reference.topk import check_rest, dense_teacher, find_kept, wrong_indices

#: The rests with which a loss is the ordinary one, with a dense teacher.
DENSE = ("renormalize", "uniform")


class DenseRows:
    """A top-k teacher made dense: its logits of this process's ``columns`` of ``num_classes``, a chunk of rows at a
    time."""

    def __init__(self, teacher: SourceRows, dtype: torch.dtype, num_classes: int, columns: slice) -> None:
        self.teacher, self.dtype, self.num_classes, self.columns = teacher, dtype, num_classes, columns

    def logits(self, rows: slice) -> Tensor:
        values, indices = self.teacher.values[rows].to(self.dtype), self.teacher.indices
        assert indices is not None
        indices = indices[rows]
        kept = find_kept(values, indices, torch.zeros_like(indices[:, :1]), self.num_classes)
        whole = dense_teacher(kept, self.teacher.rest, self.num_classes) * kept.valid.unsqueeze(1)
        return whole[:, self.columns]


def is_fused(loss: str, rest: str) -> bool:
    """Whether there is a kernel for the kept classes of a loss and a rest: for all but probability targets of sharded
    classes."""
    return loss in ROW_LOSSES and rest in ROW_LOSSES[loss].rests


def check_indices(indices: Tensor, num_classes: int, counted: Tensor, rest: str) -> None:
    """Raise if a row that counts has a class out of range, a class twice, or no class to renormalise. This is for the
    reference, and for the error of a chunk of rows. It checks only readable values; the kernels check on their own."""
    if not readable(indices):
        return
    wrong = wrong_indices(indices, num_classes) & counted
    if rest == "renormalize":
        wrong |= (indices < 0).all(dim=1) & counted
    if bool(wrong.any()):
        raise kept_error(indices, int(wrong.to(torch.uint8).argmax()), num_classes)


def merged(found: Tensor, temperature: float) -> Tensor:
    """Merge the results of all processes, (processes, 5 + k, N), to (5 + k, N)."""
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
    piece: TopKPiece | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the loss of each row ``(N,)``, its parts ``(3, N)`` and the student's gradient, None if not wanted.

    ``kernels`` is a backend. Rows are not reduced, whatever ``options`` say. ``factors`` ``(2, N)`` float64 multiply a
    row's loss and parts, and its gradient. A row with a first factor of 0 does not count. With a ``piece``, ``student``
    has the columns of this process; indices and target refer to all classes, and are the same on every process.

    Raises:
        NotImplementedError: The loss has no kernel for this rest, or a ``piece`` has none for probability targets.
        IndexError, ValueError: On the CPU, a target or kept class is out of range, or a class is kept twice in a row.
    """
    options = options._replace(loss=as_run(options.loss, options.hyper.beta))
    loss = options.loss
    check_rest(loss, rest, options.hyper.beta)
    if not is_fused(loss, rest):
        raise NotImplementedError(f"rest: {loss}_loss has no kernel for {rest!r}; take backend='reference'")
    if piece is not None and target.is_floating_point():
        raise NotImplementedError("target: with a top-k teacher of sharded classes the kernels take class indices only")
    if options.standardize:
        raise NotImplementedError("logit_standardization: the kernels have no z-scores of a top-k teacher")
    if student.shape[0] == 0:
        dtype = accumulation_dtype(student, log_probs)
        nothing = student.new_empty((3, 0), dtype=dtype)
        return nothing[0], nothing, empty_gradient(student, options.padding) if options.wanted[0] else None
    if piece is not None:
        stacked, temperature = piece.exchange, options.hyper.temperature
        piece = piece._replace(exchange=lambda own: merged(stacked(own), temperature))
    return kernels.topk_loss(student, log_probs, indices, rest, target, factors, options, piece)  # type: ignore[no-any-return]
