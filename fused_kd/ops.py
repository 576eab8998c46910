"""The only boundary between PyTorch and the kernels: torch.library ops and their fakes.

A loss uses two ops. The forward op computes the loss, its parts and, if wanted, the gradient for an incoming gradient
of 1. The backward op, shared by all losses, multiplies that stored gradient by the incoming one: in place if nobody
can ask for it again, and in a compiled graph with a check for create_graph=True. :mod:`fused_kd.autograd` combines
them. A batch mean couples the rows of USKD. Its sums have a small op of their own, for an all-reduce or when more rows
count; without given sums the op uses its own rows.
Only registered ops take pointers, so torch.compile keeps everything in one graph.

The stored gradient is one tensor of the shape and dtype of the logits. Columns after the first ``num_classes`` are
padding, and their gradient is 0: kernels leave room for it, so that no gradient is copied into a wider tensor.

For ``reduction="mean"`` the stored gradient is already divided by the number of rows, so an incoming 1 leaves nothing
to do. In float16, dividing would underflow just before GradScaler multiplies. There the gradient is stored times a
power of two that uses the upper end of the format's range, and the backward op multiplies by ``norm`` in float32, which
undoes the power and divides. The power comes from a bound of the gradient or, if there is none, from the gradient
itself (:func:`fused_kd.core.stored.to_half`).

``row_weight`` (N,), if given, becomes factors (:func:`fused_kd.core.stored.row_factors`). A kernel multiplies a row's
parts by one and its gradient by another, with the reduction "sum" for a mean, and ignores a row with a factor of 0.

DIST's columns are the exception. Their term is one number that depends on every row, so its gradient is multiplied by
the sum of the row factors, the same for all rows: the kernel's ``column_factor``. With ``reduction="none"`` only the
backward pass knows that sum. Then the logits are kept instead of a gradient, and ``dist_gradient`` computes the
gradient there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_kd import backends
from fused_kd.core import transforms
from fused_kd.core.catalogue import ROW_LOSSES, as_run, has_column_term
from fused_kd.core.options import HyperParameters, Options, outputs, pair_outputs
from fused_kd.core.stored import counted_weight, row_factors, stored_scale, to_half
from fused_kd.reference import accumulation_dtype

#: The forward ops, each with its twin for hyper-parameters that may change in a compiled graph.
LOSS_OPS: dict[str, tuple[Any, Any]] = {}
#: For each forward op, the op that torch.export records in its place.
EXPORTED_OPS: dict[Any, Any] = {}
#: The function of each op.
FUNCTIONS: dict[Any, Callable[..., Any]] = {}
#: An op and its twin: suffix, type of the hyper-parameters, tags.
_TWINS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("", "float[]", ()),
    ("_scheduled", "Tensor", (torch.Tag.cudagraph_unsafe,)),
)
_library: Any = torch.library.Library("fused_kd", "DEF")  # type: ignore[no-untyped-call]


def define(
    name: str,
    arguments: str,
    results: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    exported: bool = False,
) -> Any:
    """Register an op with its schema, its implementation and its fake, and return it. Its last argument is the backend.

    ``{hyper}`` among the arguments stands for the hyper-parameters, which are numbers. Then a twin ``_scheduled`` takes
    them as a CPU tensor: a number is a constant of a compiled graph, which would be compiled anew for each value of a
    schedule; a tensor is an input. A CUDA graph would replay the captured values, so the twin is kept out of CUDA
    graphs. Both are returned. With ``exported`` each has another twin for torch.export, ``exported_``, to which
    :mod:`fused_kd.autograd` gives an autograd kernel. On the ordinary ops that would cost a tenth of a call.
    """
    twins, scheduled = [], "{hyper}" in arguments
    for suffix, numbers, tags in _TWINS if scheduled else _TWINS[:1]:
        schema = f"({arguments.format(hyper=f'{numbers} hyper')}, str backend) -> {results}"
        op = _register(name + suffix, schema, tags, function, fake)
        if exported:
            EXPORTED_OPS[op] = _register(f"exported_{name}{suffix}", schema, tags, function, fake)
        twins.append(op)
    return tuple(twins) if scheduled else twins[0]


def _register(
    name: str, schema: str, tags: tuple[Any, ...], function: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    _library.define(name + schema, tags=tags)
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    torch.library.register_fake(f"fused_kd::{name}", fake, lib=_library)
    op = getattr(torch.ops.fused_kd, name).default
    FUNCTIONS[op] = function
    return op


def function_for(op: Any, arguments: Sequence[Any]) -> Callable[..., Any] | None:
    """Return the op's function if the op would only call it, else None. A short call is a tenth faster without it."""
    if transforms.unobserved() and all(not isinstance(each, Tensor) or transforms.plain(each) for each in arguments):
        return FUNCTIONS[op]
    return None


def listed(hyper: list[float] | Tensor) -> list[float]:
    return hyper.tolist() if isinstance(hyper, Tensor) else hyper


def hyper_parameters(hyper: list[float] | Tensor) -> HyperParameters:
    return HyperParameters._make(listed(hyper))


