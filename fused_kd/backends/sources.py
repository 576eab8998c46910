"""The losses of sources: a loop over chunks of rows around the kernels.

Each chunk computes the logits of heads, then the rows' loss and gradient. The gradient is stored, or multiplied into
the gradients of a head. If the classes are sharded, the kernels run in stages, with an exchange after each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from fused_kd.backends import native, shards, staged, topk
from fused_kd.backends.heads import Matrix, Products, maker
from fused_kd.core.options import Options
from fused_kd.core.rows import Piece, SourceRows, Span, TopKPiece
from fused_kd.reference import accumulation_dtype

#: The most bytes, by device type, for the logits of a head's chunk of rows and their gradient.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
_NONE = (False, False, False)


class Placement(NamedTuple):
    """The classes of this process, and how to cut the rows into chunks."""

    span: Span
    chunk_rows: int  # 0 for as many as the budget allows
    compute: torch.dtype | None  # of a head's products under autocast


class Task(NamedTuple):
    """Arguments of a run besides its sources and options."""

    target: Tensor  # (N,) int64, or (N, columns) probabilities
    factors: Tensor  # (2, N) float64: of a row's parts, and of its gradient
    wanted: Sequence[bool]  # gradients of the logits or hidden states, of the weight, of the bias
    placement: Placement


def run(
    kernels: Any, student: SourceRows, teacher: SourceRows | None, task: Task, options: Options
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the loss of each row, (N,), its parts, (3, N), and the gradients, empty where not wanted."""
    values, span, count = student.values, task.placement.span, student.values.shape[0]
    dtype = accumulation_dtype(values, values if teacher is None else teacher.values)
    columns = _columns(student, span)
    loss, parts = values.new_empty(count, dtype=dtype), values.new_empty((3, count), dtype=dtype)
    student_maker = maker(student, task.wanted, dtype, columns, task.placement.compute)
    top_k, most = False, shards.rows_of_chunks(span, columns)
    teacher_maker: Matrix | Products | topk.DenseRows | None = None
    if teacher is not None and teacher.indices is not None:
        shared_labels = bool(span.group) and task.target.is_floating_point()
        top_k = topk.is_fused(options.loss, teacher.rest) and not shared_labels
        if not top_k:
            topk.check_indices(teacher.indices, span.num_classes, task.factors[0] != 0, teacher.rest)
            own = slice(span.first_class, span.first_class + columns)
            teacher_maker, most = topk.DenseRows(teacher, dtype, span.num_classes, own), span.num_classes
    elif teacher is not None:
        teacher_maker = maker(teacher, _NONE, dtype, columns, task.placement.compute)
    # Not in Triton: a warp of the looped kernel may still read logits that another warp has overwritten.
    in_place = kernels is native and student_maker.in_place and not span.group and not top_k
    options = options._replace(in_place=in_place, padding=student_maker.padding)
    exchange = shards.Exchange(span, columns) if span.group else None
    for rows in _chunks(values, (student_maker, teacher_maker), int(not in_place), most, task.placement.chunk_rows):
        logits = student_maker.logits(rows)
        other = teacher if teacher_maker is None else teacher_maker.logits(rows)
        of_rows, parts_of_rows, gradient = _rows(kernels, logits, other, task, rows, options, exchange)
        if rows == slice(0, count):
            loss, parts = of_rows, parts_of_rows  # not copied: on a GPU each operation is a launch
        else:
            loss[rows], parts[:, rows] = of_rows, parts_of_rows
        if any(task.wanted):
            student_maker.take(gradient, logits, task.factors[1, rows], rows)
        del logits, other, gradient  # free them before the next chunk
    if exchange is not None and isinstance(student_maker, Products) and student_maker.hidden_gradient is not None:
        # The hidden states are the same on all processes. Each process has its classes' part of their gradient.
        distributed.all_reduce(student_maker.hidden_gradient, group=shards.group_of(span))
    return loss, parts, student_maker.gradients()


def uskd_batch_sums(
    kernels: Any, student: SourceRows, target: Tensor, placement: Placement, settings: tuple[bool, int]
) -> Tensor:
    """Return the sums that couple the rows of USKD, by a pass over the chunks before the loss. ``settings`` are square
    and ignore_index."""
    values, columns = student.values, _columns(student, placement.span)
    student_maker = maker(student, _NONE, accumulation_dtype(values), columns, placement.compute)
    sums = values.new_zeros(3, dtype=torch.float64)
    for rows in _chunks(values, (student_maker,), 0, columns, placement.chunk_rows):
        sums += kernels.uskd_batch_sums(student_maker.logits(rows), target[rows], *settings)
    return sums


