"""Knowledge distillation by the divergence of the whole softmax."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fused_kd.losses._call import row_loss
from fused_kd.losses._criterion import Scheduled, UnlabelledCriterion
from fused_kd.losses._docs import WITH_A_TEACHER, documented
from fused_kd.losses._options import TeacherOptions, Unpack
from fused_kd.reference import DistillationParts
from fused_kd.sources import Logits, TeacherLogits


@overload
def kd_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor | None = ..., *,
    return_parts: Literal[False] = ..., **options: Unpack[TeacherOptions],
) -> Tensor: ...  # fmt: skip
@overload
def kd_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor | None = ..., *,
    return_parts: Literal[True], **options: Unpack[TeacherOptions],
) -> tuple[Tensor, DistillationParts]: ...  # fmt: skip
@overload
def kd_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor | None = ..., *,
    return_parts: bool, **options: Unpack[TeacherOptions],
) -> Tensor | tuple[Tensor, DistillationParts]: ...  # fmt: skip


@documented(DistillationParts, WITH_A_TEACHER)
def kd_loss(
    student_logits: Logits,
    teacher_logits: TeacherLogits,
    target: Tensor | None = None,
    *,
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
) -> Tensor | tuple[Tensor, DistillationParts]:
    r"""Knowledge distillation (KD) of Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531).

    With :math:`p(T), q(T)` the softmax of the student's and the teacher's logits at temperature T:

    .. math::
        L = T^2 \sum_j q_j(T) \log \frac{q_j(T)}{p_j(T)} + \mathrm{ce\_weight} \cdot \mathrm{CE}(student, target)

    The mean divides by the number of rows; ``F.kl_div(reduction="mean")`` would divide by N·C.

    Args:
        temperature: +; 4 is common for CIFAR-100, 1 for ImageNet.

    Example:
        >>> kd_loss(student_logits, teacher_logits, temperature=4.0).backward()
    """
    return row_loss(
        "kd",
        DistillationParts,
        (student_logits, teacher_logits, target),
        {"temperature": temperature, "ce_weight": ce_weight, "label_smoothing": label_smoothing},
        {"logit_standardization": logit_standardization, "reduction": reduction, "ignore_index": ignore_index},
        (weight, normalizer, class_dim, num_classes, backend, return_parts),
    )


class KDLoss(UnlabelledCriterion[DistillationParts]):
    """Knowledge distillation; :func:`fused_kd.kd_loss` documents every argument.

    Example:
        >>> criterion = KDLoss(temperature=4.0)
        >>> loss = criterion(student_logits, teacher_logits)
    """

    _function = staticmethod(kd_loss)

    def __init__(
        self, temperature: Scheduled = 4.0, ce_weight: Scheduled = 0.0, label_smoothing: Scheduled = 0.0,
        logit_standardization: bool = False, ignore_index: int = -100, reduction: str = "mean", backend: str = "auto",
        class_dim: int | None = None, num_classes: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(locals())
