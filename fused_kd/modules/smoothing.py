"""Losses without a teacher: Tf-KD and Zipf's label smoothing."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fused_kd import functional
from fused_kd.modules._criterion import Criterion, Scheduled
from fused_kd.reference import DistillationParts


class TfKDLoss(Criterion):
    """Teacher-free distillation from a virtual teacher; :func:`fused_kd.tf_kd_loss` documents every argument.

    Example:
        >>> criterion = TfKDLoss(ce_weight=1.0)
        >>> loss = criterion(student_logits, target)
    """

    correct: Scheduled
    temperature: Scheduled

    _function = staticmethod(functional.tf_kd_loss)

    def __init__(
        self,
        correct: Scheduled = 0.99,
        temperature: Scheduled = 20.0,
        ce_weight: Scheduled = 0.0,
        label_smoothing: Scheduled = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        class_dim: int | None = None,
    ) -> None:
        super().__init__(locals())

    @overload
    def forward(
        self, student_logits: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        return_parts: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, student_logits: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        return_parts: Literal[True],
    ) -> tuple[Tensor, DistillationParts]: ...  # fmt: skip

    @overload
    def forward(
        self, student_logits: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        return_parts: bool,
    ) -> Tensor | tuple[Tensor, DistillationParts]: ...  # fmt: skip

    def forward(
        self, student_logits: Tensor, target: Tensor, *, weight: Tensor | None = None, return_parts: bool = False
    ) -> Tensor | tuple[Tensor, DistillationParts]:
        result: Tensor | tuple[Tensor, DistillationParts] = self._call(
            student_logits, target, weight=weight, return_parts=return_parts
        )
        return result


class ZipfLSLoss(Criterion):
    """Zipf's label smoothing; :func:`fused_kd.zipf_ls_loss` documents every argument.

    Example:
        >>> criterion = ZipfLSLoss(beta=0.1, ce_weight=1.0)
        >>> loss = criterion(student_logits, dense_logits, target)
    """

    beta: Scheduled
    power: Scheduled

    _function = staticmethod(functional.zipf_ls_loss)

    def __init__(
        self,
        beta: Scheduled = 0.1,
        power: Scheduled = 1.0,
        ce_weight: Scheduled = 0.0,
        label_smoothing: Scheduled = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        class_dim: int | None = None,
    ) -> None:
        super().__init__(locals())

    @overload
    def forward(
        self, student_logits: Tensor, dense_logits: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        return_parts: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, student_logits: Tensor, dense_logits: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        return_parts: Literal[True],
    ) -> tuple[Tensor, DistillationParts]: ...  # fmt: skip

    @overload
    def forward(
        self, student_logits: Tensor, dense_logits: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        return_parts: bool,
    ) -> Tensor | tuple[Tensor, DistillationParts]: ...  # fmt: skip

    def forward(
        self,
        student_logits: Tensor,
        dense_logits: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, DistillationParts]:
        result: Tensor | tuple[Tensor, DistillationParts] = self._call(
            student_logits, dense_logits, target, weight=weight, return_parts=return_parts
        )
        return result
