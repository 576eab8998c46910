"""USKD, with the weak classifier that it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor, nn

from fused_kd import _checks, functional
from fused_kd.modules._criterion import Criterion, Scheduled
from fused_kd.reference import USKDParts

if TYPE_CHECKING:  # it is there only where PyTorch was built with torch.distributed
    from torch.distributed import ProcessGroup


class USKDLoss(Criterion):
    """Universal self-knowledge distillation; :func:`fused_kd.uskd_loss` documents every argument.

    It owns the linear layer, ``weak_classifier``, that makes the weak logits of an earlier feature of the network: give
    its parameters to the optimizer, and move the module to the network's device. The paper takes the feature map after
    stage 2 of a CNN, and the class token after block L/2 of a vision transformer with L blocks; the weak term's
    gradient flows through the layer into the network up to there. Under DistributedDataParallel wrap a module that has
    both, or this one as well.

    Args:
        in_features: Width D of the feature: the channels of a feature map, the width of a class token.
        num_classes: C.
        alpha: Weight of the target term.
        beta: Weight of the non-target term.
        mu: Weight of the weak supervision.
        ce_weight: Weight of the ordinary cross-entropy computed in the same pass.
        label_smoothing: Of the cross-entropy's labels.
        rank: The key that ranks the classes: ``"normalized"``, ``"cls_kd"``, ``"weak"``, ``"final"`` or ``"sum"``.
        square: False puts p where the target's label has its square.
        process_group: Take the batch mean over all processes of this group. ``torch.distributed.group.WORLD`` is None,
            which is no group, before ``init_process_group``. A module with a group cannot be pickled or deep-copied, as
            the group cannot; its ``state_dict`` can.
        ignore_index: Rows with this class index count nowhere.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``.
        class_dim: The dimension of the classes, and of D in the feature.

    Shape:
        ``student_logits`` ``(N, C)``; ``feature`` ``(N, D)``, or ``(N, D, H, W)``, which is averaged over H and W;
        ``target`` ``(N,)`` indices or ``(N, C)`` probabilities; ``weight`` ``(N,)``; the loss is a scalar, or ``(N,)``
        for ``reduction="none"``. Or logits of more dimensions, and a feature of their shape with D for C: with
        ``class_dim=1`` ``(N, C, H, W)`` and ``(N, D, H, W)``, where every position has a feature of its own.

    Example:
        >>> criterion = USKDLoss(in_features=256, num_classes=1000)
        >>> loss = criterion(student_logits, feature, target)
    """

    alpha: Scheduled
    beta: Scheduled
    mu: Scheduled
    rank: str
    square: bool
    process_group: ProcessGroup | None

    _function = staticmethod(functional.uskd_loss)
    _further = ("in_features", "num_classes")

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        alpha: Scheduled = 1.0,
        beta: Scheduled = 0.1,
        mu: Scheduled = 0.005,
        ce_weight: Scheduled = 0.0,
        label_smoothing: Scheduled = 0.0,
        rank: str = "normalized",
        square: bool = True,
        process_group: ProcessGroup | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        class_dim: int | None = None,
    ) -> None:
        super().__init__(locals())
        _checks.check_count("in_features", in_features, 1)
        _checks.check_count("num_classes", num_classes, 2)
        self.weak_classifier = nn.Linear(in_features, num_classes)

    @overload
    def forward(
        self, student_logits: Tensor, feature: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        return_parts: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, student_logits: Tensor, feature: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        return_parts: Literal[True],
    ) -> tuple[Tensor, USKDParts]: ...  # fmt: skip

    @overload
    def forward(
        self, student_logits: Tensor, feature: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        return_parts: bool,
    ) -> Tensor | tuple[Tensor, USKDParts]: ...  # fmt: skip

    def forward(
        self,
        student_logits: Tensor,
        feature: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, USKDParts]:
        dim = self._check(student_logits, feature)
        if feature.dim() == 4 and student_logits.dim() == 2:
            feature = feature.mean(dim=(2, 3))
        weak_logits = self.weak_classifier(feature.movedim(dim, -1)).movedim(-1, dim)
        result: Tensor | tuple[Tensor, USKDParts] = self._call(
            student_logits, weak_logits, target, weight=weight, return_parts=return_parts
        )
        return result

    def _check(self, student_logits: Tensor, feature: Tensor) -> int:
        """The dimension of the classes."""
        width, num_classes = self.weak_classifier.in_features, self.weak_classifier.out_features
        for name, tensor in (("student_logits", student_logits), ("feature", feature)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        shape = tuple(student_logits.shape)
        dim = _checks.class_dimension(student_logits, self._value("class_dim"))
        if len(shape) < 2 or shape[dim] != num_classes:
            raise ValueError(
                f"student_logits: expected shape (N, {num_classes}), or more dimensions with num_classes={num_classes} "
                f"in dimension {dim}, which is class_dim, got {shape}"
            )
        wanted = (*shape[:dim], width, *shape[dim + 1 :])
        averaged = len(shape) == 2 and dim == 1 and feature.dim() == 4
        if tuple(feature.shape[:2] if averaged else feature.shape) != wanted:
            maps = f" or ({shape[0]}, {width}, H, W)" if len(shape) == 2 and dim == 1 else ""
            raise ValueError(
                f"feature: expected shape {wanted}{maps}, of in_features={width} and as many rows as student_logits, "
                f"got {tuple(feature.shape)}"
            )
        return dim
