"""Weighted soft labels."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fused_kd.losses._call import row_loss
from fused_kd.losses._criterion import Scheduled, TeacherCriterion
from fused_kd.losses._docs import WITH_A_TEACHER, documented
from fused_kd.losses._options import TeacherOptions, Unpack
from fused_kd.reference import DistillationParts
from fused_kd.sources import Logits, TeacherLogits


@overload
def wsld_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor, *, alpha: float = ...,
    return_parts: Literal[False] = ..., **options: Unpack[TeacherOptions],
) -> Tensor: ...  # fmt: skip
@overload
def wsld_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor, *, alpha: float = ...,
    return_parts: Literal[True], **options: Unpack[TeacherOptions],
) -> tuple[Tensor, DistillationParts]: ...  # fmt: skip
@overload
def wsld_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor, *, alpha: float = ...,
    return_parts: bool, **options: Unpack[TeacherOptions],
) -> Tensor | tuple[Tensor, DistillationParts]: ...  # fmt: skip


@documented(DistillationParts, WITH_A_TEACHER)
def wsld_loss(
    student_logits: Logits,
    teacher_logits: TeacherLogits,
    target: Tensor,
    *,
    alpha: float = 2.5,
    temperature: float = 2.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    class_dim: int | None = None,
    num_classes: int | None = None,
    backend: str = "auto",
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, DistillationParts]:
    r"""Weighted soft labels (WSLD) of Zhou et al., "Rethinking Soft Labels for Knowledge Distillation"
    (arXiv:2102.00650).

    With :math:`p(T), q(T)` the softmax of the student's and the teacher's logits at temperature T:

    .. math::
        L = \alpha T^2 u \Bigl(-\sum_j q_j(T) \log p_j(T)\Bigr)
            + \mathrm{ce\_weight} \cdot \mathrm{CE}(student, target),

    .. math::
        u = 1 - \exp\Bigl(-\frac{\mathrm{CE}(student, target)}{\mathrm{CE}(teacher, target) + 10^{-7}}\Bigr)

    The gradient treats u as a constant. The cross-entropies in u are at temperature 1 and without label smoothing.

    Args:
        alpha: Weight of the distillation.
        temperature: +; the paper uses 2.

    Example:
        >>> wsld_loss(student_logits, teacher_logits, target, ce_weight=1.0).backward()
    """
    return row_loss(
        "wsld",
        DistillationParts,
        (student_logits, teacher_logits, target),
        {"alpha": alpha, "temperature": temperature, "ce_weight": ce_weight, "label_smoothing": label_smoothing},
        {"logit_standardization": logit_standardization, "reduction": reduction, "ignore_index": ignore_index},
        (weight, normalizer, class_dim, num_classes, backend, return_parts),
    )


class WSLDLoss(TeacherCriterion[DistillationParts]):
    """Weighted soft labels; :func:`fused_kd.wsld_loss` documents every argument.

    Example:
        >>> criterion = WSLDLoss(ce_weight=1.0)
        >>> loss = criterion(student_logits, teacher_logits, target)
    """

    alpha: Scheduled

    _function = staticmethod(wsld_loss)

    def __init__(
        self, alpha: Scheduled = 2.5, temperature: Scheduled = 2.0, ce_weight: Scheduled = 0.0,
        label_smoothing: Scheduled = 0.0, logit_standardization: bool = False, ignore_index: int = -100,
        reduction: str = "mean", backend: str = "auto", class_dim: int | None = None, num_classes: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(locals())
