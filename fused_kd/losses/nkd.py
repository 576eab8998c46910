"""Normalized knowledge distillation."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fused_kd import reference
from fused_kd.losses._call import row_loss
from fused_kd.losses._criterion import Scheduled, TeacherCriterion
from fused_kd.losses._infinities import WITH_A_TEACHER, infinities
from fused_kd.reference import LossParts


@overload
def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, gamma: float = ..., temperature: float = ...,
    ce_weight: float = ..., label_smoothing: float = ..., logit_standardization: bool = ..., ignore_index: int = ...,
    reduction: str = ..., weight: Tensor | None = ..., class_dim: int | None = ..., backend: str = ...,
    return_parts: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, gamma: float = ..., temperature: float = ...,
    ce_weight: float = ..., label_smoothing: float = ..., logit_standardization: bool = ..., ignore_index: int = ...,
    reduction: str = ..., weight: Tensor | None = ..., class_dim: int | None = ..., backend: str = ...,
    return_parts: Literal[True],
) -> tuple[Tensor, LossParts]: ...  # fmt: skip


@overload
def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, gamma: float = ..., temperature: float = ...,
    ce_weight: float = ..., label_smoothing: float = ..., logit_standardization: bool = ..., ignore_index: int = ...,
    reduction: str = ..., weight: Tensor | None = ..., class_dim: int | None = ..., backend: str = ...,
    return_parts: bool,
) -> Tensor | tuple[Tensor, LossParts]: ...  # fmt: skip


@infinities(WITH_A_TEACHER)
def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
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
    class_dim: int | None = None,
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

    The temperature acts on the non-target term only. It is a cross-entropy, so it is not 0 for equal logits.

    Args:
        student_logits: Unnormalised scores ``(..., C)``, C at least 2, float64, float32, float16 or bfloat16.
        teacher_logits: The teacher's, same shape and device, any of those dtypes; must not require grad.
        target: Class indices ``(...)`` or ``(..., 1)``, or class probabilities ``(..., C)`` (mixup, CutMix): NKD then
            takes each row's largest entry, the lowest index on ties, and CE takes the probabilities.
        gamma: Weight of the non-target term; the paper has 1.5 for ImageNet, 1 for DeiT, 3.5 for CIFAR-100.
        temperature: T above; the paper has 1 for ImageNet, 3 for CIFAR-100.
        ce_weight: Weight of the ordinary cross-entropy, computed in the same pass; 1 gives Eq. 5.
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
        return_parts: Return ``(loss, parts)`` with the detached, weighted ``parts.target``, ``parts.non_target`` and
            ``parts.ce``, which sum to the loss.

    Shape:
        The loss is a scalar, or has the shape of the class indices ``(...)`` for ``reduction="none"``. Its dtype is
        float64 if any logits are, else float32. The gradient has the dtype of ``student_logits``.

    Returns:
        The loss, or the loss and its parts.

    Raises:
        TypeError: An argument has a type or dtype that is not supported.
        ValueError: Shapes, devices or hyper-parameters do not fit, the teacher requires grad, or on the CPU a row's
            probabilities do not sum to 1, give or take 0.02. On a GPU, where checking would stall, in Triton and in a
            compiled reference they are taken as they are.
        IndexError: A class index is out of range, on the CPU. On a GPU, where checking would stall, that row is NaN; so
            is there one whose weight is negative or not finite, else a ValueError.
        RuntimeError: ``backend`` names one that cannot run here, with the reason; or a fused backend is asked for what
            only ``"reference"`` can do: a second derivative (create_graph=True, in the backward), forward mode, a
            transform of torch.func, torch.jit.trace or an export to ONNX.

    Example:
        >>> student_logits = torch.randn(8, 1000, requires_grad=True)
        >>> teacher_logits, target = torch.randn(8, 1000), torch.randint(1000, (8,))
        >>> nkd_loss(student_logits, teacher_logits, target, gamma=1.5, ce_weight=1.0).backward()
    """
    return row_loss(
        "nkd",
        reference.nkd_loss,
        LossParts,
        (student_logits, teacher_logits, target),
        {"gamma": gamma, "temperature": temperature, "ce_weight": ce_weight, "label_smoothing": label_smoothing},
        {"logit_standardization": logit_standardization, "reduction": reduction, "ignore_index": ignore_index},
        (weight, class_dim, backend, return_parts),
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
        self,
        gamma: Scheduled = 1.5,
        temperature: Scheduled = 1.0,
        ce_weight: Scheduled = 0.0,
        label_smoothing: Scheduled = 0.0,
        logit_standardization: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        class_dim: int | None = None,
    ) -> None:
        super().__init__(locals())