def _multiply(norm: Tensor, by: Tensor | None) -> None:
    if by is not None:
        norm.mul_(by)


def _classes_of(student_logits: Tensor, num_classes: int | None) -> tuple[Tensor, int]:
    """Return the columns of the classes, and how many columns follow."""
    if num_classes is None:
        return student_logits, 0
    return student_logits[:, :num_classes], student_logits.shape[1] - num_classes


def _row_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    loss: str,
    hyper: list[float] | Tensor,
    standardize: bool,
    num_classes: int | None,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    transforms.refuse_recorded(student_logits)
    named = hyper_parameters(hyper)
    bound = ROW_LOSSES[loss].bound(named) + named.ce_weight
    if standardize:
        bound = math.inf  # one over the deviation of a row's logits is a factor: 1e7 for a constant row
    student, padding = _classes_of(student_logits, num_classes)
    measure = need_gradient and student.dtype == torch.float16 and math.isinf(bound)
    if measure:
        student = student.to(accumulation_dtype(student))
    factors, reduction, (by,) = row_factors(row_weight, target, ignore_index, reduction, (student.dtype,))
    column_factor = factors[1].sum() if factors is not None and has_column_term(loss, named) else None
    scale, run = stored_scale(student.dtype, bound) if need_gradient else 1.0, as_run(loss, named.beta)
    options = Options(named, ignore_index, reduction, (need_gradient,), (scale,), run, standardize, padding=padding)
    value, parts, gradient, norm = backends.get(backend).row_loss(
        student, teacher_logits, target, factors, column_factor, options
    )
    _multiply(norm, by)
    if measure:
        gradient, norm = to_half(gradient, norm)
    return value, parts, gradient, norm


def _row_loss_fake(student_logits: Tensor, teacher_logits: Tensor | None, *further: Any) -> tuple[Tensor, ...]:
    *_, reduction, need_gradient, _backend = further
    dtype = accumulation_dtype(student_logits, student_logits if teacher_logits is None else teacher_logits)
    return outputs(student_logits, need_gradient, 3, reduction, dtype)


LOSS_OPS["row_loss"] = define(
    "row_loss",
    "Tensor student_logits, Tensor? teacher_logits, Tensor target, Tensor? row_weight, str loss, {hyper}, "
    "bool standardize, SymInt? num_classes, int ignore_index, str reduction, bool need_gradient",
    "(Tensor loss, Tensor parts, Tensor gradient, Tensor norm)",
    _row_loss,
    _row_loss_fake,
    exported=True,
)


def _dist_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    hyper: list[float] | Tensor,
    standardize: bool,
    num_classes: int | None,
    ignore_index: int,
    grad_rows: Tensor,
    grad_columns: Tensor,
    backend: str,
) -> Tensor:
    transforms.refuse_create_graph()
    transforms.refuse_recorded(student_logits, grad_rows, grad_columns)
    student, padding = _classes_of(student_logits, num_classes)
    student = student.to(accumulation_dtype(student))
    weight = counted_weight(row_weight, target, ignore_index, torch.float64)
    grad_rows = (weight * grad_rows).to(grad_rows.dtype)
    # Infinity and NaN multiply afterwards, as with a stored gradient: then an entry of 0 stays 0.
    after = 1.0 + 0.0 * grad_rows + 0.0 * grad_columns
    finite, column_factor = (each.nan_to_num(1.0, 1.0, 1.0).double() for each in (grad_rows, grad_columns))
    kernels, factors = backends.get(backend), torch.stack([weight, finite])
    named = hyper_parameters(hyper)
    options = Options(named, ignore_index, "none", (True,), (1.0,), "dist", standardize, padding=padding)
    _, _, gradient, norm = kernels.row_loss(student, teacher_logits, target, factors, column_factor, options)
    kernels.scale_gradient(gradient, after, norm, gradient)
    return gradient.to(student_logits.dtype)  # type: ignore[no-any-return]


#: The op for the gradient of DIST with reduction="none", and its twin.
DIST_GRADIENT: tuple[Any, Any] = define(
    "dist_gradient",
    "Tensor student_logits, Tensor teacher_logits, Tensor target, Tensor? row_weight, {hyper}, bool standardize, "
    "SymInt? num_classes, int ignore_index, Tensor grad_rows, Tensor grad_columns",
    "Tensor",
    _dist_gradient,
    lambda student_logits, *_: student_logits.new_empty(student_logits.shape),
)


def _uskd_batch_sums(student_logits: Tensor, target: Tensor, square: bool, ignore_index: int, backend: str) -> Tensor:
    sums: Tensor = backends.get(backend).uskd_batch_sums(student_logits, target, square, ignore_index)
    return sums


uskd_batch_sums = define(
    "uskd_batch_sums",
    "Tensor student_logits, Tensor target, bool square, int ignore_index",
    "Tensor",
    _uskd_batch_sums,
    lambda student_logits, *_: student_logits.new_empty((3,), dtype=torch.float64),
)


