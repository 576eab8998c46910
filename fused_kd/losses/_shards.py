"""Sharded classes: turns :class:`fused_kd.sources.ClassShard` and DTensor into rows with their span, and gathers all
columns for the reference."""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed

from fused_kd.backends import shards
from fused_kd.core import checks
from fused_kd.core.rows import SourceRows, Span
from fused_kd.reference import accumulation_dtype
from fused_kd.sources import ClassShard, Logits, TeacherLogits

Tensors: TypeAlias = "tuple[Logits, TeacherLogits | None, Tensor | None]"


def span_of(name: str, shard: ClassShard, class_dim: int | None) -> Span:
    """Return the span of a shard. :func:`fused_kd.backends.shards.check_cover` checks its classes, so that all
    processes raise the same error."""
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
    """Check a shard's logits (..., width), and view them as (N, width). The width may be 0."""
    if checks.is_dtensor(logits):
        raise TypeError(
            f"{name}: expected Tensors in a ClassShard, got a DTensor; pass its to_local(), or the logits as a DTensor "
            "without a ClassShard"
        )
    logits = checks.check_logits(name, logits)
    return checks.as_rows(logits, logits.dim() - 1)


def check_same(student: Span | None, teacher: Span | None) -> None:
    if student != teacher:
        raise ValueError(
            f"teacher_logits: expected the classes and the group of student_logits, {_description(student)}, got "
            f"{_description(teacher)}"
        )


def _description(span: Span | None) -> str:
    if span is None:
        return "no ClassShard"
    return f"those of {span.num_classes} from {span.first_class} on in group {span.group!r}"


class _Columns(torch.autograd.Function):
    """Gathers the columns of all processes. Each process gets the gradient of its own columns."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, span: Span) -> Tensor:
        group, (rows, width) = shards.group_of(span), own.shape
        own_span = torch.tensor([span.first_class, width, span.num_classes], device=own.device)
        spans = shards.gathered(own_span, group).tolist()
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
                "fused_kd: sharded classes do not support double backward (create_graph=True): each process has "
                "only the gradient of its own columns"
            )
        return grad[:, ctx.columns].contiguous(), None


class _Shared(torch.autograd.Function):
    """Hidden states that are the same on all processes. Their gradient is the sum over all processes' classes, so it is
    the same too."""

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
    """Return a head with hidden states in the accumulating dtype that get the sum of all processes' gradients."""
    if span is None or rows.weight is None:
        return rows
    values: Tensor = _Shared.apply(rows.values.to(accumulation_dtype(rows.values)), span)  # type: ignore[no-untyped-call]
    return rows._replace(values=values)


def all_columns(own: Tensor, span: Span | None) -> Tensor:
    """Gather (N, width) of each process to (N, num_classes), the same on all."""
    return own if span is None else _Columns.apply(own, span)  # type: ignore[no-untyped-call]


def sum_over_processes(sums: Tensor, process_group: Any) -> Tensor:
    if process_group is not None:
        distributed.all_reduce(sums, group=process_group)
    return sums


def from_dtensors(tensors: Tensors, weight: Tensor | None, class_dim: int | None) -> tuple[Tensors, Tensor | None]:
    """Replace DTensors by their local tensors, as a :class:`ClassShard` for logits with sharded classes."""
    student, teacher, target = tensors
    place = _Place(student, class_dim) if checks.is_dtensor(student) else None
    return (
        (
            _local("student_logits", student, place, True),
            _local("teacher_logits", teacher, place, True),
            _local("target", target, place, False),
        ),
        _local("weight", weight, place, False),
    )


class _Place:
    """The mesh and placements of the student's logits. ``mesh_dim`` is the one of the mesh that shards the classes,
    or None."""

    def __init__(self, student: Any, class_dim: int | None) -> None:
        tensor = sys.modules["torch.distributed.tensor"]
        self.mesh, self.placements = student.device_mesh, tuple(student.placements)
        self.classes = checks.class_dimension(student, class_dim)
        got = f"got {self.placements}"
        for placement in self.placements:
            # Not `is not`, which PyTorch 2.11's compiler takes for True here.
            if not placement.is_replicate() and type(placement) != tensor.Shard:  # noqa: E721
                raise ValueError(
                    "student_logits: expected a DTensor with placements Shard and Replicate; redistribute it, to "
                    f"Shard(-1) if the classes are to stay sharded; {got}"
                )
        dims = [at for at, placement in enumerate(self.placements) if placement.is_shard(self.classes)]
        if len(dims) > 1:
            raise ValueError(
                "student_logits: expected a DTensor with its classes sharded over one dimension of the mesh; "
                f"redistribute it to Replicate() over the others; {got}"
            )
        if not dims and any(placement.is_shard() for placement in self.placements):
            raise ValueError(
                "student_logits: expected a DTensor with its classes sharded; if only rows are sharded, pass "
                f"student_logits.to_local() and the teacher's, for the loss of this process's rows; {got}"
            )
        if dims and self.classes != student.dim() - 1:
            raise ValueError(
                "class_dim: expected the last dimension for a DTensor whose classes are sharded, got "
                f"{class_dim}; move it there"
            )
        if self.mesh.get_coordinate() is None:
            raise ValueError("student_logits: expected a DTensor of a mesh that this process belongs to")
        self.mesh_dim = dims[0] if dims else None

    def wanted(self, whole_rows: bool) -> tuple[Any, ...]:
        """Return the student's placements; for ``whole_rows`` with Replicate() in place of the shards of classes."""
        replicate = sys.modules["torch.distributed.tensor"].Replicate()
        replaced = self.mesh_dim if whole_rows else None
        return tuple(replicate if at == replaced else each for at, each in enumerate(self.placements))


def _local(name: str, given: Any, place: _Place | None, logits: bool) -> Any:
    """Return this process's part of an argument; ``logits`` says that it has classes as student_logits do."""
    if not checks.is_dtensor(given):
        if isinstance(given, Tensor) and logits and place is not None and place.mesh_dim is not None:
            raise ValueError(
                f"{name}: expected a DTensor with the placements of student_logits, {place.placements}, got a Tensor; "
                "torch.distributed.tensor.distribute_tensor makes one"
            )
        return given
    placements = tuple(given.placements)
    if place is None:
        if all(placement.is_replicate() for placement in placements):
            return given.to_local(grad_placements=placements)
        raise ValueError(
            f"{name}: expected no DTensor, or a replicated one, since student_logits is no DTensor; redistribute it, "
            f"or pass its to_local(); got {placements}"
        )
    allowed = {place.wanted(not logits)}
    if name == "target" and given.dtype.is_floating_point and given.dim() == place.classes + 1:
        allowed = {place.wanted(False)}
    if given.device_mesh != place.mesh or placements not in allowed:
        raise ValueError(
            f"{name}: expected a DTensor on the mesh of student_logits with placements {allowed.pop()}, or what this "
            f"process has of it as a Tensor; got {placements} on {given.device_mesh}"
        )
    local = given.to_local(grad_placements=placements)
    if not logits or place.mesh_dim is None:
        return local
    number = given.shape[-1]
    share = -(-number // place.mesh.size(place.mesh_dim))  # DTensor splits as torch.chunk does
    first = min(place.mesh.get_local_rank(place.mesh_dim) * share, number)
    return ClassShard(local, first, number, place.mesh.get_group(place.mesh_dim))
