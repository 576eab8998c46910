"""A row loss with a top-k teacher, by two kernels: see :mod:`fused_kd.backends.topk`.

Between them come small tensors, (N, k): the reference's own formulas in float64, and what autograd makes of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_kd.backends.triton import layout
from fused_kd.backends.triton.launch import Launch, acc_types, planned, run
from fused_kd.core.catalogue import BITS, NUMBERS, ROW_LOSSES
from fused_kd.core.options import Options
from fused_kd.reference import accumulation_dtype
from fused_kd.reference.topk import Kept, Rest, find_kept, row_parts

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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`fused_kd.backends.topk.row_loss`."""
    loss, hyper, dtype = options.loss, options.hyper, accumulation_dtype(student, log_probs)
    rows, classes = student.shape
    counted = target != options.ignore_index
    if factors is not None:
        counted &= factors[0] != 0
    y = torch.where(counted & (target >= 0) & (target < classes), target, 0)
    invalid = counted & (y != target)
    kept = find_kept(log_probs.double(), indices, y.unsqueeze(1), classes)
    valid = kept.valid.masked_fill(invalid, math.nan)
    marks, left_out = _marks(kept, y, classes)
    smoothed = hyper.ce_weight != 0.0 and hyper.label_smoothing != 0.0
    at_one = hyper.temperature != 1.0 and (NUMBERS[loss] & BITS["sharp"] or hyper.ce_weight != 0.0)
    need = (SHARP if at_one else 0) | (LINEAR if rest == "uniform" or smoothed else 0)

    found = torch.empty((4, rows), dtype=dtype, device=student.device)
    shared = (student, marks, counted.to(torch.int32), need, hyper.temperature)
    run([plan_rest("rest_statistics", *shared, found)], student.device)
    top, soft, sharp, linear = found.double()
    number = classes - left_out
    about = torch.where(student[:, 0] == -math.inf, 0.0, student[:, 0]).double()
    few = Rest(
        top / hyper.temperature + soft.log(),
        top + sharp.log(),
        linear + torch.where(number > 0, about * number, 0.0),
        number,
    )
    few = few._replace(**{name: value.requires_grad_() for name, value in few._asdict().items() if name != "number"})
    s_kept = student.gather(1, kept.columns).double().requires_grad_()
    s_target = student.gather(1, y.unsqueeze(1)).squeeze(1).double().requires_grad_()
    # As in the reference: a logsumexp of +inf has a derivative, but its row has no value.
    infinite = (top == math.inf) | (s_kept == math.inf).any(1) | (s_target == math.inf)
    valid = valid.masked_fill(infinite & counted, math.nan)
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
    run([plan_rest("rest_gradient", *shared, coefficients, gradient)], student.device)
    entries = torch.cat([of_kept, of_target.unsqueeze(1)], 1)
    logits = torch.cat([s_kept, s_target.unsqueeze(1)], 1).detach()
    entries = torch.where(counted.unsqueeze(1) & (logits != -math.inf), entries * by.unsqueeze(1), 0.0).to(dtype).to(student.dtype)
    # A pad, and the target among the kept, writes once more what the target's own entry does.
    own = kept.present & ~kept.is_target
    columns = torch.cat([torch.where(own, kept.columns, y.unsqueeze(1)), y.unsqueeze(1)], 1)
    values_at = torch.where(torch.cat([own, torch.ones_like(own[:, :1])], 1), entries, entries[:, -1:])
    return *each, gradient.scatter_(1, columns, values_at)


def words_of(classes: int) -> int:
    """Of a row's marks, with one for a class that is none."""
    return -(-(classes + 1) // 32)


def _marks(kept: Kept, target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """A bit of each class that is kept or the target, 32 to a word, and how many these are."""
    own = kept.present & ~kept.is_target
    columns = torch.cat([torch.where(own, kept.columns, classes), target.unsqueeze(1)], 1)
    words = words_of(classes)
    first = torch.arange(len(target), device=target.device).unsqueeze(1) * words
    # One for each class, so that a sum of bits is their union; those that are left out meet at a class that is none.
    bits = torch.where(columns < classes, 1 << (columns % 32), 0).to(torch.int32)
    marks = torch.zeros(len(target) * words, dtype=torch.int32, device=target.device)
    marks.scatter_add_(0, (first + columns // 32).flatten(), bits.flatten())
    return marks.view(-1, words), own.sum(1) + 1


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