def _uskd(
    student_logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    batch_sums: Tensor | None,
    row_weight: Tensor | None,
    hyper: list[float] | Tensor,
    rank: str,
    square: bool,
    ignore_index: int,
    reduction: str,
    need_student: bool,
    need_weak: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    transforms.refuse_recorded(student_logits, weak_logits)
    named = hyper_parameters(hyper)
    # P_k and P_1 + P_2 are from -1 to 2. At a target, p_k (P_1 + P_2) - P_k averages -P_k and the other target's P.
    student_scale = stored_scale(student_logits.dtype, 2.0 * named.alpha + named.beta + named.ce_weight)
    dtypes = (student_logits.dtype, weak_logits.dtype)
    factors, reduction, (by_student, by_weak) = row_factors(row_weight, target, ignore_index, reduction, dtypes)
    scales = (student_scale, stored_scale(weak_logits.dtype, named.mu))
    wanted = (need_student, need_weak)
    options = Options(named, ignore_index, reduction, wanted, scales, "uskd", False, rank, square)
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = backends.get(backend).uskd(
        student_logits, weak_logits, target, batch_sums, factors, options
    )
    _multiply(result[-2], by_student)
    _multiply(result[-1], by_weak)
    return result


def _uskd_fake(student_logits: Tensor, weak_logits: Tensor, *further: Any) -> tuple[Tensor, ...]:
    *_, reduction, need_student, need_weak, _backend = further
    logits = (student_logits, weak_logits)
    return pair_outputs(*logits, (need_student, need_weak), 4, reduction, accumulation_dtype(*logits))


LOSS_OPS["uskd"] = define(
    "uskd",
    "Tensor student_logits, Tensor weak_logits, Tensor target, Tensor? batch_sums, Tensor? row_weight, {hyper}, "
    "str rank, bool square, int ignore_index, str reduction, bool need_student, bool need_weak",
    "(Tensor loss, Tensor parts, Tensor student_gradient, Tensor weak_gradient, Tensor student_norm, Tensor weak_norm)",
    _uskd,
    _uskd_fake,
    exported=True,
)


def _zipf_ls(
    student_logits: Tensor,
    dense_logits: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    hyper: list[float] | Tensor,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    transforms.refuse_recorded(student_logits)
    named = hyper_parameters(hyper)
    scale = stored_scale(student_logits.dtype, named.beta + named.ce_weight)
    factors, reduction, (by,) = row_factors(row_weight, target, ignore_index, reduction, (student_logits.dtype,))
    options = Options(named, ignore_index, reduction, (need_gradient,), (scale,))
    result: tuple[Tensor, Tensor, Tensor, Tensor] = backends.get(backend).zipf_ls(
        student_logits, dense_logits, target, factors, options
    )
    _multiply(result[-1], by)
    return result


def _zipf_ls_fake(student_logits: Tensor, *further: Any) -> tuple[Tensor, ...]:
    *_, reduction, need_gradient, _backend = further
    return outputs(student_logits, need_gradient, 2, reduction, accumulation_dtype(student_logits))


LOSS_OPS["zipf_ls"] = define(
    "zipf_ls",
    "Tensor student_logits, Tensor dense_logits, Tensor target, Tensor? row_weight, {hyper}, int ignore_index, "
    "str reduction, bool need_gradient",
    "(Tensor loss, Tensor parts, Tensor gradient, Tensor norm)",
    _zipf_ls,
    _zipf_ls_fake,
    exported=True,
)


def _scale_gradient(gradient: Tensor, grad_output: Tensor, norm: Tensor, backend: str) -> Tensor:
    transforms.refuse_recorded(gradient, grad_output)
    gradient = gradient.contiguous()
    out = torch.empty_like(gradient)
    backends.get(backend).scale_gradient(gradient, grad_output, norm, out)
    return out


def _scale_gradient_compiled(gradient: Tensor, grad_output: Tensor, norm: Tensor, backend: str) -> Tensor:
    # Only when the backward runs is it known whether create_graph=True.
    transforms.refuse_create_graph()
    return _scale_gradient(gradient, grad_output, norm, backend)


def _scale_gradient_(gradient: Tensor, grad_output: Tensor, norm: Tensor, backend: str) -> None:
    transforms.refuse_recorded(gradient, grad_output)
    backends.get(backend).scale_gradient(gradient, grad_output, norm, gradient)


def _scaled_fake(gradient: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)


_SCALE = "Tensor gradient, Tensor grad_output, Tensor norm"
scale_gradient = define("scale_gradient", _SCALE, "Tensor", _scale_gradient, _scaled_fake)
scale_gradient_compiled = define("scale_gradient_compiled", _SCALE, "Tensor", _scale_gradient_compiled, _scaled_fake)
scale_gradient_ = define(
    "scale_gradient_", _SCALE.replace("Tensor", "Tensor(a!)", 1), "()", _scale_gradient_, lambda *_: None
)


def implement_autograd(op: Any, kernel: Callable[..., Any]) -> None:
    """Register the autograd kernel of an op."""
    _library.impl(op, kernel, "Autograd")
