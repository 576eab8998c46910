"""Shared parts of the losses' plans: counting rows, and the reduction of the loss's parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd.backends.triton import layout, replay
from fused_kd.backends.triton.launch import Launch, acc_types, planned
from fused_kd.core.options import Options

#: Up to this many rows, every program counts the targets itself, which saves a launch. Its cache has them line by line.
COUNT_ROWS = 2048
#: Up to this many rows, one program sums the parts. Otherwise chunks of this size are summed in parallel first.
CHUNK = 16384
#: Values of the kernels' argument COUNT, the source of the number of rows that count; 0 means no count.
COUNT_TARGETS, COUNT_PARTIAL = 1, 2


class Counts(NamedTuple):
    """The source of the number of rows that count. ``how`` is the kernels' argument COUNT."""

    source: Tensor
    stride: int
    items: int
    how: int


def filled(
    name: str,
    plan: Callable[..., list[Launch]],
    inputs: tuple[Tensor | None, ...],
    made: tuple[Tensor, ...],
    options: Options,
) -> tuple[Tensor, ...]:
    """Run an op's ``plan`` to fill ``made``, its outputs, and return them."""
    if inputs[0].shape[0] == 0:  # type: ignore[union-attr]
        loss, parts, *gradients_and_norms = made
        loss.zero_()
        parts.zero_()
        for norm in gradients_and_norms[len(options.wanted) :]:
            norm.fill_(1.0)
    else:
        replay.run(name, inputs, made, options, lambda: plan(*inputs, made, options))
    return made


def zero_padding(gradient: Tensor, options: Options) -> None:
    """Zero the columns after the classes, if the gradient is wanted. The kernels do not write them."""
    if options.padding and options.wanted[0]:
        gradient[:, -options.padding :].zero_()


def neighbours(target: Tensor, logits: tuple[Tensor, ...]) -> bool:
    """Return whether every column stride is 1."""
    return all(t.stride(1) == 1 for t in logits) and (not target.is_floating_point() or target.stride(1) == 1)


def target_strides(target: Tensor) -> tuple[int, int]:
    return (target.stride(0), target.stride(1)) if target.is_floating_point() else (target.stride(0), 0)


class Walk(NamedTuple):
    """The kernels' argument WALK: how one walks its rows, and what it needs of them; :mod:`.kernels.uskd` describes the
    fields."""

    ROWS: int
    BLOCK: int
    HELD: bool
    UNIT: bool
    PROB: bool
    LINEAR: bool

    @property
    def TILE(self) -> tuple[int, int]:
        """The shape of a tile."""
        return self.ROWS, self.BLOCK

    @property
    def COLUMN(self) -> tuple[int]:
        """The shape of a number per row."""
        return (self.ROWS,)


def row_options(
    target: Tensor,
    logits: tuple[Tensor, ...],
    dtype: torch.dtype,
    config: layout.OnChip | layout.Streamed,
    unit: bool,
    linear: bool = False,
) -> dict[str, Any]:
    """Return the options that the kernels of :mod:`.kernels.targets` share. ``dtype`` is the arithmetic's, ``unit``
    what :func:`neighbours` says, and ``linear`` whether the sum of the student's logits is wanted."""
    classes = logits[0].shape[1]
    probabilities = target.is_floating_point()
    matrices = [*logits, *([target] if probabilities else [])]
    vector = 16 // min(t.element_size() for t in matrices) if unit else 1
    return {
        "ACC": acc_types()[dtype],
        "WALK": Walk(config.rows, config.block, classes <= config.block, unit, probabilities, linear),
        "VEC": math.gcd(vector, classes, *(t.stride(0) for t in matrices)),
        "num_warps": config.warps,
        "maxnreg": config.registers,
    }


def plan_count(
    launches: list[Launch], target: Tensor, ignore_index: int, reduction: str, every_row: bool = True
) -> Counts:
    """Return the source of the number of rows that count. A mean over many index targets appends a launch for it. With
    ``every_row`` each program of a row kernel counts, else only the program that reduces the parts."""
    rows, stride = target.shape[0], target.stride(0)
    if reduction != "mean" or target.is_floating_point():
        return Counts(target, stride, rows, 0)
    if rows <= (COUNT_ROWS if every_row else CHUNK):
        return Counts(target, stride, rows, COUNT_TARGETS)
    chunk = max(COUNT_ROWS, -(-rows // 1024))
    items = -(-rows // chunk)
    counts = torch.empty(items, dtype=torch.int32, device=target.device)
    arguments = (target, counts, stride, rows, chunk, ignore_index)
    launches.append(planned("count_chunks", items, arguments, {"num_warps": 4}))
    return Counts(counts, 1, items, COUNT_PARTIAL)


def divided(target: Tensor, reduction: str, dtype: torch.dtype) -> tuple[bool, float]:
    """Return how to divide a mean's gradient of this dtype by the number of rows that count.

    Returns:
        Whether the backward op divides by the power of two next to that number, since float16 might underflow; and the
        factor that is known here: with probabilities every row counts.
    """
    mean, rows = reduction == "mean", target.shape[0]
    half = mean and dtype == torch.float16
    if not mean or not target.is_floating_point():
        return half, 1.0
    return half, (2.0 ** (rows.bit_length() - 1) if half else 1.0) / rows


#: The loss, and for each of two gradients (or twice for one) its norm, the norm's value, and whether the gradient is
#: float16: then the divisor's power of two goes into the norm.
Finish = tuple[Tensor, tuple[Tensor, Tensor], tuple[float, float], tuple[bool, bool]]


def plan_reduction(
    launches: list[Launch],
    row_parts: Tensor,
    parts: Tensor,
    counts: Counts | None,
    ignore_index: int,
    reduction: str,
    finish: Finish | None,
) -> None:
    """Append the launches that reduce ``row_parts`` (parts, rows) to ``parts`` (parts,) and ``finish``; without
    ``finish`` to plain sums."""
    width, rows = row_parts.shape
    counts = counts or Counts(row_parts, 1, rows, 0)
    loss, norms, norm_values, halves = finish or (parts, (parts, parts), (1.0, 1.0), (False, False))
    while True:
        programs = -(-rows // CHUNK)
        last = programs == 1
        sums = parts if last else torch.empty((width, programs), dtype=parts.dtype, device=parts.device)
        arguments = (
            row_parts, sums, loss, *norms, counts.source,
            rows, CHUNK, counts.stride, counts.items, ignore_index, *norm_values,
        )  # fmt: skip
        options = {
            "ACC": acc_types()[parts.dtype],
            "PARTS": width,
            "FINAL": last and finish is not None,
            "MEAN": reduction == "mean",
            "COUNT": counts.how,
            "HALF": halves[0],
            "OTHER_HALF": halves[1],
            "num_warps": 8,
        }
        launches.append(planned("reduce_parts", programs, arguments, options))
        if last:
            return
        row_parts, rows = sums, programs
