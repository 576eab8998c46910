"""The parts of KD, NKD and DKD side by side, to rebuild the paper's ablations by weighting them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_kd import reference
from fused_kd.core import checks
from fused_kd.core.row_errors import check_target_values
from fused_kd.losses._options import checked
from fused_kd.reference import Decomposition


def decompose(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    class_dim: int | None = None,
) -> Decomposition:
    r"""The parts of KD, NKD and DKD, as in sections 5.1 and G of arXiv:2303.13005.

    It is for ablations, and the reference computes it. :math:`p, q` are the student's and the teacher's softmax,
    :math:`y` is the target class, and a hat means the softmax over the other classes. The parts are unweighted and
    differentiable in the student:

    ``kd_target``
        :math:`-T^2 q_y(T) \log p_y(T)`
    ``kd_non_target``
        :math:`-T^2 \sum_{j \ne y} q_j(T) \log p_j(T)`; the sum of these two is KD's cross-entropy, that is KD
        plus :math:`T^2 H(q(T))`
    ``nkd_non_target``
        :math:`-T^2 \sum_{j \ne y} \hat q_j \log \hat p_j`
    ``dkd_binary``
        :math:`T^2 \mathrm{KL}(b_t \| b_s)`, :math:`b = (p_y(T), 1 - p_y(T))`
    ``dkd_non_target``
        :math:`T^2 \mathrm{KL}(\hat q \| \hat p)`
    ``nkd_target``
        :math:`-q_y \log p_y` at temperature 1

    NKD is nkd_target + gamma nkd_non_target, and DKD is alpha dkd_binary + beta dkd_non_target.

    Args:
        student_logits: Unnormalised scores ``(..., C)``, C at least 2, float64, float32, float16 or bfloat16.
        teacher_logits: The teacher's logits: same shape and device, any of those dtypes; must not require grad.
        target: Class indices ``(...)`` or ``(..., 1)``, or class probabilities ``(..., C)``: then each row's
            largest entry is the target, the lowest index on ties.
        temperature: T above.
        ignore_index: Rows with this class index are left out.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.
        class_dim: The dimension of the classes, as for :func:`fused_kd.nkd_loss`.

    Shape:
        Each part is a scalar, or has the shape of the class indices for ``reduction="none"``; float64 if any logits
        are, else float32.

    Returns:
        A named tuple of the six parts.

    Raises:
        TypeError, ValueError, IndexError: As :func:`fused_kd.nkd_loss`.

    Example:
        >>> parts = fused_kd.decompose(student_logits, teacher_logits, target)
        >>> nkd_with_binary = parts.nkd_target + 1.5 * parts.nkd_non_target + 0.5 * parts.dkd_binary
    """
    rows = checks.flatten(student_logits, teacher_logits, "teacher_logits", target, class_dim)
    checks.check_teacher_detached(teacher_logits, student_logits)
    options: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index}
    options |= checked({"temperature": temperature}, options)
    check_target_values(rows.target, None, rows.student_logits.shape[1], ignore_index)
    tensors: Any = rows[:3]
    parts = reference.decompose(*tensors, **options)
    if reduction == "none" and len(rows.shape) != 1:
        return Decomposition(*(part.reshape(rows.shape) for part in parts))
    return parts
