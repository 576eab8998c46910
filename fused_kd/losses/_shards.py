"""Classes that lie on several processes: how :class:`fused_kd.sources.ClassShard` and DTensor become rows with their
span, and the way of the reference, which brings the columns together."""

from __future__ import annotations

import math
import sys
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed

from fused_kd.backends import shards
from fused_kd.core import checks
from fused_kd.core.source_rows import SourceRows, Span
from fused_kd.reference import accumulation_dtype
from fused_kd.sources import ClassShard, Logits, TeacherLogits

Tensors: TypeAlias = "tuple[Logits, TeacherLogits | None, Tensor | None]"


def span_of(name: str, shard: ClassShard, class_dim: int | None) -> Span:
    """The classes of a shard, but for whether they are some: that is said to all processes alike, see
    :func:`fused_kd.backends.shards.check_cover`."""
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            f"{name}: expected no ClassShard while torch.distributed is not initialised; call "
            "torch.distributed.init_process_group first"
        )
    checks.check_index(f"{name}.first_class", shard.first_class)
    checks.check_count(f"{name}.num_classes", shard.num_classes, 2)
    group: Any = distributed.group.WORLD if shard.group is None else shard.group
    checks.check_process_group(f"{name}.group", group)
    if class_dim is not None:
        checks.check_class_dim("class_dim", class_dim)
        if not isinstance(shard.logits, Tensor) or class_dim not in (-1, shard.logits.dim() - 1):
            raise ValueError(f"class_dim: expected None or the last with a ClassShard, got {class_dim}")
    return Span(shard.first_class, shard.num_classes, group.group_name)


def shard_rows(name: str, logits: Tensor) -> Tensor:
    """Checked logits of a shard, (..., width), where a width may be 0, as (N, width)."""
    refuse_dtensor(name, logits)
    logits = checks.check_logits(name, logits)
    return logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])


def check_same(student: Span | None, teacher: Span | None) -> None:
    if student != teacher:
        raise ValueError(
            f"teacher_logits: expected the classes and the group of student_logits, {_said(student)}, got "
            f"{_said(teacher)}"
        )


def _said(span: Span | None) -> str:
    if span is None:
        return "no ClassShard"
    return f"those of {span.num_classes} from {span.first_class} on in group {span.group!r}"


class _Columns(torch.autograd.Function):
    """The columns of all processes, of which each has the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, span: Span) -> Tensor:
        group, (rows, width) = shards.group_of(span), own.shape
        told = shards.gathered(torch.tensor([span.first_class, width, span.num_classes], device=own.device), group)
        spans = told.tolist()
        order = shards.check_cover(spans)
        padded = own.new_zeros(rows, max(each[1] for each in spans))
        padded[:, :width] = own
        found = shards.gathered(padded, group)
        ctx.columns = slice(span.first_class, span.first_class + width)
        return torch.cat([found[rank, :, : spans[rank][1]] for rank in order], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_kd: classes over processes do not support double backward (create_graph=True): each process has "
                "the gradient of its own columns alone"
            )
        return grad[:, ctx.columns].contiguous(), None


class _Shared(torch.autograd.Function):
    """Hidden states that are the same on all processes, and so is their gradient: the sum of what each one's classes
    give."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, span: Span) -> Tensor:
        ctx.span = span
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous().clone()
        distributed.all_reduce(grad, group=shards.group_of(ctx.span))
        return grad, None


def shared_hidden(rows: SourceRows, span: Span | None) -> SourceRows:
    """A head whose hidden states get the sum of the gradients, in the accumulating dtype."""
    if span is None or rows.weight is None:
        return rows
    values: Tensor = _Shared.apply(rows.values.to(accumulation_dtype(rows.values)), span)  # type: ignore[no-untyped-call]
    return rows._replace(values=values)


def all_columns(own: Tensor, span: Span | None) -> Tensor:
    """(N, width) of each process as (N, num_classes), the same on all."""
    return own if span is None else _Columns.apply(own, span)  # type: ignore[no-untyped-call]


def refuse_dtensor(name: str, given: Any) -> None:
    if checks.is_dtensor(given):
        raise TypeError(
            f"{name}: expected Tensors in a Head or a ClassShard, got a DTensor; pass its to_local(), or the logits as "
            "a DTensor without a ClassShard"
        )


