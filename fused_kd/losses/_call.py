"""What the functions share: the way of a row loss from checked arguments to the op, or to the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

from fused_kd import autograd, backends
from fused_kd.core import checks
from fused_kd.core.catalogue import ROW_LOSSES, has_column_term
from fused_kd.core.options import HyperParameters, in_order
from fused_kd.core.transforms import readable

Parts = TypeVar("Parts", bound=tuple[Tensor, ...])


def row_loss(
    name: str,
    reference: Callable[..., tuple[Tensor, Parts]],
    parts_type: type[Parts],
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor | None,
    own: dict[str, float],
    *,
    temperature: float,
    ce_weight: float,
    label_smoothing: float,
    logit_standardization: bool | None,
    ignore_index: int,
    reduction: str,
    weight: Tensor | None,
    class_dim: int | None,
    backend: str,
    return_parts: bool,
    has_teacher: bool = True,
) -> Tensor | tuple[Tensor, Parts]:
    """Run a row loss; ``own`` has its own hyper-parameters.

    Without a teacher there are no ``teacher_logits`` and no ``logit_standardization``: both are None.
    """
    own = {key: checks.check_scalar(key, value) for key, value in own.items()}
    temperature = checks.check_scalar("temperature", temperature, positive=True)
    ce_weight = checks.check_scalar("ce_weight", ce_weight)
    label_smoothing = checks.check_fraction("label_smoothing", label_smoothing)
    options: dict[str, Any] = {"logit_standardization": logit_standardization} if has_teacher else {}
    for flag, value in options.items():
        checks.check_flag(flag, value)
    checks.check_reduction(reduction)
    checks.check_ignore_index(ignore_index)
    if target is None:
        if ce_weight != 0.0:
            raise ValueError(f"target: expected one, since ce_weight is {ce_weight}; got None")
        ignore_index = -1  # the class that stands in for targets is 0
    name_of_other, other = ("teacher_logits", teacher_logits) if has_teacher else ("student_logits", student_logits)
    rows = checks.flatten(student_logits, other, name_of_other, target, class_dim)
    checks.check_teacher_detached(teacher_logits)
    weight = checks.flatten_weight(weight, rows, student_logits)
    chosen = backends.choose(backend, student_logits.device, name)
    logits = rows[:2] if has_teacher else rows[:1]
    packed: Any
    if chosen == "reference":
        check_targets_if_cheap(rows, ignore_index, weight)
        loss, packed = reference(
            *logits,
            rows.target,
            **own,
            temperature=temperature,
            ce_weight=ce_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            weight=weight,
            **options,
        )
    else:
        hyper = in_order(own, temperature, ce_weight, label_smoothing)
        kept = None
        if reduction == "none" and teacher_logits is not None and has_column_term(name, HyperParameters._make(hyper)):
            dim = checks.class_dimension(student_logits, class_dim)
            labels = target if target is not None and target.is_floating_point() else None
            kept = (
                student_logits.detach().movedim(dim, -1),
                teacher_logits.detach().movedim(dim, -1),
                rows.target if labels is None else labels.movedim(dim, -1),
            )
        loss, packed = autograd.row_loss(
            rows.student_logits,
            rows.other_logits if has_teacher else None,
            rows.target,
            weight,
            name,
            hyper,
            bool(logit_standardization),
            ignore_index,
            reduction,
            chosen,
            return_parts,
            kept,
        )
        if return_parts:
            packed = [packed[part] for part in ROW_LOSSES[name].parts]
    return returned(loss, packed if return_parts else None, parts_type, rows, reduction)


def returned(
    loss: Tensor, packed: Iterable[Tensor] | None, parts_type: type[Parts], rows: checks.Rows, reduction: str
) -> Tensor | tuple[Tensor, Parts]:
    """What the caller gets, of its rows' shape: the loss, and its parts where there are some."""
    if reduction == "none" and len(rows.shape) != 1:
        loss = loss.reshape(rows.shape)
        packed = None if packed is None else [part.reshape(rows.shape) for part in packed]
    return loss if packed is None else (loss, parts_type(*packed))


def check_targets_if_cheap(rows: checks.Rows, ignore_index: int, weight: Tensor | None = None) -> None:
    """Fused backends check as they go; the reference reads the values first where it can and that stalls nothing."""
    if readable(rows.target):
        checks.check_target_values(rows.target, weight, rows.student_logits.shape[1], ignore_index)
