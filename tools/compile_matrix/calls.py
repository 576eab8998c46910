"""Calls on meta tensors, for the cases of the compile matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from fused_kd.backends.triton.launch import Launch
from tools.compile_matrix.machine_code import TYPES


class Call(Protocol):
    """A call with kernels to compile; picklable, because other processes compile them."""

    @property
    def rows(self) -> int:
        """Number of rows, N."""

    @property
    def weighted(self) -> bool:
        """Whether the rows have weights."""

    @property
    def element_bytes(self) -> int:
        """Bytes per element of the widest logits."""

    def launches(self) -> list[Launch]:
        """All kernel launches of the call."""


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def logits(rows: int, classes: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Logits: contiguous; "strided", with adjacent classes N elements apart; or "offset", at an unaligned address."""
    if layout == "strided":
        return empty(classes, rows, dtype=dtype).t()
    return empty(rows * classes + 1, dtype=dtype)[int(layout == "offset") :][: rows * classes].view(rows, classes)


def describe(dtypes: Iterable[torch.dtype]) -> str:
    return "/".join(dict.fromkeys(TYPES[dtype] for dtype in dtypes))


def targets(rows: int, classes: int, labels: torch.dtype | None) -> Tensor:
    return empty(rows, dtype=torch.int64) if labels is None else empty(rows, classes, dtype=labels)


def factors(call: Call, kinds: int) -> Tensor | None:
    """Row weights, or None; calls with weights reach a kernel with the reduction "sum" or "none"."""
    return empty(kinds, call.rows, dtype=torch.float64) if call.weighted else None


def prob(labels: torch.dtype | None, student: torch.dtype) -> list[str]:
    return [] if labels is None else ["prob"] if labels == student else [f"{TYPES[labels]} prob"]
