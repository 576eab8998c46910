"""DIST's column term in Triton: the launches before its row kernel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd.backends.triton import layout
from fused_kd.backends.triton.launch import Launch, acc_types, planned
from fused_kd.core.options import Options


class ColumnTerm(NamedTuple):
    """The row kernel's arguments of these names."""

    states: Tensor
    columns: Tensor
    correlations: Tensor


def plan_columns(
    launches: list[Launch],
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    factors: Tensor | None,
    column_factor: Tensor | None,
    dtype: torch.dtype,
    options: Options,
    copies: int,
) -> ColumnTerm:
    """Append the launches of DIST's column term. ``dtype`` is the arithmetic's. ``copies`` is the number of copies of
    the columns' numbers: 4 if the row kernel's vectors may start at any class, else 1."""
    rows, classes = student.shape
    gamma, temperature = options.hyper.gamma, options.hyper.temperature
    acc, probabilities = acc_types()[dtype], target.is_floating_point()
    narrow = min(student.element_size(), teacher.element_size())
    unit = student.stride(1) == teacher.stride(1) == 1
    vector = math.gcd(16 // narrow if unit else 1, classes, student.stride(0), teacher.stride(0))
    shared = {"ACC": acc, "VEC": vector, "UNIT": unit, "PROB": probabilities}
    strides = (*student.stride(), *teacher.stride(), target.stride(0), options.ignore_index)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=student.device)

    states = empty(6, rows)
    normalize = layout.normalize_config(classes, narrow)
    arguments = (student, teacher, target, states, rows, classes, *strides, temperature)
    meta = shared | layout.options_of(normalize) | {"STD": options.standardize}
    meta["maxnreg"] = min(255, 2048 // normalize.warps)
    launches.append(planned("normalize_rows", -(-rows // normalize.rows), arguments, meta))

    config = layout.column_config(rows, classes, wide=dtype == torch.float64, neighbours=unit, vectors=vector > 1)
    chunks, blocks = -(-rows // config.chunk), -(-classes // config.block)
    moments, numbers = empty(chunks, 5, classes), empty(chunks)
    arguments = (student, teacher, target, factors, states, moments, numbers, rows, classes, *strides, config.chunk)
    meta = {
        **shared,
        "ROWS": config.rows,
        "BLOCK": config.block,
        "num_warps": config.warps,
        "maxnreg": config.registers,
    }
    launches.append(planned("column_moments", chunks * blocks, arguments, meta))

    tile_chunks, tile_classes = layout.FINISH_TILE
    items = -(-classes // tile_classes)
    # The stride is column_stride of the kernels.
    term = ColumnTerm(states, empty(copies, 4, (classes + 6) // 4 * 4), empty(items))
    arguments = (moments, numbers, column_factor, term.columns, term.correlations, classes, chunks, gamma, temperature)
    # Without maxnreg some releases of Triton spill a few words to reach a rounder occupancy.
    meta = {
        "ACC": acc,
        "BLOCK": tile_classes,
        "CHUNKS": tile_chunks,
        "COPIES": copies,
        "num_warps": 4,
        "maxnreg": 255,
    }
    launches.append(planned("finish_columns", items, arguments, meta))
    return term
