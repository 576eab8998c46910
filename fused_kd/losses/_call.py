"""The path of every loss from its arguments to the op, or to the reference, and back to the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

from torch import Tensor

from fused_kd import autograd, backends, direct, reference, repeated
from fused_kd.core import checks
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES, has_column_term, parts_of
from fused_kd.core.options import HyperParameters, in_order
from fused_kd.core.row_errors import check_target_values
from fused_kd.losses import _shards, _sources
from fused_kd.losses._options import Common, Parts, checked, first_classes, normalized_weight, returned
from fused_kd.sources import Logits, TeacherLogits

#: A function that returns the call of an op: it takes rows, their weight, hyper-parameters, settings and a backend.
Fused: TypeAlias = Callable[[checks.Rows, "Tensor | None", list[float], dict[str, Any], str], autograd.OpCall]


def call(
    name: str,
    eager: Callable[..., tuple[Tensor, Parts]],
    fused: Fused,
    parts_type: type[Parts],
    student_logits: Tensor,
    rows: checks.Rows,
    numbers: dict[str, float],
    settings: dict[str, Any],
    common: Common,
) -> Tensor | tuple[Tensor, Parts]:
    """Run a loss with checked arguments. ``rows`` are those of all tensors, ``numbers`` the hyper-parameters and
    ``settings`` the other options; ``eager`` takes both by name."""
    weight, device = common.weight, student_logits.device
    if weight is not None:
        weight = checks.flatten_weight(weight, rows.shape, student_logits.shape, rows.student_logits.shape[1], device)
    if common.normalizer is not None:
        weight = normalized_weight(weight, common.normalizer, settings, rows.target)
    chosen = backends.choose(common.backend, device, name)
    packed: Any
    if chosen == "reference":
        check_target_values(rows.target, weight, rows.student_logits.shape[1], settings["ignore_index"])
        tensors = [tensor for tensor in rows[:3] if tensor is not None]
        loss, packed = eager(*tensors, **numbers, **settings, weight=weight)
    else:
        op_call = fused(rows, weight, in_order(numbers), settings, chosen)
        loss, packed = autograd.run(op_call, common.return_parts)
        if packed is not None:
            packed = parts_of(name, packed)
        repeated.remember(name, rows, numbers, settings, common, op_call)
    return returned(loss, packed if common.return_parts else None, parts_type, rows.shape, settings["reduction"])


def row_loss(
    name: str,
    parts_type: type[Parts],
    tensors: tuple[Logits, TeacherLogits | None, Tensor | None],
    numbers: dict[str, float],
    settings: dict[str, Any],
    common_arguments: tuple[Any, ...],
) -> Tensor | tuple[Tensor, Parts]:
    """Check a row loss and run it. ``tensors`` are the student's logits, the teacher's, and the target. A loss without
    a teacher has None in its place, and no ``logit_standardization`` among its settings. ``common_arguments`` are the
    fields of :class:`Common`."""
    labels = ROW_LOSSES[name].labels
    complete = tensors[2] is not None or not labels
    if complete and (result := direct.loss(name, parts_type, tensors, numbers, settings, common_arguments)) is not None:
        return result
    common = Common._make(common_arguments)
    numbers = checked(numbers, settings, common)
    student_logits, teacher_logits, target = tensors
    plain = type(student_logits) is Tensor and (teacher_logits is None or type(teacher_logits) is Tensor)
    if any(map(checks.is_dtensor, (*tensors, common.weight))):
        tensors, weight = _shards.from_dtensors(tensors, common.weight, common.class_dim)
        common = common._replace(weight=weight)
        student_logits, teacher_logits, target = tensors
    if target is None and not labels:
        if numbers["ce_weight"] != 0.0:
            raise ValueError(f"target: expected one, since ce_weight is {numbers['ce_weight']}; got None")
        settings["ignore_index"] = -1  # the class that stands in for targets is 0
    if not plain and (_sources.is_source(student_logits) or _sources.is_source(teacher_logits)):
        return _sources.row_loss(name, parts_type, tensors, numbers, settings, common)
    student_logits, teacher_logits = cast(Tensor, student_logits), cast("Tensor | None", teacher_logits)
    class_dim, num_classes = common.class_dim, common.num_classes
    unpadded, padded = (student_logits, teacher_logits), None
    if num_classes is not None:
        padded, student_logits = first_classes("student_logits", student_logits, class_dim, num_classes)
        if teacher_logits is not None:
            _, teacher_logits = first_classes("teacher_logits", teacher_logits, class_dim, num_classes)
    other_name = "teacher_logits" if "teacher" in ROW_LOSSES[name].needs else None
    rows = checks.flatten(student_logits, teacher_logits, other_name, target, class_dim, labels)
    checks.check_teacher_detached(teacher_logits, student_logits)

    def fused(
        rows: checks.Rows, weight: Tensor | None, hyper: list[float], settings: dict[str, Any], chosen: str
    ) -> autograd.OpCall:
        reduction, saved = settings["reduction"], None
        if reduction == "none" and teacher_logits is not None and has_column_term(name, HyperParameters._make(hyper)):
            # The backward pass reads these. Flattening to rows may have copied them.
            dim = checks.class_dimension(student_logits, class_dim)
            student, teacher = (cast(Tensor, each).detach().movedim(dim, -1) for each in unpadded)
            probabilities = target is not None and target.is_floating_point()
            labels = cast(Tensor, target).movedim(dim, -1) if probabilities else rows.target
            saved = (student, teacher[..., :num_classes], labels)
        inputs = (rows.other_logits, rows.target, weight, name)
        options = (settings.get("logit_standardization", False), num_classes, settings["ignore_index"], reduction)
        student_rows = rows.student_logits if padded is None else padded  # its gradient includes the padding's zeros
        return autograd.op_call("row_loss", (student_rows,), inputs, hyper, options, chosen, saved)

    eager = getattr(reference, LOSSES[name].function)
    return call(name, eager, fused, parts_type, student_logits, rows, numbers, settings, common)