def of_dtensors(tensors: Tensors, weight: Tensor | None, class_dim: int | None) -> tuple[Tensors, Tensor | None]:
    """DTensors as their local tensors: of logits whose classes are sharded a :class:`ClassShard` of them."""
    student, teacher, target = tensors
    place = _Place(student, class_dim) if checks.is_dtensor(student) else None
    return (
        (
            _local("student_logits", student, place, place),
            _local("teacher_logits", teacher, place, place),
            _local("target", target, place, None),
        ),
        _local("weight", weight, place, None),
    )


class _Place:
    """Where the student's logits are: their mesh, and which of its dimensions shards the classes, None if none does."""

    def __init__(self, student: Any, class_dim: int | None) -> None:
        tensor = sys.modules["torch.distributed.tensor"]
        self.mesh, self.placements = student.device_mesh, tuple(student.placements)
        self.classes = checks.class_dimension(student, class_dim)
        said = f"got {self.placements}"
        for placement in self.placements:
            if not placement.is_replicate() and type(placement) is not tensor.Shard:
                raise ValueError(
                    "student_logits: expected a DTensor with placements Shard and Replicate; redistribute it, to "
                    f"Shard(-1) where the classes are to stay apart; {said}"
                )
        over = [at for at, placement in enumerate(self.placements) if placement.is_shard(self.classes)]
        if len(over) > 1:
            raise ValueError(
                "student_logits: expected a DTensor with its classes sharded over one dimension of the mesh; "
                f"redistribute it to Replicate() over the others; {said}"
            )
        if not over and any(placement.is_shard() for placement in self.placements):
            raise ValueError(
                "student_logits: expected a DTensor with its classes sharded; where rows alone are, pass "
                f"student_logits.to_local() and the teacher's, for the loss of the rows that are here; {said}"
            )
        if over and self.classes != student.dim() - 1:
            raise ValueError(
                "class_dim: expected the last dimension for a DTensor whose classes are sharded, got "
                f"{class_dim}; move it there"
            )
        if self.mesh.get_coordinate() is None:
            raise ValueError("student_logits: expected a DTensor of a mesh that this process belongs to")
        self.over = over[0] if over else None

    def wanted(self, whole_rows: bool) -> tuple[Any, ...]:
        """Placements as the student's, or of what has no classes, Replicate() instead of those over the classes."""
        replicate = sys.modules["torch.distributed.tensor"].Replicate()
        return tuple(replicate if at == self.over and whole_rows else each for at, each in enumerate(self.placements))


def _local(name: str, given: Any, place: _Place | None, of_logits: _Place | None) -> Any:
    """What a process has of an argument; ``of_logits`` is its place if it is logits."""
    if not checks.is_dtensor(given):
        if isinstance(given, Tensor) and of_logits is not None and of_logits.over is not None:
            raise ValueError(
                f"{name}: expected a DTensor with the placements of student_logits, {of_logits.placements}, got a "
                "Tensor; torch.distributed.tensor.distribute_tensor makes one"
            )
        return given
    placements = tuple(given.placements)
    if place is None:
        if all(placement.is_replicate() for placement in placements):
            return given.to_local(grad_placements=placements)
        raise ValueError(
            f"{name}: expected no DTensor, or a replicated one, beside student_logits that are none; redistribute it, "
            f"or pass its to_local(); got {placements}"
        )
    allowed = {place.wanted(of_logits is None)}
    if name == "target" and given.dtype.is_floating_point and given.dim() == place.classes + 1:
        allowed = {place.wanted(False)}
    if given.device_mesh != place.mesh or placements not in allowed:
        raise ValueError(
            f"{name}: expected a DTensor on the mesh of student_logits with placements {allowed.pop()}, or what this "
            f"process has of it as a Tensor; got {placements} on {given.device_mesh}"
        )
    local = given.to_local(grad_placements=placements)
    if of_logits is None or place.over is None:
        return local
    number = given.shape[-1]
    share = -(-number // place.mesh.size(place.over))  # as torch.chunk cuts, which DTensor follows
    first = min(place.mesh.get_local_rank(place.over) * share, number)
    return ClassShard(local, first, number, place.mesh.get_group(place.over))