def run_uskd(
    kernels: Any, student: SourceRows, weak: SourceRows, task: Task, batch_sums: Tensor, options: Options
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As :func:`run`, for USKD: four parts, and the gradients of both sources, three each."""
    values, dtype = student.values, accumulation_dtype(student.values, weak.values)
    columns = _columns(student, task.placement.span)
    loss, parts = values.new_empty(len(values), dtype=dtype), values.new_empty((4, len(values)), dtype=dtype)
    batch_sums = batch_sums.contiguous()  # a hook of saved tensors may return another layout
    both = [
        maker(each, wanted, dtype, columns, task.placement.compute)
        for each, wanted in ((student, task.wanted[:3]), (weak, task.wanted[3:]))
    ]
    for rows in _chunks(values, both, 2, columns, task.placement.chunk_rows):
        logits = [each.logits(rows) for each in both]
        factors = task.factors[:, rows].contiguous()
        loss[rows], parts[:, rows], *gradients, _, _ = kernels.uskd(
            *logits, task.target[rows], batch_sums, factors, options
        )
        for each, want, gradient, of in zip(both, options.wanted, gradients, logits, strict=True):
            if want:
                each.take(gradient, of, factors[1], rows)
        del logits, gradients  # free them before the next chunk
    return loss, parts, [*both[0].gradients(), *both[1].gradients()]


def _chunks(
    values: Tensor,
    makers: Sequence[Matrix | Products | topk.DenseRows | None],
    gradients: int,
    columns: int,
    chunk_rows: int,
) -> Iterator[slice]:
    """Yield the rows of each chunk. Beside the logits that are made, a chunk needs memory for ``gradients`` matrices of
    that size."""
    made = [each for each in makers if each is not None and not isinstance(each, Matrix)]
    matrices = len(made) + gradients
    dtypes = [each.chunk.dtype if isinstance(each, Products) else each.dtype for each in made] or [values.dtype]
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    step = chunk_rows or fitting_rows(values, len(made), matrices * columns, widest)
    for start in range(0, len(values), step):
        yield slice(start, min(start + step, len(values)))


def fitting_rows(values: Tensor, made: int, columns: int, dtype: torch.dtype) -> int:
    """Return the rows of a chunk: all if no logits are ``made``, else as many as the budget allows for this number of
    ``columns``. Multiples of 16 suit the products."""
    if not made:
        return max(len(values), 1)
    budget = CHUNK_BYTES.get(values.device.type, CHUNK_BYTES["cuda"])
    rows = int(budget // (columns * dtype.itemsize))
    return max(1, rows // 16 * 16 or rows)


def _columns(student: SourceRows, span: Span) -> int:
    """Return how many of a row's classes this process has."""
    given = student.values.shape[1] if student.weight is None else student.weight.shape[0]
    return given if span.group else min(given, span.num_classes)


def _rows(
    kernels: Any,
    logits: Tensor,
    teacher: Tensor | SourceRows | None,
    task: Task,
    rows: slice,
    options: Options,
    exchange: shards.Exchange | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each row of a chunk, its parts, and the gradient of its logits. ``teacher`` has the logits of
    the chunk, or is a top-k teacher of all rows."""
    target, factors, span = task.target[rows], task.factors[:, rows].contiguous(), task.placement.span
    if isinstance(teacher, SourceRows):
        assert teacher.indices is not None
        kept = (teacher.values[rows], teacher.indices[rows], teacher.rest)
        here = None if exchange is None else TopKPiece(span.first_class, span.num_classes, exchange)
        try:
            loss, parts, gradient = topk.row_loss(kernels, logits, *kept, target, factors, options, here)
        except (IndexError, ValueError):
            # The kernel counts the rows of its chunk.
            topk.check_indices(teacher.indices, span.num_classes, task.factors[0] != 0, teacher.rest)
            raise
        return loss, parts, logits if gradient is None else gradient
    if exchange is None:
        loss, parts, gradient, _ = kernels.row_loss(logits, teacher, target, factors, None, options)
        return loss, parts, gradient
    labels = target if target.is_floating_point() else None
    if labels is not None:
        likeliest = exchange([staged.likeliest(labels, span.first_class)])
        target = staged.likeliest_of_all(likeliest)
    piece = Piece(logits, teacher, labels, target, span.first_class, span.num_classes)
    parts, (gradient,) = staged.run(kernels, [piece], options, factors, exchange)
    return parts.sum(0), parts, gradient
