"""DIST where its two terms are multiplied by different numbers, by two calls of a backend's kernel.

A row's own term and its cross-entropy are multiplied by what the row weighs, and their gradient by what comes in for
it. The term of the columns is one number, which every row that counts is given: its gradient is multiplied by the sum
of all that. So one call has the rows' terms and another the columns', of which the labels only say which rows count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_kd.core.options import HyperParameters, Options

#: As a backend's ``row_loss`` gives them: the loss, its parts, the gradient and its norm.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def weighted(
    kernels: Any,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    factors: Tensor,
    hyper: HyperParameters,
    standardize: bool,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
) -> Outputs:
    """DIST of rows that weigh ``factors`` (2, N), see :mod:`fused_kd.ops`; a row of 0 is in neither term."""
    options = (standardize, ignore_index, reduction, need_gradient)
    loss, parts, gradient, norm = _of_rows(kernels, student, teacher, target, factors, hyper, *options)
    columns = _of_columns(kernels, student, teacher, factors[0] != 0, hyper, standardize, need_gradient)
    share = factors[0] if reduction == "none" else factors[0].sum()
    # Of a row that does not count it is 0, even where the number has no value.
    parts[1] = torch.where(share == 0, 0.0, share * columns[0])
    if need_gradient:
        _add(kernels, gradient, columns, share.sum().to(loss.dtype))
    return loss + parts[1], parts, gradient, norm


def gradient_for(
    kernels: Any,
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    factors: Tensor | None,
    counted: Tensor,
    hyper: HyperParameters,
    standardize: bool,
    ignore_index: int,
    grad_rows: Tensor,
    grad_columns: Tensor,
) -> Tensor:
    """The gradient where ``grad_rows`` (N,) came in for the terms of rows and ``grad_columns`` () for the columns', in
    which the rows are that are ``counted`` (N,)."""
    options = (standardize, ignore_index, "none", True)
    _, _, gradient, norm = _of_rows(kernels, student, teacher, target, factors, hyper, *options)
    kernels.scale_gradient(gradient, grad_rows, norm, gradient)
    columns = _of_columns(kernels, student, teacher, counted, hyper, standardize, True)
    _add(kernels, gradient, columns, grad_columns)
    return gradient


def _of_rows(
    kernels: Any,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    factors: Tensor | None,
    hyper: HyperParameters,
    standardize: bool,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
) -> Outputs:
    own = hyper._replace(gamma=0.0)
    options = Options(own, ignore_index, reduction, (need_gradient,), (1.0,), "dist", standardize)
    outputs: Outputs = kernels.row_loss(student, teacher, target, factors, options)
    return outputs


def _of_columns(
    kernels: Any,
    student: Tensor,
    teacher: Tensor | None,
    counted: Tensor,
    hyper: HyperParameters,
    standardize: bool,
    need_gradient: bool,
) -> Outputs:
    own, target = HyperParameters(gamma=hyper.gamma, temperature=hyper.temperature), counted.long() - 1
    options = Options(own, -1, "mean", (need_gradient,), (1.0,), "dist", standardize)
    outputs: Outputs = kernels.row_loss(student, teacher, target, None, options)
    return outputs


def _add(kernels: Any, gradient: Tensor, columns: Outputs, factor: Tensor) -> None:
    """Add the columns' gradient, which is overwritten, times a factor; what is 0 of it stays 0."""
    _, _, more, norm = columns
    kernels.scale_gradient(more, factor, norm, more)
    gradient.add_(more)
