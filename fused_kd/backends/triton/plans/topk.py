"""A row loss with a top-k teacher, by two kernels: see :mod:`fused_kd.backends.topk`.

Between them come small tensors, (N, k): the reference's own formulas in float64, and what autograd makes of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_kd.backends import topk
from fused_kd.backends.triton import layout
from fused_kd.backends.triton.launch import Launch, acc_types, planned, run
from fused_kd.core.catalogue import BITS, NUMBERS, ROW_LOSSES
from fused_kd.core.options import Options
from fused_kd.reference import accumulation_dtype
from fused_kd.reference.topk import Rest, find_kept, row_parts

#: Bits of the kernels' argument NEED, as kernels/topk.py has them.
SHARP, LINEAR = 1, 2


def topk_loss(
    student: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    rest: str,
    target: Tensor,
    factors: Tensor | None,
    options: Options,
    shared: topk.Shared | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`fused_kd.backends.topk.row_loss`."""
    loss, hyper, dtype = options.loss, options.hyper, accumulation_dtype(student, log_probs)
    rows, width = student.shape
    first, classes, exchange = shared or (0, width, None)
    counted = target != options.ignore_index
    if factors is not None:
        counted &= factors[0] != 0
    y = torch.where(counted & (target >= 0) & (target < classes), target, 0)
    invalid = counted & (y != target)
    kept = find_kept(log_probs.double(), indices, y.unsqueeze(1), classes)
    valid = kept.valid.masked_fill(invalid, math.nan)
    own = kept.present & ~kept.is_target
    # The target, and the kept classes; a pad, and the target among these, stand where the target does.
    columns = torch.cat([y.unsqueeze(1), torch.where(own, kept.columns, y.unsqueeze(1))], 1) - first
    here = (columns >= 0) & (columns < width)
    once = here & torch.cat([torch.ones_like(own[:, :1]), own], 1)
    marks, left_out = _marks(columns, once, width)
    smoothed = hyper.ce_weight != 0.0 and hyper.label_smoothing != 0.0
    at_one = hyper.temperature != 1.0 and (NUMBERS[loss] & BITS["sharp"] or hyper.ce_weight != 0.0)
    need = (SHARP if at_one else 0) | (LINEAR if rest == "uniform" or smoothed else 0)

    sums = torch.empty((4, rows), dtype=dtype, device=student.device)
    given = (student, marks, counted.to(torch.int32), need, hyper.temperature)
    run([plan_rest("rest_statistics", *given, sums)], student.device)
    top, soft, sharp, linear = sums.double()
    about = student[:, :1].double().sum(1)
    linear += torch.where((left_out < width) & (about != -math.inf), about * (width - left_out), 0.0)
    found = torch.cat([torch.stack([top, soft, sharp, linear]), _logits_at(student, columns, here)])
    if exchange is not None:
        found = topk.merged(exchange([found]), hyper.temperature)
    top, soft, sharp, linear = found[:4]
    few = Rest(
        (top / hyper.temperature + soft.log()).requires_grad_(),
        (top + sharp.log()).requires_grad_(),
        linear.requires_grad_(),
        classes - 1 - own.sum(1),
    )
    s_target = found[4].requires_grad_()
    s_kept = found[topk.FIELDS :].T.requires_grad_()
    with torch.enable_grad():
        values = row_parts(loss, s_kept, s_target, few, kept, rest, hyper._asdict(), classes)
        total = torch.stack(values).sum()
    parts = torch.zeros((3, rows), dtype=torch.float64, device=student.device)
    for place, value in zip(ROW_LOSSES[loss].parts, values, strict=True):
        parts[place] = value.detach() * valid
    parts = torch.where(counted, parts if factors is None else parts * factors[0], 0.0)
    each = parts.sum(0).to(dtype), parts.to(dtype)
    if not options.wanted[0]:
        return *each, None

    of = (few.soft, few.sharp, few.linear, s_kept, s_target)
    derived = torch.autograd.grad(total, of, allow_unused=True)
    of_soft, of_sharp, of_linear, of_kept, of_target = (
        torch.zeros_like(x) if g is None else g for g, x in zip(derived, of, strict=True)
    )
    by = valid * options.scales[0] if factors is None else valid * options.scales[0] * factors[1]
    # Where no class of the rest can occur there is nothing to multiply.
    of_soft = torch.where(soft == 0, 0.0, of_soft / (hyper.temperature * soft))
    of_sharp = torch.where(sharp == 0, 0.0, of_sharp / sharp)
    if not need & SHARP:
        of_soft, of_sharp = of_soft + of_sharp, torch.zeros_like(of_sharp)
    coefficients = torch.stack([top, of_soft * by, of_sharp * by, of_linear * by]).to(dtype)
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    run([plan_rest("rest_gradient", *given, coefficients, gradient)], student.device)
    entries = torch.cat([of_target.unsqueeze(1), of_kept], 1)
    entries = torch.where(found[4:].T == -math.inf, 0.0 * by.unsqueeze(1), entries * by.unsqueeze(1))
    entries = torch.where(counted.unsqueeze(1) & once, entries, 0.0).to(dtype).to(student.dtype)
    if width:
        # In these columns the kernel has stored 0, or NaN in a row without a value; others are given 0 more.
        gradient.scatter_add_(1, torch.where(once, columns, 0), entries)
    return *each, gradient


def _logits_at(student: Tensor, columns: Tensor, here: Tensor) -> Tensor:
    """(columns, N) float64, 0 where a column is not here."""
    if student.shape[1] == 0:
        return columns.T.new_zeros(columns.T.shape, dtype=torch.float64)
    return torch.where(here, student.gather(1, torch.where(here, columns, 0)).double(), 0.0).T


def words_of(classes: int) -> int:
    """Of a row's marks, with one for a class that is none."""
    return -(-(classes + 1) // 32)


def _marks(columns: Tensor, marked: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """A bit of each class that is kept or the target, 32 to a word, and how many these are: the ``columns`` (N, n) that
    are ``marked``, each once."""
    words = words_of(classes)
    first = torch.arange(len(columns), device=columns.device).unsqueeze(1) * words
    # One for each class, so that a sum of bits is their union; those that are left out meet at a class that is none.
    columns = torch.where(marked, columns, classes)
    bits = torch.where(marked, 1 << (columns % 32), 0).to(torch.int32)
    marks = torch.zeros(len(columns) * words, dtype=torch.int32, device=columns.device)
    marks.scatter_add_(0, (first + columns // 32).flatten(), bits.flatten())
    return marks.view(-1, words), marked.sum(1)


def plan_rest(
    kernel: str, student: Tensor, marks: Tensor, counted: Tensor, need: int, temperature: float, *tensors: Tensor
) -> Launch:
    """The launch of one of both kernels: ``tensors`` are its numbers of each row, and the gradient of the second."""
    classes = student.shape[1]
    unit = student.stride(1) == 1
    vector = math.gcd(16 // student.element_size(), classes, student.stride(0)) if unit else 1
    acc = tensors[0].dtype
    config = layout.piece_config(classes, vector, wide=acc == torch.float64)
    meta: dict[str, Any] = {
        "ACC": acc_types()[acc],
        "LANES": config.lanes,
        "WIDTH": config.width,
        "VEC": vector,
        "UNIT": unit,
        "NEED": need,
        "num_warps": config.warps,
        "maxnreg": config.registers,
    }
    arguments = (student, marks, counted, *tensors, *student.shape, marks.shape[1], *student.stride(), temperature)
    return planned(kernel, student.shape[0], arguments, meta)
