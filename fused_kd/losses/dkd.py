"""Decoupled knowledge distillation."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fused_kd.losses._call import row_loss
from fused_kd.losses._criterion import Scheduled, TeacherCriterion
from fused_kd.losses._docs import WITH_A_TEACHER, documented
from fused_kd.losses._options import TeacherOptions, Unpack
from fused_kd.reference import LossParts
from fused_kd.sources import Logits, TeacherLogits


@overload
def dkd_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor, *, alpha: float = ..., beta: float = ...,
    return_parts: Literal[False] = ..., **options: Unpack[TeacherOptions],
) -> Tensor: ...  # fmt: skip
@overload
def dkd_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor, *, alpha: float = ..., beta: float = ...,
    return_parts: Literal[True], **options: Unpack[TeacherOptions],
) -> tuple[Tensor, LossParts]: ...  # fmt: skip
@overload
def dkd_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor, *, alpha: float = ..., beta: float = ...,
    return_parts: bool, **options: Unpack[TeacherOptions],
) -> Tensor | tuple[Tensor, LossParts]: ...  # fmt: skip


@documented(LossParts, WITH_A_TEACHER)
def dkd_loss(
    student_logits: Logits,
    teacher_logits: TeacherLogits,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
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
) -> Tensor | tuple[Tensor, LossParts]:
    r"""Decoupled knowledge distillation (DKD) of Zhao et al., "Decoupled Knowledge Distillation" (arXiv:2203.08679).

    With :math:`y` the target class, :math:`b = (p_y, 1 - p_y)` of the student and of the teacher, and
    :math:`\hat p, \hat q` the softmax over the classes other than :math:`y`, all at temperature T:

    .. math::
        L = T^2 (\alpha \mathrm{KL}(b_t \| b_s) + \beta \mathrm{KL}(\hat q \| \hat p))
            + \mathrm{ce\_weight} \cdot \mathrm{CE}(student, target)

    Unlike the published code, this uses no masks of −1000 and no logarithms of rounded probabilities, so saturated rows
    stay finite.

    Args:
        target: + A row's largest probability is DKD's target, the lowest index on ties; CE uses all of them.
        alpha: Weight of the binary term.
        beta: Weight of the non-target term; the paper uses 8 for CIFAR-100, 0.5 for ImageNet.
        temperature: +; the paper uses 4 for CIFAR-100, 1 for ImageNet.
        return_parts: + ``parts.target`` is the binary term.

    Example:
        >>> dkd_loss(student_logits, teacher_logits, target, alpha=1.0, beta=8.0).backward()
    """
    return row_loss(
        "dkd",
        LossParts,
        (student_logits, teacher_logits, target),
        {
            "alpha": alpha,
            "beta": beta,
            "temperature": temperature,
            "ce_weight": ce_weight,
            "label_smoothing": label_smoothing,
        },
        {"logit_standardization": logit_standardization, "reduction": reduction, "ignore_index": ignore_index},
        (weight, normalizer, class_dim, num_classes, backend, return_parts),
    )


class DKDLoss(TeacherCriterion[LossParts]):
    """Decoupled knowledge distillation; :func:`fused_kd.dkd_loss` documents every argument.

    Example:
        >>> criterion = DKDLoss(alpha=1.0, beta=8.0)
        >>> loss = criterion(student_logits, teacher_logits, target)
    """

    alpha: Scheduled
    beta: Scheduled

    _function = staticmethod(dkd_loss)

    def __init__(
        self, alpha: Scheduled = 1.0, beta: Scheduled = 8.0, temperature: Scheduled = 4.0, ce_weight: Scheduled = 0.0,
        label_smoothing: Scheduled = 0.0, logit_standardization: bool = False, ignore_index: int = -100,
        reduction: str = "mean", backend: str = "auto", class_dim: int | None = None, num_classes: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(locals())
