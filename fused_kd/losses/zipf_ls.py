"""Zipf's label smoothing."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from fused_kd import autograd, direct, reference
from fused_kd.core import checks
from fused_kd.losses._call import call
from fused_kd.losses._criterion import Criterion, Scheduled
from fused_kd.losses._docs import documented
from fused_kd.losses._options import Common, LossOptions, Unpack, checked
from fused_kd.reference import DistillationParts


@overload
def zipf_ls_loss(
    student_logits: Tensor, dense_logits: Tensor, target: Tensor, *, beta: float = ..., power: float = ...,
    return_parts: Literal[False] = ..., **options: Unpack[LossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def zipf_ls_loss(
    student_logits: Tensor, dense_logits: Tensor, target: Tensor, *, beta: float = ..., power: float = ...,
    return_parts: Literal[True], **options: Unpack[LossOptions],
) -> tuple[Tensor, DistillationParts]: ...  # fmt: skip
@overload
def zipf_ls_loss(
    student_logits: Tensor, dense_logits: Tensor, target: Tensor, *, beta: float = ..., power: float = ...,
    return_parts: bool, **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, DistillationParts]: ...  # fmt: skip


@documented(
    DistillationParts,
    """If that class is not a target, it leaves the non-target set, as in USKD: it gets no Zipf weight but keeps its
    place in the ranking, and the other weights are renormalised, so the divergence stays finite. The dense logits only
    vote: -inf is the smallest number, +inf the largest, and a NaN acts like one in the student's row.""",
)
def zipf_ls_loss(
    student_logits: Tensor,
    dense_logits: Tensor,
    target: Tensor,
    *,
    beta: float = 0.1,
    power: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    class_dim: int | None = None,
    backend: str = "auto",
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, DistillationParts]:
    r"""Zipf's label smoothing of Liang et al., "Efficient One Pass Self-distillation with Zipf's Label Smoothing"
    (arXiv:2207.12980).

    The classifier is applied to each position of the network's last feature map. Each position votes for its top class.
    The rank of a class is 1 plus the number of classes with more votes. With :math:`\hat p` the student's softmax over
    the classes that are not targets:

    .. math::
        L = \beta \cdot \mathrm{KL}(\hat z \| \hat p)
            + \mathrm{ce\_weight} \cdot \mathrm{CE}(student, target), \quad \hat z_j \propto \mathrm{rank}_j^{-power}

    Args:
        student_logits: Unnormalised scores ``(..., C)``, C at least 2, float64, float32, float16 or bfloat16.
        dense_logits: The classifier's logits at each of P positions, ``(..., P, C)``, any of those dtypes, same device.
            For a feature map ``(N, C, H, W)`` of logits pass ``logits.flatten(2).transpose(1, 2)``. No gradient flows
            here. ``...`` is the shape of the rows; ``class_dim`` does not apply to these logits.
        target: Class indices ``(...)`` or ``(..., 1)``, or class probabilities ``(..., C)``, with one or two
            targets as in :func:`uskd_loss`.
        beta: Weight of the divergence; the paper uses 0.1.
        power: Exponent of the rank in Zipf's law.

    Shape:
        The loss is a scalar, or has the shape of the class indices ``(...)`` for ``reduction="none"``. Its dtype is
        float64 if the student's logits are, else float32. The gradient has the dtype of ``student_logits``.

    Example:
        >>> dense_logits = classifier(feature_map.flatten(2).transpose(1, 2))  # (N, D, H, W) to (N, H·W, C)
        >>> zipf_ls_loss(student_logits, dense_logits, target, ce_weight=1.0).backward()
    """
    settings = {"reduction": reduction, "ignore_index": ignore_index}
    numbers = {"beta": beta, "power": power, "ce_weight": ce_weight, "label_smoothing": label_smoothing}
    common_arguments = (weight, normalizer, class_dim, None, backend, return_parts)
    tensors = (student_logits, dense_logits, target)
    if (result := direct.loss("zipf_ls", DistillationParts, tensors, numbers, settings, common_arguments)) is not None:
        return result
    common = Common._make(common_arguments)
    numbers = checked(numbers, settings, common)
    rows = checks.flatten(student_logits, None, None, target, class_dim)
    rows = checks.Rows(rows[0], checks.flatten_dense(dense_logits, student_logits, rows), *rows[2:])
    return call(
        "zipf_ls", reference.zipf_ls_loss, _fused, DistillationParts, student_logits, rows, numbers, settings, common
    )


def _fused(
    rows: checks.Rows, weight: Tensor | None, hyper: list[float], settings: dict[str, Any], chosen: str
) -> autograd.OpCall:
    student, dense, target, _ = rows
    assert dense is not None
    inputs, options = (dense.detach(), target, weight), (settings["ignore_index"], settings["reduction"])
    return autograd.op_call("zipf_ls", (student,), inputs, hyper, options, chosen)


class ZipfLSLoss(Criterion):
    """Zipf's label smoothing; :func:`fused_kd.zipf_ls_loss` documents every argument.

    Example:
        >>> criterion = ZipfLSLoss(beta=0.1, ce_weight=1.0)
        >>> loss = criterion(student_logits, dense_logits, target)
    """

    beta: Scheduled
    power: Scheduled

    _function = staticmethod(zipf_ls_loss)

    def __init__(
        self, beta: Scheduled = 0.1, power: Scheduled = 1.0, ce_weight: Scheduled = 0.0,
        label_smoothing: Scheduled = 0.0, ignore_index: int = -100, reduction: str = "mean", backend: str = "auto",
        class_dim: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(locals())

    @overload
    def forward(
        self, student_logits: Tensor, dense_logits: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        normalizer: float | Tensor | None = ..., return_parts: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, student_logits: Tensor, dense_logits: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        normalizer: float | Tensor | None = ..., return_parts: Literal[True],
    ) -> tuple[Tensor, DistillationParts]: ...  # fmt: skip
    @overload
    def forward(
        self, student_logits: Tensor, dense_logits: Tensor, target: Tensor, *, weight: Tensor | None = ...,
        normalizer: float | Tensor | None = ..., return_parts: bool,
    ) -> Tensor | tuple[Tensor, DistillationParts]: ...  # fmt: skip

    def forward(
        self, student_logits: Tensor, dense_logits: Tensor, target: Tensor, *, weight: Tensor | None = None,
        normalizer: float | Tensor | None = None, return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, DistillationParts]:  # fmt: skip
        return self._call(  # type: ignore[no-any-return]
            student_logits, dense_logits, target, weight=weight, normalizer=normalizer, return_parts=return_parts
        )
