"""A row loss of sources that are not two matrices of logits: a loop over chunks of rows around the kernels.

For each chunk the logits of heads are made, the rows' loss and gradient computed, and that stored, or multiplied into
the gradients of a head. Where processes share the classes the kernels run in stages, between which they exchange what
they have found of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from fused_kd.backends import native, shards, staged, topk
from fused_kd.backends.heads import Products, maker, room
from fused_kd.core.options import Options
from fused_kd.core.source_rows import SourceRows, Span
from fused_kd.reference import accumulation_dtype

__all__ = ["CHUNK_BYTES", "Asked", "fitting_rows", "room", "run", "run_uskd", "uskd_batch_sums"]


#: Bytes, by type of device, that the logits of a chunk of rows and their gradient may take where heads make them.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}


_NONE = (False, False, False)


class Asked(NamedTuple):
    """What a run is of, beside its sources and options."""

    target: Tensor  # (N,) int64, or (N, columns) probabilities
    factors: Tensor  # (2, N) float64: of a row's parts, and of its gradient
    span: Span
    chunk_rows: int  # 0 for as many as the budget allows
    wanted: Sequence[bool]  # the gradient of the logits or hidden states, of the weight, of the bias
    compute: torch.dtype | None  # of the products, where autocast says


def run(
    kernels: Any, student: SourceRows, teacher: SourceRows | None, asked: Asked, options: Options
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss of each row, (N,), its parts, (3, N), and the gradients that are wanted, empty where they are not."""
    values = student.values
    dtype = accumulation_dtype(values, values if teacher is None else teacher.values)
    rows, columns = len(values), _columns(student, asked.span)
    loss, parts = values.new_empty(rows, dtype=dtype), values.new_empty((3, rows), dtype=dtype)
    of_student = maker(student, asked.wanted, dtype, columns, asked.compute)
    sparse = teacher if teacher is not None and teacher.indices is not None else None
    whole = None if sparse is not None else teacher
    of_teacher = None if whole is None else maker(whole, _NONE, dtype, columns, asked.compute)
    # Of Triton's looped kernel a warp may still read what another has written over.
    over = kernels is native and of_student.over and not asked.span.group and sparse is None
    options = options._replace(over=over)
    heads = sum(isinstance(each, Products) for each in (of_student, of_teacher))
    most = shards.rows_of_chunks(asked.span, columns)
    step = asked.chunk_rows or fitting_rows(values, heads, (heads + (not over)) * most, dtype)
    exchange = shards.Exchange(asked.span, columns) if asked.span.group else None
    for start in range(0, rows, step):
        which = start, stop = start, min(start + step, rows)
        logits = of_student.logits(start, stop)
        other = None if of_teacher is None else of_teacher.logits(start, stop)
        if sparse is not None:
            found = _sparse_rows(kernels, logits, sparse, asked, which, options)
        else:
            found = _rows(kernels, logits, other, asked, which, options, exchange)
        loss[start:stop], parts[:, start:stop], gradient = found
        if any(asked.wanted):
            of_student.take(gradient, logits, asked.factors[1, start:stop] != 0, which)
        del logits, other, gradient, found  # not beside the next chunk's
    if exchange is not None and isinstance(of_student, Products) and of_student.of_hidden is not None:
        # Each process has what its classes add to the gradient of the hidden states, which are the same on all.
        distributed.all_reduce(of_student.of_hidden, group=shards.group_of(asked.span))
    return loss, parts, of_student.gradients()


def uskd_batch_sums(kernels: Any, student: SourceRows, asked: Asked, square: bool, ignore_index: int) -> Tensor:
    """What couples the rows of USKD, which a sweep over the chunks finds before the loss."""
    values, dtype = student.values, accumulation_dtype(student.values)
    columns = _columns(student, asked.span)
    of_student = maker(student, _NONE, dtype, columns, asked.compute)
    sums = values.new_zeros(3, dtype=torch.float64)
    head = int(isinstance(of_student, Products))
    step = asked.chunk_rows or fitting_rows(values, head, columns, dtype)
    for start in range(0, len(values), step):
        logits = of_student.logits(start, start + step)
        sums += kernels.uskd_batch_sums(logits, asked.target[start : start + step], square, ignore_index)
    return sums


def run_uskd(
    kernels: Any, student: SourceRows, weak: SourceRows, asked: Asked, batch_sums: Tensor, options: Options
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As :func:`run`, of USKD: four parts, and the gradients of both, three each."""
    values, dtype = student.values, accumulation_dtype(student.values, weak.values)
    rows, columns = len(values), _columns(student, asked.span)
    loss, parts = values.new_empty(rows, dtype=dtype), values.new_empty((4, rows), dtype=dtype)
    both = [
        maker(each, wanted, dtype, columns, asked.compute)
        for each, wanted in ((student, asked.wanted[:3]), (weak, asked.wanted[3:]))
    ]
    heads = sum(isinstance(each, Products) for each in both)
    step = asked.chunk_rows or fitting_rows(values, heads, (heads + 2) * columns, dtype)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        logits = [each.logits(start, stop) for each in both]
        target, factors = asked.target[start:stop], asked.factors[:, start:stop].contiguous()
        loss[start:stop], parts[:, start:stop], *gradients, _, _ = kernels.uskd(
            *logits, target, batch_sums, factors, options
        )
        for each, want, gradient, of in zip(both, options.wanted, gradients, logits, strict=True):
            if want:
                each.take(gradient, of, factors[1] != 0, (start, stop))
        del logits, gradients  # not beside the next chunk's
    return loss, parts, [*both[0].gradients(), *both[1].gradients()]


def fitting_rows(values: Tensor, heads: int, columns: int, dtype: torch.dtype) -> int:
    """All rows where no head is, else as many of so many ``columns`` as the budget allows, in sixteens, which suit the
    products."""
    if not heads:
        return max(len(values), 1)
    budget = CHUNK_BYTES.get(values.device.type, CHUNK_BYTES["cuda"])
    rows = int(budget // (columns * dtype.itemsize))
    return max(1, rows // 16 * 16 or rows)


def _columns(student: SourceRows, span: Span) -> int:
    """How many of a row's classes are at hand."""
    given = student.values.shape[1] if student.weight is None else student.weight.shape[0]
    return given if span.group else min(given, span.num_classes)


def _sparse_rows(
    kernels: Any, logits: Tensor, teacher: SourceRows, asked: Asked, which: tuple[int, int], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_rows`, of a teacher of whom some classes were kept."""
    rows = slice(*which)
    assert teacher.indices is not None
    kept = (teacher.values[rows], teacher.indices[rows], teacher.rest)
    factors = asked.factors[:, rows].contiguous()
    loss, parts, gradient = topk.row_loss(kernels, logits, *kept, asked.target[rows], factors, options)
    return loss, parts, logits if gradient is None else gradient


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
    factors = asked.factors[:, start:stop].contiguous()
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
