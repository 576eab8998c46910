"""The errors for rows with values that they must not have, and the check for the reference, which has no kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kd.core.transforms import readable


def row_error(target: Tensor, row: int, num_classes: int, ignore_index: int) -> Exception:
    """Return the error for a row with a class index out of range, or with probabilities that do not sum to 1."""
    if target.is_floating_point():
        return ValueError(
            "target: expected class probabilities that sum to 1 in each row, got a row that sums to "
            f"{float(target[row].double().sum()):.6g}; divide by that, or pass weight= to give a row less weight"
        )
    return IndexError(
        f"target: expected class indices from 0 to {num_classes - 1}, or ignore_index {ignore_index}, "
        f"got {int(target[row])}"
    )


def kept_error(indices: Tensor, row: int, num_classes: int) -> Exception:
    """Return the error for a row of a top-k teacher: a class is out of range or appears twice, or all are pads."""
    name, given = "teacher_logits.indices", indices[row]
    none = given[(given < -1) | (given >= num_classes)]
    if none.numel():
        return IndexError(
            f"{name}: expected classes from 0 to {num_classes - 1}, or -1 for a pad, got {int(none[0])} in row {row}"
        )
    kept = given[given >= 0].sort().values
    if not kept.numel():
        return ValueError(f"{name}: expected a class in each row with rest='renormalize', got pads alone in row {row}")
    again = kept[1:][kept[1:] == kept[:-1]]
    return ValueError(f"{name}: expected each class once in a row, got {int(again[0])} twice in row {row}")


def check_target_values(target: Tensor, weight: Tensor | None, num_classes: int, ignore_index: int) -> None:
    """Raise :func:`row_error` for the first bad row, if reading the values does not stall. This is for the reference;
    fused backends check in their kernels."""
    if not readable(target):
        return
    if target.is_floating_point():
        # Sums of half-precision labels miss 1 by up to half a per cent. NaN is no error. As in csrc/cpu/core.cpp.
        bad = (target.double().sum(dim=1) - 1.0).abs() > 0.02
        if weight is not None:
            bad &= weight != 0
    else:
        bad = (target != ignore_index) & ((target < 0) | (target >= num_classes))
    if bool(bad.any()):
        raise row_error(target, int(bad.to(torch.uint8).argmax()), num_classes, ignore_index)
