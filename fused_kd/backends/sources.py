"""A row loss of sources that are not two matrices of logits: a loop over chunks of rows around the kernels.

For each chunk the logits of heads are made, the rows' loss and gradient computed, and that stored, or multiplied into
the gradients of a head. Where processes share the classes the kernels run in stages, between which they exchange what
they have found of each row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from fused_kd.backends import shards, staged
from fused_kd.backends.heads import Gradients, Products, room
from fused_kd.core.options import Options
from fused_kd.core.source_rows import SourceRows, Span
from fused_kd.reference import accumulation_dtype

__all__ = ["CHUNK_BYTES", "Asked", "room", "run"]


#: Bytes, by type of device, that the logits of a chunk of rows and their gradient may take where heads make them.
CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 1 << 30}


class Asked(NamedTuple):
    """What a run is of, beside its sources and options."""

    target: Tensor  # (N,) int64, or (N, columns) probabilities
    factors: Tensor | None  # (2, N) float64: of a row's parts, and of its gradient
    span: Span
    chunk_rows: int  # 0 for as many as the budget allows
    wanted: tuple[bool, ...]  # the gradient of the logits or hidden states, of the weight, of the bias
    compute: torch.dtype | None  # of the products, where autocast says


def run(
    kernels: Any, student: SourceRows, teacher: SourceRows | None, asked: Asked, options: Options
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss of each row, (N,), its parts, (3, N), and the gradients that are wanted, empty where they are not."""
    values = student.values
    dtype = accumulation_dtype(values, values if teacher is None else teacher.values)
    rows, columns = len(values), _columns(student, asked.span)
    loss, parts = values.new_empty(rows, dtype=dtype), values.new_empty((3, rows), dtype=dtype)
    product = None if student.weight is None else Products(student, columns, dtype, asked.compute)
    into = None if product is None else Gradients(student, asked.wanted, dtype)
    of_teacher = _maker(teacher, columns, dtype, asked.compute)
    step = asked.chunk_rows or _chunk_rows(student, teacher, shards.rows_of_chunks(asked.span, columns), dtype)
    at_once = product is None and step >= rows > 0  # what the kernels give is kept as it is
    stored = [] if product is not None else room(student, (asked.wanted[0] and not at_once, False, False), dtype)
    exchange = shards.Exchange(asked.span, columns) if asked.span.group else None
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        logits = values[start:stop] if product is None else product.logits(start, stop)
        if logits.dtype == torch.float16:
            logits = logits.to(dtype)  # whose gradient is kept in that
        found = _rows(kernels, logits, of_teacher(start, stop), asked, (start, stop), options, exchange)
        loss[start:stop], parts[:, start:stop], gradient = found
        if not any(asked.wanted):
            continue
        if at_once:
            stored[0] = gradient
        elif product is None or into is None:
            stored[0][start:stop] = gradient
        else:
            product.take(gradient, logits, start, stop, into)
    if into is None:
        return loss, parts, stored
    if asked.span.group and into.hidden is not None:
        # Each process has what its classes add to the gradient of the hidden states, which are the same on all.
        distributed.all_reduce(into.hidden, group=shards.group_of(asked.span))
    return loss, parts, into.stored(student)


def _chunk_rows(student: SourceRows, teacher: SourceRows | None, columns: int, dtype: torch.dtype) -> int:
    """All rows where no head is, else as many as the budget allows, in eights, which suit the products."""
    heads = [each for each in (student, teacher) if each is not None and each.weight is not None]
    rows = len(student.values)
    if not heads:
        return max(rows, 1)
    budget = CHUNK_BYTES.get(student.values.device.type, CHUNK_BYTES["cuda"])
    fitting = budget // (columns * dtype.itemsize * (1 + len(heads)))
    return max(1, fitting // 8 * 8 or fitting)


def _columns(student: SourceRows, span: Span) -> int:
    """How many of a row's classes are at hand."""
    given = student.values.shape[1] if student.weight is None else student.weight.shape[0]
    return given if span.group else min(given, span.num_classes)


def _maker(
    teacher: SourceRows | None, columns: int, dtype: torch.dtype, compute: torch.dtype | None
) -> Callable[[int, int], Tensor | None]:
    """What gives the teacher's logits of a chunk."""
    if teacher is None:
        return lambda start, stop: None
    if teacher.weight is None:
        return lambda start, stop: teacher.values[start:stop]
    return Products(teacher, columns, dtype, compute).logits


def _rows(
    kernels: Any,
    logits: Tensor,
    teacher: Tensor | None,
    asked: Asked,
    which: tuple[int, int],
    options: Options,
    exchange: shards.Exchange | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row of a chunk, its parts, and the gradient of its logits."""
    start, stop = which
    target = asked.target[start:stop]
    factors = None if asked.factors is None else asked.factors[:, start:stop].contiguous()
    if exchange is None:
        loss, parts, gradient, _ = kernels.row_loss(logits, teacher, target, factors, None, options)
        return loss, parts, gradient
    span = asked.span
    labels = target if target.is_floating_point() else None
    if labels is not None:
        likeliest = exchange([staged.likeliest(labels, span.first_class)])
        target = staged.likeliest_of_all(likeliest)
    piece = staged.Piece(logits, teacher, labels, target, span.first_class, span.num_classes)
    parts, (gradient,) = staged.run(kernels, [piece], options, factors, exchange)
    return parts.sum(0), parts, gradient
