"""Generalised Jensen–Shannon divergence."""

from __future__ import annotations

from typing import ClassVar, Literal, overload

from torch import Tensor

from fused_kd.core import checks
from fused_kd.losses._call import row_loss
from fused_kd.losses._criterion import Scheduled, UnlabelledCriterion
from fused_kd.losses._docs import documented
from fused_kd.losses._options import TeacherOptions, Unpack
from fused_kd.reference import DistillationParts
from fused_kd.sources import Logits, TeacherLogits


@overload
def js_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor | None = ..., *, beta: float = ...,
    return_parts: Literal[False] = ..., **options: Unpack[TeacherOptions],
) -> Tensor: ...  # fmt: skip
@overload
def js_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor | None = ..., *, beta: float = ...,
    return_parts: Literal[True], **options: Unpack[TeacherOptions],
) -> tuple[Tensor, DistillationParts]: ...  # fmt: skip
@overload
def js_loss(
    student_logits: Logits, teacher_logits: TeacherLogits, target: Tensor | None = ..., *, beta: float = ...,
    return_parts: bool, **options: Unpack[TeacherOptions],
) -> Tensor | tuple[Tensor, DistillationParts]: ...  # fmt: skip


@documented(
    DistillationParts,
    """A teacher's logit of -inf is a probability of 0. With beta between 0 and 1 the mixture is positive where either
    side is, and the loss stays finite. At 0 it is +inf if a class has probability 0 for the student but not for the
    teacher, at 1 the other way round.""",
)
def js_loss(
    student_logits: Logits,
    teacher_logits: TeacherLogits,
    target: Tensor | None = None,
    *,
    beta: float = 0.5,
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
) -> Tensor | tuple[Tensor, DistillationParts]:
    r"""Generalised Jensen–Shannon divergence, used for language models by Agarwal et al., "On-Policy Distillation of
    Language Models" (arXiv:2306.13649).

    With :math:`p(T), q(T)` the softmax of the student's and the teacher's logits at temperature T:

    .. math::
        L = T^2 \bigl(\beta \, \mathrm{KL}(q(T) \| m) + (1 - \beta) \, \mathrm{KL}(p(T) \| m)\bigr)
            + \mathrm{ce\_weight} \cdot \mathrm{CE}(student, target), \quad m = \beta q(T) + (1 - \beta) p(T)

    The formula itself is 0 at :math:`\beta = 0` and at 1. As in the paper, these two values mean something else:
    :math:`\beta = 0` is :math:`T^2 \mathrm{KL}(q \| p)`, which is :func:`kd_loss`, and :math:`\beta = 1` is
    :math:`T^2 \mathrm{KL}(p \| q)`. These are the limits of the loss divided by :math:`\beta` or :math:`1 - \beta`. So
    the loss jumps at both ends, and close to them it is nearly 0: keep a schedule of beta away from both.

    Args:
        beta: From 0 to 1; 0 and 1 are special, as above.
        ignore_index: Rows with this class index, such as the padding of a text, are left out and get a zero gradient.

    Example:
        >>> js_loss(student_logits, teacher_logits, token_ids, beta=0.5, ignore_index=pad_id).backward()
    """
    checks.check_share("beta", beta)
    return row_loss(
        "js",
        DistillationParts,
        (student_logits, teacher_logits, target),
        {"beta": beta, "temperature": temperature, "ce_weight": ce_weight, "label_smoothing": label_smoothing},
        {"logit_standardization": logit_standardization, "reduction": reduction, "ignore_index": ignore_index},
        (weight, normalizer, class_dim, num_classes, backend, return_parts),
    )


class JSLoss(UnlabelledCriterion[DistillationParts]):
    """Generalised Jensen–Shannon divergence; :func:`fused_kd.js_loss` documents every argument.

    Example:
        >>> criterion = JSLoss(beta=0.5)
        >>> loss = criterion(student_logits, teacher_logits)
    """

    beta: Scheduled

    _function = staticmethod(js_loss)
    _own_checks: ClassVar = {"beta": checks.check_share}

    def __init__(
        self, beta: Scheduled = 0.5, temperature: Scheduled = 1.0, ce_weight: Scheduled = 0.0,
        label_smoothing: Scheduled = 0.0, logit_standardization: bool = False, ignore_index: int = -100,
        reduction: str = "mean", backend: str = "auto", class_dim: int | None = None, num_classes: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(locals())
