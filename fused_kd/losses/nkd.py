"""Normalized knowledge distillation."""

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
def nkd_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor, *, gamma: float = ...,
    return_parts: Literal[False] = ..., **options: Unpack[TeacherOptions],
) -> Tensor: ...  # fmt: skip
@overload
def nkd_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor, *, gamma: float = ...,
    return_parts: Literal[True], **options: Unpack[TeacherOptions],
) -> tuple[Tensor, LossParts]: ...  # fmt: skip
@overload
def nkd_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor, *, gamma: float = ...,
    return_parts: bool, **options: Unpack[TeacherOptions],
) -> Tensor | tuple[Tensor, LossParts]: ...  # fmt: skip


@documented(LossParts, WITH_A_TEACHER)
def nkd_loss(
    student_logits: Logits,
    teacher_logits: TeacherLogits,
    target: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
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
    r"""Normalized knowledge distillation (NKD), Eq. 4 and 5 of "From Knowledge Distillation to Self-Knowledge
    Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels" (arXiv:2303.13005).

    With :math:`p, q` the softmax of the student's and the teacher's logits, :math:`y` the target class, and
    :math:`\hat p, \hat q` the softmax at ``temperature`` :math:`T` over the classes other than :math:`y`:

    .. math::
        L = -q_y \log p_y - \gamma T^2 \sum_{j \ne y} \hat q_j \log \hat p_j
            + \mathrm{ce\_weight} \cdot \mathrm{CE}(student, target)

    The temperature acts only on the non-target term. Both terms are cross-entropies, so equal logits do not give 0.

    Args:
        target: + A row's largest probability is NKD's target, the lowest index on ties; CE uses all of them.
        gamma: Weight of the non-target term; the paper uses 1.5 for ImageNet, 1 for DeiT, 3.5 for CIFAR-100.
        temperature: +; the paper uses 1 for ImageNet, 3 for CIFAR-100.
        ce_weight: +; 1 gives Eq. 5.

    Example:
        >>> student_logits = torch.randn(8, 1000, requires_grad=True)
        >>> teacher_logits, target = torch.randn(8, 1000), torch.randint(1000, (8,))
        >>> nkd_loss(student_logits, teacher_logits, target, gamma=1.5, ce_weight=1.0).backward()
    """
    return row_loss(
        "nkd",
        LossParts,
        (student_logits, teacher_logits, target),
        {"gamma": gamma, "temperature": temperature, "ce_weight": ce_weight, "label_smoothing": label_smoothing},
        {"logit_standardization": logit_standardization, "reduction": reduction, "ignore_index": ignore_index},
        (weight, normalizer, class_dim, num_classes, backend, return_parts),
    )


class NKDLoss(TeacherCriterion[LossParts]):
    """Normalized knowledge distillation; :func:`fused_kd.nkd_loss` documents every argument.

    Example:
        >>> criterion = NKDLoss(gamma=1.5, temperature=1.0)
        >>> loss = criterion(student_logits, teacher_logits, target)
    """

    gamma: Scheduled

    _function = staticmethod(nkd_loss)

    def __init__(
        self, gamma: Scheduled = 1.5, temperature: Scheduled = 1.0, ce_weight: Scheduled = 0.0,
        label_smoothing: Scheduled = 0.0, logit_standardization: bool = False, ignore_index: int = -100,
        reduction: str = "mean", backend: str = "auto", class_dim: int | None = None, num_classes: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(locals())
