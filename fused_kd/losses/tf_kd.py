"""Teacher-free knowledge distillation, with a virtual teacher."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fused_kd.losses._call import row_loss
from fused_kd.losses._criterion import Criterion, Scheduled
from fused_kd.losses._docs import documented
from fused_kd.losses._options import RowOptions, Unpack
from fused_kd.reference import DistillationParts
from fused_kd.sources import Logits


@overload
def tf_kd_loss(
    student_logits: Logits, target: Tensor, *, correct: float = ...,
    return_parts: Literal[False] = ..., **options: Unpack[RowOptions],
) -> Tensor: ...  # fmt: skip
@overload
def tf_kd_loss(
    student_logits: Logits, target: Tensor, *, correct: float = ...,
    return_parts: Literal[True], **options: Unpack[RowOptions],
) -> tuple[Tensor, DistillationParts]: ...  # fmt: skip
@overload
def tf_kd_loss(
    student_logits: Logits, target: Tensor, *, correct: float = ...,
    return_parts: bool, **options: Unpack[RowOptions],
) -> Tensor | tuple[Tensor, DistillationParts]: ...  # fmt: skip


@documented(
    DistillationParts,
    "The virtual teacher gives every class some probability, so the loss is +inf if there is such a class.",
)
def tf_kd_loss(
    student_logits: Logits,
    target: Tensor,
    *,
    correct: float = 0.99,
    temperature: float = 20.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    class_dim: int | None = None,
    num_classes: int | None = None,
    backend: str = "auto",
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, DistillationParts]:
    r"""Teacher-free distillation from a virtual teacher (Tf-KD) of Yuan et al., "Revisiting Knowledge Distillation via
    Label Smoothing Regularization" (arXiv:1909.11723).

    The virtual teacher gives the target class ``correct`` and every other class an equal share of the rest. These
    numbers, u, are softened at temperature T; :math:`p` is the student's softmax at temperature 1:

    .. math::
        L = \mathrm{KL}(\mathrm{softmax}(u / T) \| p) + \mathrm{ce\_weight} \cdot \mathrm{CE}(student, target)

    The mean divides by the number of rows; the published code divides by N·C. For Tf-KD's other form, with a frozen
    copy of the student as teacher, use :func:`kd_loss`.

    Args:
        target: + A row's largest probability is the virtual teacher's target, the lowest index on ties; CE uses all.
        correct: What the virtual teacher gives the target class, at least 0 and below 1.
        temperature: +; it applies only to the virtual teacher.

    Example:
        >>> tf_kd_loss(student_logits, target, ce_weight=1.0).backward()
    """
    return row_loss(
        "tf_kd",
        DistillationParts,
        (student_logits, None, target),
        {"correct": correct, "temperature": temperature, "ce_weight": ce_weight, "label_smoothing": label_smoothing},
        {"reduction": reduction, "ignore_index": ignore_index},
        (weight, normalizer, class_dim, num_classes, backend, return_parts),
    )


class TfKDLoss(Criterion):
    """Teacher-free distillation from a virtual teacher; :func:`fused_kd.tf_kd_loss` documents every argument.

    Example:
        >>> criterion = TfKDLoss(ce_weight=1.0)
        >>> loss = criterion(student_logits, target)
    """

    correct: Scheduled
    temperature: Scheduled
    num_classes: int | None

    _function = staticmethod(tf_kd_loss)

    def __init__(
        self, correct: Scheduled = 0.99, temperature: Scheduled = 20.0, ce_weight: Scheduled = 0.0,
        label_smoothing: Scheduled = 0.0, ignore_index: int = -100, reduction: str = "mean", backend: str = "auto",
        class_dim: int | None = None, num_classes: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(locals())

    @overload
    def forward(
        self, student_logits: Logits, target: Tensor, *, weight: Tensor | None = ...,
        normalizer: float | Tensor | None = ..., return_parts: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, student_logits: Logits, target: Tensor, *, weight: Tensor | None = ...,
        normalizer: float | Tensor | None = ..., return_parts: Literal[True],
    ) -> tuple[Tensor, DistillationParts]: ...  # fmt: skip
    @overload
    def forward(
        self, student_logits: Logits, target: Tensor, *, weight: Tensor | None = ...,
        normalizer: float | Tensor | None = ..., return_parts: bool,
    ) -> Tensor | tuple[Tensor, DistillationParts]: ...  # fmt: skip

    def forward(
        self, student_logits: Logits, target: Tensor, *, weight: Tensor | None = None,
        normalizer: float | Tensor | None = None, return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, DistillationParts]:  # fmt: skip
        return self._call(  # type: ignore[no-any-return]
            student_logits, target, weight=weight, normalizer=normalizer, return_parts=return_parts
        )
