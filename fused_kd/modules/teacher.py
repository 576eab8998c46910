"""Losses with a teacher."""

from __future__ import annotations

from typing import ClassVar

from fused_kd import _checks, functional
from fused_kd.modules._criterion import Scheduled, TeacherCriterion, UnlabelledCriterion
from fused_kd.reference import DistillationParts, DISTParts, LossParts


class NKDLoss(TeacherCriterion[LossParts]):
    """Normalized knowledge distillation; :func:`fused_kd.nkd_loss` documents every argument.

    Example:
        >>> criterion = NKDLoss(gamma=1.5, temperature=1.0)
        >>> loss = criterion(student_logits, teacher_logits, target)
    """

    gamma: Scheduled

    _function = staticmethod(functional.nkd_loss)

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


class KDLoss(UnlabelledCriterion[DistillationParts]):
    """Knowledge distillation; :func:`fused_kd.kd_loss` documents every argument.

    Example:
        >>> criterion = KDLoss(temperature=4.0)
        >>> loss = criterion(student_logits, teacher_logits)
    """

    _function = staticmethod(functional.kd_loss)

    def __init__(
        self,
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


class DKDLoss(TeacherCriterion[LossParts]):
    """Decoupled knowledge distillation; :func:`fused_kd.dkd_loss` documents every argument.

    Example:
        >>> criterion = DKDLoss(alpha=1.0, beta=8.0)
        >>> loss = criterion(student_logits, teacher_logits, target)
    """

    alpha: Scheduled
    beta: Scheduled

    _function = staticmethod(functional.dkd_loss)

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


class WSLDLoss(TeacherCriterion[DistillationParts]):
    """Weighted soft labels; :func:`fused_kd.wsld_loss` documents every argument.

    Example:
        >>> criterion = WSLDLoss(ce_weight=1.0)
        >>> loss = criterion(student_logits, teacher_logits, target)
    """

    alpha: Scheduled

    _function = staticmethod(functional.wsld_loss)

    def __init__(
        self,
        alpha: Scheduled = 2.5,
        temperature: Scheduled = 2.0,
        ce_weight: Scheduled = 0.0,
        label_smoothing: Scheduled = 0.0,
        logit_standardization: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        class_dim: int | None = None,
    ) -> None:
        super().__init__(locals())


class JSLoss(UnlabelledCriterion[DistillationParts]):
    """Generalised Jensen–Shannon divergence; :func:`fused_kd.js_loss` documents every argument.

    Example:
        >>> criterion = JSLoss(beta=0.5)
        >>> loss = criterion(student_logits, teacher_logits)
    """

    beta: Scheduled

    _function = staticmethod(functional.js_loss)
    _own_checks: ClassVar = {"beta": _checks.check_share}

    def __init__(
        self,
        beta: Scheduled = 0.5,
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


class DISTLoss(UnlabelledCriterion[DISTParts]):
    """DIST, by correlations along rows and columns; :func:`fused_kd.dist_loss` documents every argument.

    Example:
        >>> criterion = DISTLoss(beta=1.0, gamma=1.0)
        >>> loss = criterion(student_logits, teacher_logits)
    """

    beta: Scheduled
    gamma: Scheduled

    _function = staticmethod(functional.dist_loss)

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
