"""Calls on meta tensors: what the cases of the compile matrix are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from fused_kd.backends.triton.compile import TYPES
from fused_kd.backends.triton.launch import Launch


class Call(Protocol):
    """A call whose kernels are compiled; picklable, since other processes do that."""

    @property
    def rows(self) -> int:
        """N."""

    @property
    def weighted(self) -> bool:
        """Whether they have weights."""

    @property
    def element_bytes(self) -> int:
        """Of the widest logits."""

    def launches(self) -> list[Launch]:
        """Every launch of a kernel that the call makes."""


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def logits(rows: int, classes: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Contiguous; "strided", whose neighbours are rows apart; or "offset", whose address no vector divides."""
    if layout == "strided":
        return empty(classes, rows, dtype=dtype).t()
    return empty(rows * classes + 1, dtype=dtype)[int(layout == "offset") :][: rows * classes].view(rows, classes)


def describe(dtypes: Iterable[torch.dtype]) -> str:
    return "/".join(dict.fromkeys(TYPES[dtype] for dtype in dtypes))


def targets(rows: int, classes: int, labels: torch.dtype | None) -> Tensor:
    return empty(rows, dtype=torch.int64) if labels is None else empty(rows, classes, dtype=labels)


def factors(call: Call, kinds: int) -> Tensor | None:
    """What weighs the rows; such calls reach a kernel with the reduction "sum" or "none"."""
    return empty(kinds, call.rows, dtype=torch.float64) if call.weighted else None


def prob(labels: torch.dtype | None, student: torch.dtype) -> list[str]:
    return [] if labels is None else ["prob"] if labels == student else [f"{TYPES[labels]} prob"]
