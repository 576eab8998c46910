"""What the docstrings of the losses have in common, said once; a function's own has what is particular to its loss.

A function's docstring has a summary, ``Args:`` and ``Example:``, and ``Shape:`` and ``Raises:`` where they differ.
:func:`documented` puts in what is shared: the arguments that are missing, in the signature's order, and the sections.
An entry that starts with a plus sign goes on where the shared one ends, or before its full stop.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_ARGS = r"""
    student_logits: Unnormalised scores ``(..., C)``, C at least 2, float64, float32, float16 or bfloat16. Or one of
        these in their place: a :class:`fused_kd.Head`, a :class:`fused_kd.ClassShard`, or a DTensor whose classes are
        sharded, which ClassShard explains.
    teacher_logits: The teacher's, same shape and device, any of those dtypes; must not require grad. Or one of these in
        their place: a :class:`fused_kd.Head`, :class:`fused_kd.TopK`, :class:`fused_kd.ClassShard` or DTensor.
    target: Class indices ``(...)`` or ``(..., 1)``, or class probabilities ``(..., C)``. They serve the
        cross-entropy and ``ignore_index``; without them ``ce_weight`` must be 0 and every row counts.
    temperature: T above.
    ce_weight: Weight of the ordinary cross-entropy, computed in the same pass.
    label_smoothing: Smoothing of the cross-entropy's labels, as in :func:`torch.nn.functional.cross_entropy`.
    logit_standardization: Use the z-scores of both logits, row by row, in all terms but the cross-entropy.
    ignore_index: Rows with this class index count nowhere and get a zero gradient.
    reduction: ``"mean"`` over the rows that count (0 if none does), ``"sum"`` or ``"none"``.
    weight: Weight of each row, ``(...)``: a boolean mask, or floating-point, without gradient, at least 0. Not a weight
        per class, as in cross_entropy; with as many rows as classes, no check can tell the two apart. ``"none"``
        gives :math:`w_i L_i`, ``"sum"`` their sum and ``"mean"`` that over :math:`\sum_i w_i` of the rows that count.
        A row of weight 0 adds exactly nothing to the loss and has a zero gradient, whatever it holds.
    normalizer: What the sum over the rows is divided by in place of the mean's divisor, such as the number of items in
        all micro-batches of a step: a number or a Tensor without dimensions, at least 0. With 0 the loss and its
        gradient are 0. It goes with ``reduction="mean"`` alone.
    class_dim: The dimension of the classes, in the logits and in probability targets; the shapes here have it last.
        None is the last one. Logits of four or more dimensions must give it: 1 for (N, C, H, W), as
        :func:`torch.nn.functional.cross_entropy` has them, -1 for (N, H, W, C). Logits whose classes do not lie
        side by side in memory are copied; (N, C, H, W) in ``torch.channels_last`` needs no copy.
    num_classes: How many of the columns are classes, of logits whose last columns are padding. Padding has no
        probability and a zero gradient; student and teacher may have different amounts of it. None is all.
    backend: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``; see :func:`fused_kd.explain`.
    return_parts: Return ``(loss, parts)`` with the detached, weighted {parts}, which sum to the loss.
"""
_INFINITIES = """
    A student's logit of -inf is a class that cannot occur: its probability and its gradient are 0, and 0 log 0
    is 0. {own} The cross-entropy is +inf if a class at -inf has a label other than 0; label smoothing gives every
    class one. A NaN or a logit of +inf makes the loss and the gradient of its row NaN, and {others}. An ignored row
    stays 0, whatever it holds. A gradient that is 0 stays 0 for any incoming gradient.
"""
#: Of a loss whose distillation has the logarithm of the student's probabilities.
WITH_A_TEACHER = """A teacher's -inf is a probability of 0. Where the student's is 0 and the teacher's is not, the loss
is +inf."""
_SHAPE = """
    The loss is a scalar, or has the shape of the class indices ``(...)`` for ``reduction="none"``. Its dtype is
    float64 if any logits are, else float32. The gradient has the dtype of ``student_logits``.
"""
_RAISES = """
    TypeError: An argument has a type or dtype that is not supported.
    ValueError: Shapes, devices or hyper-parameters do not fit; a tensor requires grad but gets none; or, on the CPU,
        a row's probabilities do not sum to 1, give or take 0.02. On a GPU, where a check would stall, in Triton and
        in a compiled reference the probabilities are not checked.
    IndexError: A class index is out of range, on the CPU. On a GPU, where a check would stall, that row is NaN. A
        weight that is negative or not finite also makes its row NaN there; elsewhere it is a ValueError.
    RuntimeError: ``backend`` names one that cannot run here; the message says why. Or a fused backend is asked for
        what only ``"reference"`` can do: a second derivative (create_graph=True, in the backward), forward mode, a
        transform of torch.func, torch.jit.trace or an export to ONNX.
"""


def documented(
    parts: type[tuple[Any, ...]], infinities: str, others: str = "no other's"
) -> Callable[[Function], Function]:
    """Completes the docstring of a loss: what its ``parts`` are, what it does at -inf, and which ``others`` become NaN
    with a row."""

    def complete(function: Function) -> Function:
        if function.__doc__:  # python -OO has none
            function.__doc__ = _completed(function, parts._fields, infinities, others)  # type: ignore[attr-defined]
        return function

    return complete


def _completed(function: Callable[..., Any], parts: tuple[str, ...], own: str, others: str) -> str:
    summary, *rest = re.split(r"^(Args|Shape|Raises|Example):\n", inspect.cleandoc(function.__doc__ or ""), flags=re.M)
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    code = function.__code__
    *first, last = [f"``parts.{name}``" for name in parts]
    shared = _entries(_ARGS.format(parts=f"{', '.join(first)} and {last}"))
    sections = {
        "Args": _merged(shared, given["Args"], code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]),
        "Infinities and NaN": _filled(_INFINITIES.format(own=own, others=others), 4),
        "Shape": given.get("Shape", _SHAPE),
        "Returns": "    The loss, or the loss and its parts.",
        "Raises": _merged(raises := _entries(_RAISES), given.get("Raises", ""), raises),
        "Example": given["Example"],
    }
    return summary + "\n\n".join(f"{name}:\n{text.strip(chr(10))}" for name, text in sections.items())


def _entries(text: str) -> dict[str, str]:
    return dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", text, flags=re.M))


def _merged(shared: dict[str, str], own: str, names: Iterable[str]) -> str:
    given = _entries(own)
    return "\n".join(_entry(name, shared.get(name, ""), given.get(name, "+")) for name in names)


def _entry(name: str, shared: str, own: str) -> str:
    """Lines of a source stay as they are, but for what is put together here."""
    if not own.startswith("+"):
        return f"    {name}: {own}"
    more = own[1:]
    if not more and name != "return_parts":
        return f"    {name}: {shared}"
    return _filled(f"{name}: {shared.removesuffix('.') if more.startswith((';', ',')) else shared}{more}", 8)


def _filled(text: str, indent: int) -> str:
    """As wide as the sources are, from which four columns of indentation are gone."""
    words, inner = " ".join(text.split()), " " * indent
    return textwrap.fill(words, 116, initial_indent="    ", subsequent_indent=inner, break_on_hyphens=False)
