"""The factor of a stored gradient, and how to undo it: see :mod:`fused_kd.ops`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_kd.reference.rows import usable_weight


def stored_scale(dtype: torch.dtype, bound: float) -> float:
    """Return the power of two that scales a stored gradient of magnitude up to ``bound``. Float32 can undo it."""
    return 2.0 ** math.floor(math.log2(2.0**15 / max(bound, 2.0**-64))) if dtype == torch.float16 else 1.0


def to_half(gradient: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Convert a float32 gradient to float16, scaled by a power of two, and divide ``norm`` by that power. The gradient
    is overwritten.

    The power brings the largest finite entry to 2^14 or more and below 2^15. A smaller power would lose small entries.
    A larger one would make the largest entry infinite whatever a GradScaler does.
    """
    if gradient.numel() == 0:
        return gradient.half(), norm
    largest = gradient.abs().nan_to_num_(nan=0.0, posinf=0.0).amax()
    power = torch.exp2(15.0 - torch.frexp(largest).exponent.clamp(min=-64).double())
    return gradient.mul_(power.to(gradient.dtype)).half(), (norm / power).to(norm.dtype)


def counted_weight(row_weight: Tensor | None, target: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """Return the weight of each row, (N,): 1 without weights, and 0 for an ignored row."""
    if row_weight is None and not target.is_floating_point():
        return (target != ignore_index).to(dtype)
    weight = target.new_ones(target.shape[:1], dtype=dtype) if row_weight is None else usable_weight(row_weight, dtype)
    return weight if target.is_floating_point() else torch.where(target == ignore_index, 0.0, weight)


def counted_rows(row_weight: Tensor | None, target: Tensor, ignore_index: int) -> Tensor:
    """Return a mask of the rows that count, (N,)."""
    dtype = torch.float32 if row_weight is None else row_weight.dtype
    return counted_weight(row_weight, target, ignore_index, dtype) != 0


def reduction_weight(row_weight: Tensor | None, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Return :func:`counted_weight` in float64, divided by its sum for a mean."""
    weight = counted_weight(row_weight, target, ignore_index, torch.float64)
    if reduction != "mean":
        return weight
    total = weight.sum()
    # A number of rows needs fewer operations, each a launch on a GPU.
    return weight / (total.clamp(min=1.0) if row_weight is None else torch.where(total == 0, 1.0, total))


def row_factors(
    row_weight: Tensor | None, target: Tensor, ignore_index: int, reduction: str, dtypes: tuple[torch.dtype, ...]
) -> tuple[Tensor | None, str, tuple[Tensor | None, ...]]:
    """Return the factors of the rows, the reduction that is left to the kernels, and a factor for each gradient's norm.

    The factors are float64 (1 + gradients, N): the first row for the parts, then one per gradient in ``dtypes``. For a
    mean they are divided by the sum of the weights. For a float16 gradient they are also scaled by a power of two that
    brings the largest one between 1/2 and 1, so that the gradient neither underflows nor overflows; the factor of its
    norm undoes that.
    """
    if row_weight is None:
        return None, reduction, (None,) * len(dtypes)
    weight = reduction_weight(row_weight, target, ignore_index, reduction)
    factors = [weight]
    norms: list[Tensor | None] = []
    for dtype in dtypes:
        half = dtype == torch.float16 and len(weight) > 0
        power = torch.exp2(torch.frexp(weight.amax()).exponent.double()) if half else None
        factors.append(weight if power is None else weight / power)
        norms.append(power)
    return torch.stack(factors), "sum" if reduction == "mean" else reduction, tuple(norms)
