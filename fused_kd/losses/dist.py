"""DIST: the correlation of the student's with the teacher's probabilities, along rows and along columns."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fused_kd.losses._call import row_loss
from fused_kd.losses._criterion import Scheduled, UnlabelledCriterion
from fused_kd.losses._docs import documented
from fused_kd.losses._options import TeacherOptions, Unpack
from fused_kd.reference import DISTParts
from fused_kd.sources import Logits, TeacherLogits


@overload
def dist_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor | None = ..., *, beta: float = ...,
    gamma: float = ...,
    return_parts: Literal[False] = ..., **options: Unpack[TeacherOptions],
) -> Tensor: ...  # fmt: skip
@overload
def dist_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor | None = ..., *, beta: float = ...,
    gamma: float = ...,
    return_parts: Literal[True], **options: Unpack[TeacherOptions],
) -> tuple[Tensor, DISTParts]: ...  # fmt: skip
@overload
def dist_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor | None = ..., *, beta: float = ...,
    gamma: float = ...,
    return_parts: bool, **options: Unpack[TeacherOptions],
) -> Tensor | tuple[Tensor, DISTParts]: ...  # fmt: skip


@documented(
    DISTParts,
    "A teacher's logit of -inf is a probability of 0. The correlations take both as numbers; the loss stays finite.",
    "through the columns, unless gamma is 0, those of all rows",
)
def dist_loss(
    student_logits: Logits,
    teacher_logits: TeacherLogits,
    target: Tensor | None = None,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
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
) -> Tensor | tuple[Tensor, DISTParts]:
    r"""DIST of Huang et al., "Knowledge Distillation from A Stronger Teacher" (arXiv:2205.10536).

    With :math:`p, q` the softmax of the student's and the teacher's logits at temperature T and :math:`\rho` Pearson's
    correlation (:math:`10^{-8}` in its denominator) along a row i or a column j of the batch:

    .. math::
        L_i = T^2 \Bigl(\beta (1 - \rho(p_i, q_i)) + \gamma \bigl(1 - \tfrac{1}{C} \sum_j \rho(p^j, q^j)\bigr)\Bigr)
            + \mathrm{ce\_weight} \cdot \mathrm{CE}(student, target)

    The second term is one number for the whole batch. Every row that counts gets it in full, so the loss is still the
    mean of its rows. It needs a batch of several rows: with one row it is constant.

    Args:
        beta: Weight of the correlation along rows (inter-class).
        gamma: Weight of the correlation along columns (intra-class).
        temperature: +; the paper uses 4 for CIFAR-100, 1 for ImageNet.
        ce_weight: Weight of the ordinary cross-entropy.
        reduction: + With ``"none"``, unless gamma is 0, the gradient of every row depends on the incoming gradients of
            all rows. The fused backends compute it in the backward pass; until then both logits and the target are
            kept and must not change.
        weight: + The correlation along columns counts all other rows equally, whatever their weights.

    Example:
        >>> dist_loss(student_logits, teacher_logits, beta=1.0, gamma=1.0).backward()
    """
    return row_loss(
        "dist",
        DISTParts,
        (student_logits, teacher_logits, target),
        {
            "beta": beta,
            "gamma": gamma,
            "temperature": temperature,
            "ce_weight": ce_weight,
            "label_smoothing": label_smoothing,
        },
        {"logit_standardization": logit_standardization, "reduction": reduction, "ignore_index": ignore_index},
        (weight, normalizer, class_dim, num_classes, backend, return_parts),
    )


class DISTLoss(UnlabelledCriterion[DISTParts]):
    """DIST, by correlations along rows and columns; :func:`fused_kd.dist_loss` documents every argument.

    Example:
        >>> criterion = DISTLoss(beta=1.0, gamma=1.0)
        >>> loss = criterion(student_logits, teacher_logits)
    """

    beta: Scheduled
    gamma: Scheduled

    _function = staticmethod(dist_loss)

    def __init__(
        self, beta: Scheduled = 1.0, gamma: Scheduled = 1.0, temperature: Scheduled = 1.0, ce_weight: Scheduled = 0.0,
        label_smoothing: Scheduled = 0.0, logit_standardization: bool = False, ignore_index: int = -100,
        reduction: str = "mean", backend: str = "auto", class_dim: int | None = None, num_classes: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(locals())
