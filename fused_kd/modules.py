"""nn.Module twins of the functions in :mod:`fused_kd.functional`: they keep the hyper-parameters, nothing else."""

from __future__ import annotations

from torch import Tensor, nn

from fused_kd import functional
from fused_kd.reference import LossParts

__all__ = ["NKDLoss"]


class NKDLoss(nn.Module):
    """Normalized knowledge distillation; :func:`fused_kd.nkd_loss` documents every argument.

    Args:
        gamma: Weight of the non-target term.
        temperature: Temperature of the non-target term.
        ce_weight: Weight of the ordinary cross-entropy computed in the same pass.
        ignore_index: Rows with this class index count nowhere.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``.

    Shape:
        ``student_logits`` and ``teacher_logits`` ``(..., C)``; ``target`` ``(...)`` indices or ``(..., C)``
        probabilities; the loss is a scalar, or ``(...)`` for ``reduction="none"``.

    Example:
        >>> criterion = NKDLoss(gamma=1.5, temperature=1.0)
        >>> loss = criterion(student_logits, teacher_logits, target)
    """

    def __init__(
        self,
        gamma: float = 1.5,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.backend = backend

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, return_parts: bool = False
    ) -> Tensor | tuple[Tensor, LossParts]:
        return functional.nkd_loss(  # type: ignore[call-overload, no-any-return]
            student_logits,
            teacher_logits,
            target,
            gamma=self.gamma,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            backend=self.backend,
            return_parts=return_parts,
        )

    def extra_repr(self) -> str:
        return (
            f"gamma={self.gamma}, temperature={self.temperature}, ce_weight={self.ce_weight}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, backend={self.backend!r}"
        )
