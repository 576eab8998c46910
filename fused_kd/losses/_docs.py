"""The text that the docstrings of the losses share.

A function's own docstring has a summary, ``Args:`` and ``Example:``, and ``Shape:`` and ``Raises:`` if they differ.
:func:`documented` adds the rest: the missing arguments, in the signature's order, and the shared sections. An entry
that starts with a plus sign continues the shared one after its end, or before its full stop.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_ARGS = r"""
    student_logits: Unnormalised scores ``(..., C)``, C at least 2, float64, float32, float16 or bfloat16. Or a
        :class:`fused_kd.Head`, a :class:`fused_kd.ClassShard`, or a DTensor whose classes are sharded (see
        ClassShard).
    teacher_logits: The teacher's logits: same shape and device, any of those dtypes; must not require grad. Or a
        :class:`fused_kd.Head`, :class:`fused_kd.TopK`, :class:`fused_kd.ClassShard` or DTensor.
    target: Class indices ``(...)`` or ``(..., 1)``, or class probabilities ``(..., C)`` (mixup, CutMix).
    temperature: T above, greater than 0.
    ce_weight: Weight of the ordinary cross-entropy, computed in the same pass.
    label_smoothing: Smoothing of the cross-entropy's labels, as in :func:`torch.nn.functional.cross_entropy`.
    logit_standardization: Use the z-scores of both logits, row by row, in all terms but the cross-entropy.
    ignore_index: Rows with this class index are left out of all terms and get a zero gradient.
    reduction: ``"mean"`` over the rows that count (0 if none does), ``"sum"`` or ``"none"``.
    weight: Weight of each row, ``(...)``: a boolean mask or floating-point numbers, at least 0, without gradient. It is
        not a weight per class, as in cross_entropy; with as many rows as classes, no check can tell the two apart.
        ``"none"`` gives :math:`w_i L_i`, ``"sum"`` their sum, and ``"mean"`` that sum over :math:`\sum_i w_i` of the
        rows that count. A row of weight 0 adds nothing to the loss and has a zero gradient, even if it holds NaN.
    normalizer: Replaces the mean's divisor, for instance by the number of items in all micro-batches of a step: a
        number or a Tensor without dimensions, at least 0. With 0 the loss and its gradient are 0. Only for
        ``reduction="mean"``.
    class_dim: The dimension of the classes, in the logits and in probability targets; the shapes above have it last.
        None means the last one. Logits of four or more dimensions need it: 1 for (N, C, H, W), as in
        :func:`torch.nn.functional.cross_entropy`, -1 for (N, H, W, C). Logits are copied if their classes do not lie
        side by side in memory; (N, C, H, W) in ``torch.channels_last`` needs no copy.
    num_classes: How many columns are classes, if the last columns are padding. Padding has no probability and a zero
        gradient; student and teacher may be padded differently. No copy is made. None means all columns.
    backend: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``; see :func:`fused_kd.explain`.
    return_parts: Return ``(loss, parts)`` with {parts}; these are detached and weighted, and sum to the loss.
"""
#: Of a target that may be None.
_OPTIONAL = """
        Only the cross-entropy and ``ignore_index`` use them; with None ``ce_weight`` must be 0, and every row
        counts."""
_INFINITIES = """
    A student's logit of -inf is a class that cannot occur: its probability and its gradient are 0, and 0 log 0
    is 0. {own} The cross-entropy is +inf if a class at -inf has a label other than 0; with label smoothing every
    class has one. A NaN or a logit of +inf makes the loss and the gradient of its row NaN, except at classes of -inf,
    and {others}. An ignored row stays 0, even if it holds NaN. A gradient that is 0 stays 0 for any incoming
    gradient.
"""
#: For a loss that contains the logarithm of the student's probabilities.
WITH_A_TEACHER = """A teacher's logit of -inf is a probability of 0. If a class has probability 0 for the student but
not for the teacher, the loss is +inf."""
_SHAPE = """
    The loss is a scalar, or has the shape of the class indices ``(...)`` for ``reduction="none"``. Its dtype is
    float64 if any logits are, else float32. The gradient has the dtype of ``student_logits``.
"""
_RAISES = """
    TypeError: An argument has a type or dtype that is not supported.
    ValueError: Shapes, devices or hyper-parameters do not fit; a tensor requires grad but gets none; or, on the CPU,
        the probabilities of a row do not sum to 1 within 0.02. They are not checked on a GPU, where a check would
        stall, in Triton, and in a compiled reference.
    IndexError: On the CPU, a class index is out of range. On a GPU, where a check would stall, that row is NaN. There
        a weight that is negative or not finite also makes its row NaN; elsewhere it raises ValueError.
    RuntimeError: ``backend`` cannot run here; the message says why. Or the call needs what only
        ``"reference"`` supports: a second derivative (with create_graph=True, raised in the backward pass), forward
        mode, a transform of torch.func, torch.jit.trace or an export to ONNX.
"""


def documented(
    parts: type[tuple[Any, ...]], infinities: str, others: str = "no other's"
) -> Callable[[Function], Function]:
    """Return a decorator that completes the docstring of a loss: its ``parts``, what it does at -inf, and which
    ``others`` become NaN with a row."""

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
    if function.__defaults__:
        shared["target"] += _OPTIONAL
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
    """Return an entry. Only combined text is wrapped anew; other lines stay as in the source."""
    if not own.startswith("+"):
        return f"    {name}: {own}"
    more = own[1:]
    if not more and name != "return_parts":
        return f"    {name}: {shared}"
    return _filled(f"{name}: {shared.removesuffix('.') if more.startswith((';', ',')) else shared}{more}", 8)


def _filled(text: str, indent: int) -> str:
    """Wrap text to the width of the sources, without their indentation of four columns."""
    words, inner = " ".join(text.split()), " " * indent
    return textwrap.fill(words, 116, initial_indent="    ", subsequent_indent=inner, break_on_hyphens=False)
