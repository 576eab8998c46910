"""Repeated calls on a GPU skip the checks and the dispatcher.

No check reads the values of a GPU's tensors, since that would stall it. So the result of the checks depends only on the
options of a call and on the dtypes, shapes, strides and devices of its tensors. A call that repeats these needs no
checks. Unless something records or transforms the call, it does not need the dispatcher either, which would only find
the op's function. For a thousand rows of a thousand classes a GPU waits for the host, and this saves a third of the
host's time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd import autograd, ops
from fused_kd.core import checks, transforms

#: The most kinds of calls that are kept; then all are dropped. A schedule has one kind for each value.
MOST = 1024


class Known(NamedTuple):
    """The op's call in a call that has passed the checks. ``arguments`` lack the tensors; ``tensors`` lists (place,
    number of the call's tensor). ``gradients`` is the number of logits that may get one, the first arguments, or 0.
    ``new``: nobody has looked yet whether Triton's launches are all that the function does."""

    function: Callable[..., Any]
    arguments: list[Any]
    tensors: tuple[tuple[int, int], ...]
    gradients: int
    new: bool


_known: dict[tuple[Any, ...], Known] = {}
_OPTIONS = frozenset((str, int, bool, type(None)))


def on_gpu(logits: Any) -> bool:
    return type(logits) is Tensor and logits.is_cuda


def loss(
    name: str, tensors: tuple[Any, ...], numbers: dict[str, float], settings: dict[str, Any], common: tuple[Any, ...]
) -> tuple[Tensor, Tensor | None] | None:
    """Return the loss and, if wanted, its stacked parts; None if this call repeats none. The arguments are
    those of :func:`fused_kd.direct.loss`."""
    key = _key(name, tensors, numbers, settings, common)
    if key is None or (known := _known.get(key)) is None:
        return None
    arguments = known.arguments.copy()
    for place, number in known.tensors:
        arguments[place] = tensors[number]
    function = known.function
    if known.new:
        from fused_kd.backends.triton import replay

        def function(*arguments: Any) -> Any:
            results, repeat = replay.trace(known.function, arguments)
            _known[key] = known._replace(function=repeat or known.function, new=False)
            return results

    return autograd.run_function(function, arguments, known.gradients, common[-1])


def remember(
    name: str,
    rows: checks.Rows,
    numbers: dict[str, float],
    settings: dict[str, Any],
    common: tuple[Any, ...],
    call: autograd.OpCall,
) -> None:
    """Keep a call that has passed the checks and run. Its ``rows`` are its tensors, or others of the same meaning, for
    which the checks would pass as well."""
    if call.saved is not None or not on_gpu(rows.student_logits):
        return
    tensors = rows[:3]
    key = _key(name, tensors, numbers, settings, common)
    if key is None:
        return  # also while the compiler traces, which must not see addresses
    numbers_of = {_memory(tensor): number for number, tensor in enumerate(tensors) if tensor is not None}
    own = [(place, _memory(value)) for place, value in enumerate(call.arguments) if isinstance(value, Tensor)]
    # One tensor in two roles, or a tensor that was made on the way, has no number.
    if len(numbers_of) != len(own) or any(memory not in numbers_of for _, memory in own):
        return
    if len(_known) >= MOST:
        _known.clear()
    empty = [None if isinstance(value, Tensor) else value for value in call.arguments]
    places = tuple((place, numbers_of[memory]) for place, memory in own)
    gradients = len(call.wanted) if any(call.wanted) else 0
    _known[key] = Known(ops.FUNCTIONS[call.op], empty, places, gradients, call.arguments[-1] == "triton")


def _memory(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _key(
    name: str, tensors: tuple[Any, ...], numbers: dict[str, float], settings: dict[str, Any], common: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Return what the checks of a call and the arguments of its op depend on, or None for a call that is not kept."""
    weight, normalizer, class_dim, num_classes, backend, return_parts = common
    if not (weight is None and normalizer is None and class_dim is None and num_classes is None):
        return None
    if not transforms.unobserved():
        return None
    key: list[Any] = [name, torch.is_grad_enabled()]
    for number in numbers.values():
        if type(number) is not float and type(number) is not int:  # 1 and 1.0 are the same number, True is none
            return None
        key.append(number)
    for option in (*settings.values(), backend, return_parts):
        kind = type(option)
        if kind not in _OPTIONS:
            return None
        key += (option, kind)
    for tensor in tensors:
        if tensor is None:
            key.append(None)
        elif transforms.plain(tensor):
            # A replay also depends on the strides and the alignment.
            key += (tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16, tensor.requires_grad)
        else:
            return None
    key += [tensor.device for tensor in tensors if tensor is not None]
    return tuple(key)
