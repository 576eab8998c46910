"""Decoupled knowledge distillation."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fused_kd import reference
from fused_kd.losses._call import row_loss
from fused_kd.losses._criterion import Scheduled, TeacherCriterion
from fused_kd.losses._infinities import WITH_A_TEACHER, infinities
from fused_kd.reference import LossParts


@overload
def dkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, alpha: float = ..., beta: float = ...,
    temperature: float = ..., ce_weight: float = ..., label_smoothing: float = ..., logit_standardization: bool = ...,
    ignore_index: int = ..., reduction: str = ..., weight: Tensor | None = ..., class_dim: int | None = ...,
    backend: str = ..., return_parts: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def dkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, alpha: float = ..., beta: float = ...,
    temperature: float = ..., ce_weight: float = ..., label_smoothing: float = ..., logit_standardization: bool = ...,
    ignore_index: int = ..., reduction: str = ..., weight: Tensor | None = ..., class_dim: int | None = ...,
    backend: str = ..., return_parts: Literal[True],
) -> tuple[Tensor, LossParts]: ...  # fmt: skip


@overload
def dkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, alpha: float = ..., beta: float = ...,
    temperature: float = ..., ce_weight: float = ..., label_smoothing: float = ..., logit_standardization: bool = ...,
    ignore_index: int = ..., reduction: str = ..., weight: Tensor | None = ..., class_dim: int | None = ...,
    backend: str = ..., return_parts: bool,
) -> Tensor | tuple[Tensor, LossParts]: ...  # fmt: skip


@infinities(WITH_A_TEACHER)
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
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
    class_dim: int | None = None,
    backend: str = "auto",
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, LossParts]:
    r"""Decoupled knowledge distillation (DKD) of Zhao et al., "Decoupled Knowledge Distillation" (arXiv:2203.08679).

    With :math:`y` the target class, :math:`b = (p_y, 1 - p_y)` of the student and of the teacher, and
    :math:`\hat p, \hat q` the softmax over the classes other than :math:`y`, all at temperature T:

    .. math::
        L = T^2 (\alpha \mathrm{KL}(b_t \| b_s) + \beta \mathrm{KL}(\hat q \| \hat p))
            + \mathrm{ce\_weight} \cdot \mathrm{CE}(student, target)

    Without the published code's masks of −1000 and logarithms of rounded probabilities: saturated rows stay finite.

    Args:
        student_logits: Unnormalised scores ``(..., C)``, C at least 2, float64, float32, float16 or bfloat16.
        teacher_logits: The teacher's, same shape and device, any of those dtypes; must not require grad.
        target: Class indices ``(...)`` or ``(..., 1)``, or class probabilities ``(..., C)`` (mixup, CutMix): DKD then
            takes each row's largest entry, the lowest index on ties, and CE takes the probabilities.
        alpha: Weight of the binary term.
        beta: Weight of the non-target term; the paper has 8 for CIFAR-100, 0.5 for ImageNet.
        temperature: T above; the paper has 4 for CIFAR-100, 1 for ImageNet.
        ce_weight: Weight of the ordinary cross-entropy, computed in the same pass.
        label_smoothing: Of the cross-entropy's labels, as in :func:`torch.nn.cross_entropy`.
        logit_standardization: Put the z-scores of both logits, row by row, into all but the cross-entropy.
        ignore_index: Rows with this class index count nowhere and get a zero gradient.
        reduction: ``"mean"`` over the rows that count (0 if none does), ``"sum"`` or ``"none"``.
        weight: What each row weighs, ``(...)``: a boolean mask, or floating-point, without gradient, at least 0. Not
            what each class weighs, as in cross_entropy; of as many rows as classes nothing tells. ``"none"`` gives
            :math:`w_i L_i`, ``"sum"`` their sum and ``"mean"`` that over :math:`\sum_i w_i` of the rows that count.
            A row of weight 0 adds exactly nothing to the loss and has a zero gradient, whatever it holds.
        class_dim: The dimension of the classes, in the logits and in probability targets; the shapes here have it last.
            None is the last one, which logits of four or more dimensions must say themselves: 1 for (N, C, H, W), as
            :func:`torch.nn.cross_entropy` has them, -1 for (N, H, W, C). Logits whose classes do not lie
            side by side in memory are copied, but not (N, C, H, W) in ``torch.channels_last``.
        backend: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``; see :func:`fused_kd.explain`.
        return_parts: Return ``(loss, parts)`` with the detached, weighted ``parts.target`` (the binary term),
            ``parts.non_target`` and ``parts.ce``, which sum to the loss.

    Shape:
        The loss is a scalar, or has the shape of the class indices ``(...)`` for ``reduction="none"``. Its dtype is
        float64 if any logits are, else float32. The gradient has the dtype of ``student_logits``.

    Returns:
        The loss, or the loss and its parts.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: As :func:`nkd_loss`.

    Example:
        >>> dkd_loss(student_logits, teacher_logits, target, alpha=1.0, beta=8.0).backward()
    """
    return row_loss(
        "dkd",
        reference.dkd_loss,
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
        (weight, class_dim, backend, return_parts),
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
        self,
        alpha: Scheduled = 1.0,
        beta: Scheduled = 8.0,
        temperature: Scheduled = 4.0,
        ce_weight: Scheduled = 0.0,
        label_smoothing: Scheduled = 0.0,
        logit_standardization: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        class_dim: int | None = None,
    ) -> None:
        super().__init__(locals())
