"""Losses with a teacher."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fused_kd import _checks, functional
from fused_kd.modules._criterion import Criterion
from fused_kd.reference import DistillationParts, DISTParts, LossParts


class NKDLoss(Criterion):
    """Normalized knowledge distillation; :func:`fused_kd.nkd_loss` documents every argument.

    Example:
        >>> criterion = NKDLoss(gamma=1.5, temperature=1.0)
        >>> loss = criterion(student_logits, teacher_logits, target)
    """

    _function = staticmethod(functional.nkd_loss)

    def __init__(
        self,
        gamma: float = 1.5,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
        logit_standardization: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        class_dim: int | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, LossParts]:
        result: Tensor | tuple[Tensor, LossParts] = self._call(
            student_logits, teacher_logits, target, weight=weight, return_parts=return_parts
        )
        return result


class KDLoss(Criterion):
    """Knowledge distillation; :func:`fused_kd.kd_loss` documents every argument.

    Example:
        >>> criterion = KDLoss(temperature=4.0)
        >>> loss = criterion(student_logits, teacher_logits)
    """

    _function = staticmethod(functional.kd_loss)

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
        logit_standardization: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        class_dim: int | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, DistillationParts]:
        result: Tensor | tuple[Tensor, DistillationParts] = self._call(
            student_logits, teacher_logits, target, weight=weight, return_parts=return_parts
        )
        return result


class DKDLoss(Criterion):
    """Decoupled knowledge distillation; :func:`fused_kd.dkd_loss` documents every argument.

    Example:
        >>> criterion = DKDLoss(alpha=1.0, beta=8.0)
        >>> loss = criterion(student_logits, teacher_logits, target)
    """

    _function = staticmethod(functional.dkd_loss)

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
        logit_standardization: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        class_dim: int | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, LossParts]:
        result: Tensor | tuple[Tensor, LossParts] = self._call(
            student_logits, teacher_logits, target, weight=weight, return_parts=return_parts
        )
        return result


class WSLDLoss(Criterion):
    """Weighted soft labels; :func:`fused_kd.wsld_loss` documents every argument.

    Example:
        >>> criterion = WSLDLoss(ce_weight=1.0)
        >>> loss = criterion(student_logits, teacher_logits, target)
    """

    _function = staticmethod(functional.wsld_loss)

    def __init__(
        self,
        alpha: float = 2.5,
        temperature: float = 2.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
        logit_standardization: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        class_dim: int | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, DistillationParts]:
        result: Tensor | tuple[Tensor, DistillationParts] = self._call(
            student_logits, teacher_logits, target, weight=weight, return_parts=return_parts
        )
        return result


class JSLoss(Criterion):
    """Generalised Jensen–Shannon divergence; :func:`fused_kd.js_loss` documents every argument.

    Example:
        >>> criterion = JSLoss(beta=0.5)
        >>> loss = criterion(student_logits, teacher_logits)
    """

    _function = staticmethod(functional.js_loss)
    _own_checks: ClassVar = {"beta": _checks.check_share}

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
        logit_standardization: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        class_dim: int | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, DistillationParts]:
        result: Tensor | tuple[Tensor, DistillationParts] = self._call(
            student_logits, teacher_logits, target, weight=weight, return_parts=return_parts
        )
        return result


class DISTLoss(Criterion):
    """DIST, by correlations along rows and columns; :func:`fused_kd.dist_loss` documents every argument.

    Example:
        >>> criterion = DISTLoss(beta=1.0, gamma=1.0)
        >>> loss = criterion(student_logits, teacher_logits)
    """

    _function = staticmethod(functional.dist_loss)

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
        logit_standardization: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        class_dim: int | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, DISTParts]:
        result: Tensor | tuple[Tensor, DISTParts] = self._call(
            student_logits, teacher_logits, target, weight=weight, return_parts=return_parts
        )
        return result
