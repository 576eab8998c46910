"""DIST: the correlation of the student's with the teacher's probabilities, along rows and along columns."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fused_kd import reference
from fused_kd.losses._call import row_loss
from fused_kd.losses._criterion import Scheduled, UnlabelledCriterion
from fused_kd.losses._infinities import infinities
from fused_kd.reference import DISTParts


@overload
def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = ..., *, beta: float = ...,
    gamma: float = ..., temperature: float = ..., ce_weight: float = ..., label_smoothing: float = ...,
    logit_standardization: bool = ..., ignore_index: int = ..., reduction: str = ..., weight: Tensor | None = ...,
    class_dim: int | None = ..., backend: str = ..., return_parts: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = ..., *, beta: float = ...,
    gamma: float = ..., temperature: float = ..., ce_weight: float = ..., label_smoothing: float = ...,
    logit_standardization: bool = ..., ignore_index: int = ..., reduction: str = ..., weight: Tensor | None = ...,
    class_dim: int | None = ..., backend: str = ..., return_parts: Literal[True],
) -> tuple[Tensor, DISTParts]: ...  # fmt: skip


@overload
def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = ..., *, beta: float = ...,
    gamma: float = ..., temperature: float = ..., ce_weight: float = ..., label_smoothing: float = ...,
    logit_standardization: bool = ..., ignore_index: int = ..., reduction: str = ..., weight: Tensor | None = ...,
    class_dim: int | None = ..., backend: str = ..., return_parts: bool,
) -> Tensor | tuple[Tensor, DISTParts]: ...  # fmt: skip


@infinities(
    "A teacher's -inf is a probability of 0. The correlations take both as numbers, and the loss stays finite.",
    "through the columns, unless gamma is 0, those of all rows",
)
def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
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
    class_dim: int | None = None,
    backend: str = "auto",
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, DISTParts]:
    r"""DIST of Huang et al., "Knowledge Distillation from A Stronger Teacher" (arXiv:2205.10536).

    With :math:`p, q` the softmax of the student's and the teacher's logits at temperature T and :math:`\rho` Pearson's
    correlation (:math:`10^{-8}` in its denominator) along a row i or a column j of the batch:

    .. math::
        L_i = T^2 \Bigl(\beta (1 - \rho(p_i, q_i)) + \gamma \bigl(1 - \tfrac{1}{C} \sum_j \rho(p^j, q^j)\bigr)\Bigr)
            + \mathrm{ce\_weight} \cdot \mathrm{CE}(student, target)

    The second term is one number for the batch, which every row that counts is given whole, so that the loss stays the
    mean of its rows. It needs a batch: of one row it is constant.

    Args:
        student_logits: Unnormalised scores ``(..., C)``, C at least 2, float64, float32, float16 or bfloat16.
        teacher_logits: The teacher's, same shape and device, any of those dtypes; must not require grad.
        target: Class indices ``(...)`` or ``(..., 1)``, or class probabilities ``(..., C)``. They serve the
            cross-entropy and ``ignore_index``; without them ``ce_weight`` must be 0 and every row counts.
        beta: Weight of the correlation along rows (inter-class).
        gamma: Weight of the correlation along columns (intra-class).
        temperature: T above; the paper has 4 for CIFAR-100, 1 for ImageNet.
        ce_weight: Weight of the ordinary cross-entropy.
        label_smoothing: Of the cross-entropy's labels, as in :func:`torch.nn.cross_entropy`.
        logit_standardization: Put the z-scores of both logits, row by row, into all but the cross-entropy.
        ignore_index: Rows with this class index are in no term and get a zero gradient.
        reduction: ``"mean"`` over the rows that count (0 if none does), ``"sum"`` or ``"none"``. For ``"none"``, unless
            gamma is 0, what comes in for one row is in every row's gradient: the fused backends compute that in the
            backward pass, until when both logits and the target are kept and must not change.
        weight: What each row weighs, ``(...)``: a boolean mask, or floating-point, without gradient, at least 0. Not
            what each class weighs, as in cross_entropy; of as many rows as classes nothing tells. ``"none"`` gives
            :math:`w_i L_i`, ``"sum"`` their sum and ``"mean"`` that over :math:`\sum_i w_i` of the rows that count.
            A row of weight 0 adds exactly nothing to the loss and has a zero gradient, whatever it holds. In the
            correlation along columns the others are alike, whatever they weigh.
        class_dim: The dimension of the classes, in the logits and in probability targets; the shapes here have it last.
            None is the last one, which logits of four or more dimensions must say themselves: 1 for (N, C, H, W), as
            :func:`torch.nn.cross_entropy` has them, -1 for (N, H, W, C). Logits whose classes do not lie
            side by side in memory are copied, but not (N, C, H, W) in ``torch.channels_last``.
        backend: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``; see :func:`fused_kd.explain`.
        return_parts: Return ``(loss, parts)`` with the detached, weighted ``parts.inter``, ``parts.intra`` and
            ``parts.ce``, which sum to the loss.

    Shape:
        The loss is a scalar, or has the shape of the class indices ``(...)`` for ``reduction="none"``. Its dtype is
        float64 if any logits are, else float32. The gradient has the dtype of ``student_logits``.

    Returns:
        The loss, or the loss and its parts.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: As :func:`nkd_loss`.

    Example:
        >>> dist_loss(student_logits, teacher_logits, beta=1.0, gamma=1.0).backward()
    """
    return row_loss(
        "dist",
        reference.dist_loss,
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
        (weight, class_dim, backend, return_parts),
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
        self,
        beta: Scheduled = 1.0,
        gamma: Scheduled = 1.0,
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
