"""Universal self-knowledge distillation, with the weak classifier that its module trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor, nn

from fused_kd import autograd, direct, reference
from fused_kd.core import checks
from fused_kd.core.row_errors import check_target_values
from fused_kd.losses import _shards, _sources
from fused_kd.losses._call import call
from fused_kd.losses._criterion import Criterion, Scheduled
from fused_kd.losses._docs import documented
from fused_kd.losses._options import Common, LossOptions, Unpack, checked
from fused_kd.reference import USKDParts
from fused_kd.sources import Head, Logits

if TYPE_CHECKING:  # it is there only where PyTorch was built with torch.distributed
    from torch.distributed import ProcessGroup


@overload
def uskd_loss(
    student_logits: Logits, weak_logits: Logits, target: Tensor, *, alpha: float = ..., beta: float = ...,
    mu: float = ..., rank: str = ..., square: bool = ..., process_group: ProcessGroup | None = ...,
    return_parts: Literal[False] = ..., **options: Unpack[LossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def uskd_loss(
    student_logits: Logits, weak_logits: Logits, target: Tensor, *, alpha: float = ..., beta: float = ...,
    mu: float = ..., rank: str = ..., square: bool = ..., process_group: ProcessGroup | None = ...,
    return_parts: Literal[True], **options: Unpack[LossOptions],
) -> tuple[Tensor, USKDParts]: ...  # fmt: skip
@overload
def uskd_loss(
    student_logits: Logits, weak_logits: Logits, target: Tensor, *, alpha: float = ..., beta: float = ...,
    mu: float = ..., rank: str = ..., square: bool = ..., process_group: ProcessGroup | None = ...,
    return_parts: bool, **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, USKDParts]: ...  # fmt: skip


@documented(
    USKDParts,
    """If that class is not a target, it leaves the non-target set: it gets no Zipf weight but keeps its place in the
    ranking, and the other weights are renormalised. If it is a target with P other than 0, the target term is +inf. A
    weak logit of -inf makes the weak term +inf, since that term supervises every class; no gradient flows there.""",
    "among the student's logits or the labels, through the mean in P, the loss and the student's gradient of all rows",
)
def uskd_loss(
    student_logits: Logits,
    weak_logits: Logits,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    rank: str = "normalized",
    square: bool = True,
    process_group: ProcessGroup | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    class_dim: int | None = None,
    backend: str = "auto",
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, USKDParts]:
    r"""Universal self-knowledge distillation (USKD), Eq. 6 to 13 of "From Knowledge Distillation to Self-Knowledge
    Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels" (arXiv:2303.13005).

    There is no teacher. The soft labels come from the student's own softmax :math:`p` and from :math:`v`, the softmax
    of the weak logits, which a linear layer computes from an earlier feature. :math:`Y` is the set of a row's target
    classes: one, or two for a mixed label, with label values :math:`V_k`. :math:`\hat p` is the softmax over the
    classes outside :math:`Y`:

    .. math::
        L = -\alpha \sum_{k \in Y} P_k \log p_k - \beta \sum_{j \notin Y} \hat z_j \log \hat p_j
            - \mu \sum_j V'_j \log v_j + \mathrm{ce\_weight} \cdot \mathrm{CE}(student, target)

    .. math::
        P_k = p_k^2 + V_k - \mathrm{mean}_{batch}(p_k^2), \quad V'_j = 0.9 V_j + 0.1 / C, \quad
        \hat z_j = \frac{1 / r_j}{\sum_{k \notin Y} 1 / r_k}

    where :math:`r_j` is the rank of class j, from 1, when all C classes are sorted by descending key (among equal keys
    the lower class comes first). By default the key is

    .. math::
        R_j = \frac{v_j}{1 - \sum_{k \in Y} v_k + 10^{-6}} + \frac{p_j}{1 - \sum_{k \in Y} p_k + 10^{-6}}

    The gradient treats :math:`P` and :math:`\hat z` as constants. The student's gradient comes from all terms but the
    weak one; the gradient of the weak logits comes from that term only.

    If only one class is not a target, as with C = 2, the non-target term is 0.

    Args:
        student_logits: Unnormalised scores ``(..., C)``, C at least 2, float64, float32, float16 or bfloat16, or a
            :class:`fused_kd.Head`.
        weak_logits: The logits that a linear layer computes from an earlier feature: same shape and device, any of
            those dtypes, or a Head. :class:`fused_kd.USKDLoss` has that layer.
        target: Class indices ``(...)`` or ``(..., 1)``, or class probabilities ``(..., C)`` (mixup, CutMix, with or
            without label smoothing). Then the targets are the largest entries, at most two, that exceed the row's
            smallest; the lower index wins on ties. So a one-hot row has one target and a constant row none.
        alpha: Weight of the target term; the paper uses 1 for ImageNet, 0.1 for CIFAR-100.
        beta: Weight of the non-target term; the paper uses 0.1.
        mu: Weight of the weak supervision; the paper uses 0.005 for ImageNet, 0.1 for CIFAR-100.
        ce_weight: +; 1 gives Eq. 13.
        label_smoothing: + It does not change the labels of the weak supervision, :math:`V'` above.
        rank: The key that ranks the classes: ``"normalized"``, R above; ``"weak"``, v; ``"final"``, p; ``"sum"``,
            v + p; or ``"cls_kd"``, which has logarithms in the second fraction of R, like the newest commit of the
            published code.
        square: False uses :math:`p_k` in P in place of :math:`p_k^2`.
        process_group: Take the mean in P over all processes of this group, such as ``torch.distributed.group.WORLD``,
            by one all-reduce of three numbers. Every process of the group must make the call. By default the mean is
            over this batch. ``reduction`` stays within the process.
        ignore_index: Rows with this class index are left out, also of the mean in P, and get a zero gradient.
        weight: Weight of each row, ``(...)``: a boolean mask or floating-point numbers, at least 0, without gradient.
            It is not a weight per class, as in cross_entropy; with as many rows as classes, no check can tell the two
            apart. ``"none"`` gives :math:`w_i L_i`, ``"sum"`` their sum, and ``"mean"`` that sum over
            :math:`\sum_i w_i` of the rows that count. A row of weight 0 adds nothing to the loss and has zero
            gradients. The mean in P counts all rows equally.

    Shape:
        The loss is a scalar, or has the shape of the class indices ``(...)`` for ``reduction="none"``. Its dtype is
        float64 if any logits are, else float32. Each gradient has the dtype of its logits.

    Raises:
        ValueError: + Or ``process_group`` is given but torch.distributed is not initialised.
        IndexError: + Through the mean in P an index out of range makes the target terms of all rows NaN.

    Example:
        >>> student_logits, weak_logits = (torch.randn(8, 1000, requires_grad=True) for _ in range(2))
        >>> target = torch.randint(1000, (8,))
        >>> uskd_loss(student_logits, weak_logits, target, ce_weight=1.0).backward()
    """
    numbers = {"alpha": alpha, "beta": beta, "mu": mu, "ce_weight": ce_weight, "label_smoothing": label_smoothing}
    settings: dict[str, Any] = {"rank": rank, "square": square, "ignore_index": ignore_index}
    settings |= {"process_group": process_group, "reduction": reduction}
    common_arguments = (weight, normalizer, class_dim, None, backend, return_parts)
    tensors = (student_logits, weak_logits, target)
    if (result := direct.loss("uskd", USKDParts, tensors, numbers, settings, common_arguments)) is not None:
        return result
    common = Common._make(common_arguments)
    numbers = checked(numbers, settings, common)
    plain = type(student_logits) is Tensor and type(weak_logits) is Tensor
    if not plain and (_sources.is_source(student_logits) or _sources.is_source(weak_logits)):
        return _sources.uskd(_eager, tensors, numbers, settings, common)
    student, weak = cast(Tensor, student_logits), cast(Tensor, weak_logits)
    rows = checks.flatten(student, weak, "weak_logits", target, class_dim)
    return call("uskd", _eager, _fused, USKDParts, student, rows, numbers, settings, common)


def _eager(
    student: Tensor, weak: Tensor, target: Tensor, *, process_group: ProcessGroup | None, **options: Any
) -> tuple[Tensor, USKDParts]:
    sums = _batch_sums((student, weak, target), options["square"], options["ignore_index"], "reference", process_group)
    return reference.uskd_loss(student, weak, target, **options, batch_sums=sums)


def _fused(
    rows: checks.Rows, weight: Tensor | None, hyper: list[float], settings: dict[str, Any], chosen: str
) -> autograd.OpCall:
    student, weak, target, _ = rows
    assert weak is not None
    rank, square, ignore_index = (settings[name] for name in ("rank", "square", "ignore_index"))
    sums = _batch_sums((student, weak, target), square, ignore_index, chosen, settings["process_group"])
    options = (rank, square, ignore_index, settings["reduction"])
    return autograd.op_call("uskd", (student, weak), (target, sums, weight), hyper, options, chosen)


class USKDLoss(Criterion):
    """Universal self-knowledge distillation; :func:`fused_kd.uskd_loss` documents the other arguments.

    It owns the linear layer, ``weak_classifier``, that computes the weak logits from an earlier feature of the network.
    Give its parameters to the optimizer, and move the module to the network's device. The paper takes the feature map
    after stage 2 of a CNN, or the class token after block L/2 of a vision transformer with L blocks. The gradient of
    the weak term flows through the layer into the part of the network before that feature. For DistributedDataParallel
    wrap a module that contains both the network and this module, or wrap this module as well.

    Args:
        in_features: Width D of the feature: the channels of a feature map, or the width of a class token.
        num_classes: The number of classes C.
        process_group: Take the batch mean over all processes of this group. Call ``init_process_group`` first: before,
            ``torch.distributed.group.WORLD`` is None, which means no group. A module with a group cannot be pickled or
            deep-copied, since the group cannot; its ``state_dict`` can.
        class_dim: The dimension of the classes, and of D in the feature.

    Shape:
        ``student_logits`` ``(N, C)`` or a :class:`fused_kd.Head` of them; ``feature`` ``(N, D)``, or ``(N, D, H, W)``,
        which is averaged over H and W; ``target`` ``(N,)`` indices or ``(N, C)`` probabilities; ``weight`` ``(N,)``;
        the loss is a scalar, or ``(N,)`` for ``reduction="none"``. Logits may have more dimensions; the feature then
        has their shape with D in place of C: with ``class_dim=1`` ``(N, C, H, W)`` and ``(N, D, H, W)``.

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

    _function = staticmethod(uskd_loss)
    _further = ("in_features", "num_classes")

    def __init__(
        self, in_features: int, num_classes: int, alpha: Scheduled = 1.0, beta: Scheduled = 0.1, mu: Scheduled = 0.005,
        ce_weight: Scheduled = 0.0, label_smoothing: Scheduled = 0.0, rank: str = "normalized", square: bool = True,
        process_group: ProcessGroup | None = None, ignore_index: int = -100, reduction: str = "mean",
        backend: str = "auto", class_dim: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(locals())
        checks.check_count("in_features", in_features, 1)
        checks.check_count("num_classes", num_classes, 2)
        self.weak_classifier = nn.Linear(in_features, num_classes)

    @overload
    def forward(
        self, student_logits: Logits, feature: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        normalizer: float | Tensor | None = ..., return_parts: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, student_logits: Logits, feature: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        normalizer: float | Tensor | None = ..., return_parts: Literal[True],
    ) -> tuple[Tensor, USKDParts]: ...  # fmt: skip
    @overload
    def forward(
        self, student_logits: Logits, feature: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        normalizer: float | Tensor | None = ..., return_parts: bool,
    ) -> Tensor | tuple[Tensor, USKDParts]: ...  # fmt: skip

    def forward(
        self, student_logits: Logits, feature: Tensor, target: Tensor, *, weight: Tensor | None = None,
        normalizer: float | Tensor | None = None, return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, USKDParts]:  # fmt: skip
        dim, averaged = self._check(student_logits, feature)
        if averaged:
            feature = feature.mean(dim=(2, 3))
        weak_logits: Logits
        if isinstance(student_logits, Head):
            weak_logits = Head(feature, self.weak_classifier.weight, self.weak_classifier.bias)
        else:
            weak_logits = self.weak_classifier(feature.movedim(dim, -1)).movedim(-1, dim)
        return self._call(  # type: ignore[no-any-return]
            student_logits, weak_logits, target, weight=weight, normalizer=normalizer, return_parts=return_parts
        )

    def _check(self, student_logits: Logits, feature: Tensor) -> tuple[int, bool]:
        """The dimension of the classes, and whether the feature is a map to be averaged."""
        width, num_classes = self.weak_classifier.in_features, self.weak_classifier.out_features
        order = "the order is student_logits, feature, target"
        if not isinstance(feature, Tensor) or not feature.is_floating_point():
            given = getattr(feature, "dtype", type(feature).__name__)
            raise TypeError(f"feature: expected a floating-point Tensor, got {given}; {order}")
        checks.check_logits("feature", feature)
        if num_classes in feature.shape and width not in feature.shape:
            raise ValueError(
                f"feature: expected width in_features={width}, got shape {tuple(feature.shape)}, which fits logits of "
                f"num_classes={num_classes}; {order}, and weak logits are for fused_kd.uskd_loss"
            )
        shape, dim = _sources.shape_of("student_logits", student_logits, self._value("class_dim"))
        if len(shape) < 2 or shape[dim] != num_classes:
            raise ValueError(
                f"student_logits: expected shape (N, {num_classes}), or more dimensions with num_classes={num_classes} "
                f"in dimension {dim}, which is class_dim, got {shape}"
            )
        wanted = (*shape[:dim], width, *shape[dim + 1 :])
        maps = len(shape) == 2 and dim == 1
        averaged = maps and feature.dim() == 4
        if tuple(feature.shape[:2] if averaged else feature.shape) != wanted:
            # Not before: a size in a text is a constant of a compiled graph, and each number of rows took one.
            or_maps = f" or ({shape[0]}, {width}, H, W)" if maps else ""
            raise ValueError(
                f"feature: expected shape {wanted}{or_maps}, of in_features={width} and as many rows as "
                f"student_logits, got {tuple(feature.shape)}"
            )
        return dim, averaged


def uskd_soft_labels(
    student_logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    *,
    rank: str = "normalized",
    square: bool = True,
    process_group: ProcessGroup | None = None,
    ignore_index: int = -100,
    class_dim: int | None = None,
) -> Tensor:
    r"""The labels that USKD makes for each class: :math:`P_k` at the targets, :math:`\hat z_j` elsewhere.

    They are for inspection, logs and plots such as the paper's Figure 3; :func:`uskd_loss` computes its own. The
    reference computes them.

    Args:
        student_logits: Unnormalised scores ``(..., C)``, as for :func:`uskd_loss`.
        weak_logits: The logits that a linear layer computes from an earlier feature, same shape and device.
        target: Class indices ``(...)`` or ``(..., 1)``, or class probabilities ``(..., C)``.
        rank: The key that ranks the classes.
        square: False uses :math:`p_k` in P in place of :math:`p_k^2`.
        process_group: Take the mean in P over all processes of this group.
        ignore_index: Rows with this class index are left out, and their labels are 0.
        class_dim: The dimension of the classes, as for :func:`uskd_loss`.

    Shape:
        That of the logits, float64 if any logits are, else float32.

    Returns:
        The labels, detached. The Zipf labels of a row sum to 1. P lies around the label's value and is not a
        probability. A label is 0 where the student's logit is -inf, and NaN in a row with a NaN.

    Raises:
        TypeError, ValueError, IndexError: As :func:`uskd_loss`.

    Example:
        >>> labels = uskd_soft_labels(student_logits, weak_logits, target)
        >>> values, classes = labels[0].topk(5)
    """
    rows = checks.flatten(student_logits, weak_logits, "weak_logits", target, class_dim)
    settings = {"rank": rank, "square": square, "ignore_index": ignore_index, "process_group": process_group}
    checked({}, settings)
    check_target_values(rows.target, None, rows.student_logits.shape[1], ignore_index)
    tensors: Any = rows[:3]
    sums = _batch_sums(tensors, square, ignore_index, "reference", process_group)
    labels = reference.uskd_soft_labels(*tensors, rank=rank, square=square, ignore_index=ignore_index, batch_sums=sums)
    dim = checks.class_dimension(student_logits, class_dim)
    return labels.reshape(*rows.shape, labels.shape[1]).movedim(-1, dim)


def _batch_sums(
    tensors: tuple[Tensor, Tensor, Tensor],
    square: bool,
    ignore_index: int,
    chosen: str,
    process_group: ProcessGroup | None,
) -> Tensor | None:
    """The sums that couple USKD's rows, over all processes of a group; None leaves them to the loss."""
    student, weak, target = tensors
    widened = weak.dtype == torch.float64 != student.dtype
    if process_group is None and (chosen == "reference" or not widened):
        return None
    if widened:
        student = student.double()  # as the loss itself will have it; the sums do not see the weak logits
    if chosen == "reference":
        sums = reference.uskd_batch_sums(student, target, square=square, ignore_index=ignore_index)
    else:
        sums = autograd.uskd_batch_sums(student, target, square, ignore_index, chosen)
    return _shards.sum_over_processes(sums, process_group)
