"""What gradients are multiplied by when they are stored, and its way back: see :mod:`fused_kd.ops`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_kd.reference.rows import usable_weight


def stored_scale(dtype: torch.dtype, bound: float) -> float:
    """The power of two times which a gradient of magnitude up to ``bound`` is stored, one that float32 can undo."""
    return 2.0 ** math.floor(math.log2(2.0**15 / max(bound, 2.0**-64))) if dtype == torch.float16 else 1.0


def to_half(gradient: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 gradient, which is overwritten, in float16, times the power of two that brings its largest finite entry
    to 2^14 or more and below 2^15; and ``norm`` less that power.

    Any smaller power would lose small entries, and a larger one make the largest infinite whatever a GradScaler does.
    """
    if gradient.numel() == 0:
        return gradient.half(), norm
    largest = gradient.abs().nan_to_num_(nan=0.0, posinf=0.0).amax()
    power = torch.exp2(15.0 - torch.frexp(largest).exponent.clamp(min=-64).double())
    return gradient.mul_(power.to(gradient.dtype)).half(), (norm / power).to(norm.dtype)


def counted_weight(row_weight: Tensor | None, target: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What each row weighs, (N,): 1 without weights, and 0 where the row is ignored."""
    weight = target.new_ones(target.shape[:1], dtype=dtype) if row_weight is None else usable_weight(row_weight, dtype)
    return weight if target.is_floating_point() else torch.where(target == ignore_index, 0.0, weight)


def counted_rows(row_weight: Tensor | None, target: Tensor, ignore_index: int) -> Tensor:
    """Which rows count, (N,)."""
    dtype = torch.float32 if row_weight is None else row_weight.dtype
    return counted_weight(row_weight, target, ignore_index, dtype) != 0


def shared_weight(row_weight: Tensor | None, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """:func:`counted_weight` in float64, over the sum of all for a mean."""
    weight = counted_weight(row_weight, target, ignore_index, torch.float64)
    if reduction != "mean":
        return weight
    total = weight.sum()
    return weight / torch.where(total == 0, 1.0, total)


def row_factors(
    row_weight: Tensor | None, target: Tensor, ignore_index: int, reduction: str, dtypes: tuple[torch.dtype, ...]
) -> tuple[Tensor | None, str, tuple[Tensor | None, ...]]:
    """What kernels multiply rows by: float64 (1 + gradients, N), the first for the parts, then one per gradient, whose
    ``dtypes`` are given; the reduction that is left to them; and what each gradient's norm is to be multiplied by.

    A mean's factors are divided by the sum of the weights. A gradient in float16 has them times the power of two that
    makes the largest one from 1/2 to 1, so that it neither underflows nor overflows; its norm takes that back.
    """
    if row_weight is None:
        return None, reduction, (None,) * len(dtypes)
    weight = shared_weight(row_weight, target, ignore_index, reduction)
    factors = [weight]
    norms: list[Tensor | None] = []
    for dtype in dtypes:
        half = dtype == torch.float16 and len(weight) > 0
        power = torch.exp2(torch.frexp(weight.amax()).exponent.double()) if half else None
        factors.append(weight if power is None else weight / power)
        norms.append(power)
    return torch.stack(factors), "sum" if reduction == "mean" else reduction, tuple(norms)
