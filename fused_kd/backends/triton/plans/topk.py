"""The plan of a row loss with a top-k teacher: see :mod:`fused_kd.backends.topk`, and :mod:`.kernels.topk` for the four
kernels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd.backends.triton import layout, replay
from fused_kd.backends.triton.launch import Launch, acc_types, planned, run
from fused_kd.backends.triton.plans.common import zero_padding
from fused_kd.backends.triton.plans.rows import kernel_weights, variant
from fused_kd.core.catalogue import NUMBERS, REST_NUMBERS
from fused_kd.core.options import Options, empty_gradient
from fused_kd.core.rows import TOPK_FIELDS, TopKPiece
from fused_kd.reference import accumulation_dtype

#: Bits of the kernels' argument NEED, as in kernels/topk.py.
SHARP, LINEAR = 1, 2


class Rows(NamedTuple):
    """The rows' arguments of all four kernels, and what the kernels pass to each other."""

    student: Tensor  # (N, columns)
    log_probs: Tensor  # (N, k)
    indices: Tensor  # (N, k)
    target: Tensor  # (N,), contiguous: the most probable class
    labels: Tensor | None  # (N, columns), probability targets
    factors: Tensor | None
    marks: Tensor  # (N, words), a bit for each class; mark_kept clears them first
    state: Tensor  # (N,)
    found: Tensor  # (5 + k, N) float64
    first_class: int
    num_classes: int


def topk_loss(
    student: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    rest: str,
    target: Tensor,
    factors: Tensor | None,
    options: Options,
    piece: TopKPiece | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`fused_kd.backends.topk.row_loss`."""
    rows, device = student.shape[0], student.device
    first, classes, exchange = piece or (0, student.shape[1], None)
    labels = None
    if target.is_floating_point():
        labels, target, options = target, target.argmax(1), options._replace(ignore_index=-1)
    inputs = (student, log_probs, indices, target.contiguous(), labels, factors)
    dtype = accumulation_dtype(student, log_probs)
    loss, parts = student.new_empty(rows, dtype=dtype), student.new_empty((3, rows), dtype=dtype)
    gradient = empty_gradient(student, options.padding) if options.wanted[0] else None
    made = (loss, parts, gradient)

    def given() -> Rows:
        return Rows(
            *inputs,
            torch.empty((rows, words_of(classes)), dtype=torch.int32, device=device),
            torch.empty(rows, dtype=torch.int32, device=device),
            torch.empty((TOPK_FIELDS + indices.shape[1], rows), dtype=torch.float64, device=device),
            first,
            classes,
        )

    if exchange is None:
        replay.run("topk_loss", inputs, made, (rest, options), lambda: plan_topk(given(), rest, options, made))
    else:
        rows_given = given()
        launches = plan_topk(rows_given, rest, options, made)
        run(launches[:2], device)
        rows_given.found.copy_(exchange([rows_given.found]))
        run(launches[2:], device)
    if gradient is not None:
        zero_padding(gradient, options)
    return loss, parts, gradient


def words_of(classes: int) -> int:
    """Return the words of a row's marks."""
    return -(-classes // 32)


def plan_topk(given: Rows, rest: str, options: Options, made: tuple[Tensor, Tensor, Tensor | None]) -> list[Launch]:
    """Plan the launches that fill ``made``: the loss, its parts and the gradient, None if not wanted. Processes
    exchange the second launch's results before the third."""
    student, log_probs, indices, target, labels, factors, marks, state, found, first_class, num_classes = given
    loss, parts, gradient = made
    (rows, columns), kept, words = student.shape, indices.shape[1], marks.shape[1]
    hyper, ce = options.hyper, options.hyper.ce_weight != 0.0
    entries: dict[str, Any] = {"KEPT": max(32, 1 << (kept - 1).bit_length())}
    few = entries | {"num_warps": max(1, min(8, entries["KEPT"] // 128))}
    unit = student.stride(1) == 1
    seen = variant(options, unit, labels is not None)
    need = (0 if seen.SINGLE else SHARP) | (LINEAR if rest == "uniform" or seen.LINEAR else 0)
    vector = math.gcd(16 // student.element_size(), columns, options.padding, student.stride(0)) if unit else 1
    config = layout.piece_config(columns, vector, wide=loss.dtype == torch.float64)
    walk: dict[str, Any] = entries | {
        "ACC": acc_types()[loss.dtype],
        "VEC": vector,
        "UNIT": unit,
        "NEED": need,
        **layout.options_of(config),
    }
    of_labels = None if labels is None else found.new_empty((2, rows))
    label_strides = (0, 0) if labels is None else labels.stride()
    strides = (*student.stride(), *indices.stride(), *label_strides)
    span = (rows, columns, first_class, words, kept, *strides, hyper.temperature)
    coefficients = loss.new_empty((5, rows) if gradient is not None else 0)
    kept_gradient = loss.new_empty((kept + 1, rows) if gradient is not None else 0)
    first, second, temperature, ce_weight, smoothing = kernel_weights(options.loss, hyper, num_classes)
    launches = [
        planned(
            "mark_kept", rows,
            (
                target, indices, factors, marks, state, num_classes, words, kept, options.ignore_index,
                *indices.stride(),
            ),
            few,
        ),
        planned(
            "rest_statistics", rows, (student, marks, state, target, indices, found, labels, of_labels, *span), walk
        ),
        planned(
            "resolve_kept", rows,
            (
                found, state, target, indices, log_probs, factors, loss, parts, coefficients, kept_gradient,
                labels, of_labels, rows, num_classes, kept, *indices.stride(), *log_probs.stride(), *label_strides,
                temperature, first, second, ce_weight,
                smoothing, options.scales[0],
            ),
            few | {
                "LOSS": NUMBERS[options.loss], "REST": REST_NUMBERS[rest], "SINGLE": seen.SINGLE, "CE": ce,
                "GRAD": gradient is not None,
            },
        ),
    ]  # fmt: skip
    if gradient is not None:
        padding = options.padding or None
        arguments = (student, marks, state, target, indices, coefficients, kept_gradient, labels, gradient, padding)
        launches.append(planned("rest_gradient", rows, (*arguments, *span), walk))
    return launches
