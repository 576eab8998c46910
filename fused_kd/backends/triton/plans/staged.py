"""The plans of a row loss in stages: see :mod:`fused_kd.backends.staged`."""

from __future__ import annotations

import importlib
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_kd.backends.triton import layout
from fused_kd.backends.triton.launch import Launch, acc_types, planned, run
from fused_kd.backends.triton.plans.rows import kernel_weights, variant
from fused_kd.core.catalogue import has_column_term
from fused_kd.core.options import Options
from fused_kd.core.rows import Piece, StageResults
from fused_kd.reference import accumulation_dtype


@lru_cache(maxsize=1)
def fields() -> dict[str, int]:
    """Return how many numbers per row each stage ends with, from the kernels, which this imports."""
    pieces = importlib.import_module("fused_kd.backends.triton.kernels.pieces")
    return {"moments": pieces.MOMENTS.value, "statistics": pieces.STATISTICS.value, "sums": pieces.SUMS.value}


def row_stage(stage: str, piece: Piece, earlier: StageResults, options: Options, factors: Tensor | None) -> Any:
    """Run a stage on a piece. Return its numbers, (fields, N); from the last stage the rows' parts (3, N) and the
    gradient (N, n)."""
    student = piece.student
    other = student if piece.teacher is None else piece.teacher
    dtype, device, rows = accumulation_dtype(student, other), student.device, student.shape[0]
    last = stage == "gradient"
    out = torch.empty((3 if last else fields()[stage], rows), dtype=dtype, device=device)
    gradient = torch.empty(student.shape if last else (0,), dtype=student.dtype, device=device)
    if rows:
        run([plan_stage(stage, piece, earlier, options, factors, out, gradient)], device)
    return (out, gradient) if last else out


def plan_stage(
    stage: str,
    piece: Piece,
    earlier: StageResults,
    options: Options,
    factors: Tensor | None,
    out: Tensor,
    gradient: Tensor,
) -> Launch:
    """Plan the launch that fills ``out`` and, in the last stage, ``gradient``."""
    student, teacher, labels, target, first_class, num_classes = piece
    if has_column_term(options.loss, options.hyper):
        raise NotImplementedError("DIST's term of the columns has no stages in Triton")
    teacher = student if teacher is None else teacher
    rows, columns = student.shape
    labels_seen = student if labels is None else labels
    matrices = [student, teacher, *([] if labels is None else [labels])]
    unit = all(each.stride(1) == 1 for each in matrices)
    seen = variant(options, unit, labels is not None)
    vector = 16 // min(each.element_size() for each in matrices) if unit else 1
    vector = math.gcd(vector, columns, *(each.stride(0) for each in matrices))
    config = layout.piece_config(columns, vector, wide=out.dtype == torch.float64)
    pieces = max(1 if each is None else len(each) for each in earlier)
    shared: dict[str, Any] = {"ACC": acc_types()[out.dtype], "VEC": vector, **layout.options_of(config)}
    first, second, temperature, ce_weight, smoothing = kernel_weights(options.loss, options.hyper, num_classes)
    logits, per_row = (student, teacher), (target.contiguous(), factors)
    strides = (*student.stride(), *teacher.stride())
    all_strides = (*strides, *labels_seen.stride(), options.ignore_index)
    known = tuple(out if each is None else each for each in earlier)
    span = (first_class, num_classes)
    arguments: tuple[Any, ...]
    if stage == "moments":  # the same kernel for all losses
        shared |= {"UNIT": unit, "PROB": seen.PROB}
        arguments = (*logits, *per_row, out, rows, columns, *span, *strides, options.ignore_index)
    elif stage == "statistics":
        arguments = (
            *logits, labels_seen, *per_row, known[0], out, rows, columns, pieces, *span, *all_strides, temperature,
        )  # fmt: skip
    elif stage == "sums":
        seen = seen._replace(LINEAR=False, RAW=False)
        arguments = (
            *logits, *per_row, *known[:2], out, rows, columns, pieces, *span, *strides, options.ignore_index,
            first, temperature,
        )  # fmt: skip
    else:
        arguments = (
            *logits, labels_seen, *per_row, *known, gradient, out, rows, columns, pieces, *span, *all_strides,
            first, second, temperature, ce_weight, smoothing, options.scales[0],
        )  # fmt: skip
    if stage != "moments":
        shared |= {"PIECES": 1 << (pieces - 1).bit_length(), "VARIANT": seen}
    return planned(f"piece_{stage}", rows, arguments, shared)
