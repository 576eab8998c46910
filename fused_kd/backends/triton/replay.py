"""Replays launches: repeated calls are not planned again.

For a thousand rows of a thousand classes, planning a loss and binding its launches takes the host several times as long
as the kernels run, because Triton inspects each of some forty arguments. A call that differs from an earlier one only
in the contents and addresses of its tensors needs the same kernels with the same numbers. So these are kept, with
places for the tensors, and the compiled kernels are launched directly, as Triton's JIT does in the end. The public
interface of a compiled kernel takes twice as long, mostly for hooks that nobody has set.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd.backends import cuda_devices
from fused_kd.backends.triton import launch as launching
from fused_kd.backends.triton.launch import Launch

#: The most kinds of calls that are kept; then all are dropped. A schedule has one kind for each value.
MOST = 1024


class Step(NamedTuple):
    """A launch of the compiled ``kernel``. ``arguments`` lack the tensors; ``tensors`` lists (place, number of the
    call's tensor)."""

    kernel: Any
    programs: int
    arguments: list[Any]
    tensors: tuple[tuple[int, int], ...]


class Replay(NamedTuple):
    """The launches of a call. ``temporaries`` are (shape, dtype) of the tensors that it needs beside its inputs and
    outputs. Their numbers in :attr:`Step.tensors` follow those."""

    temporaries: tuple[tuple[torch.Size, torch.dtype], ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Repeat:
    """An op's function whose results all come from one replay. ``made`` are their shapes and dtypes. For each tensor of
    the replay ``places`` has its number among the arguments and the results, or None."""

    replay: Replay
    made: tuple[tuple[torch.Size, torch.dtype], ...]
    places: tuple[int | None, ...]

    def __call__(self, *arguments: Any) -> list[Tensor]:
        device = arguments[0].device
        results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.made]
        known = (*arguments, *results)
        with cuda_devices.current(device):
            _launch(self.replay, [None if place is None else known[place] for place in self.places], device)
        return results


#: None for a call that cannot be kept.
_kept: dict[tuple[Any, ...], Replay | None] = {}
_watching = threading.local()  # its `seen` has the replays of this thread, and their tensors, while trace() runs


def run(
    name: str,
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
    settings: tuple[Any, ...],
    plan: Callable[[], list[Launch]],
) -> None:
    """Run a ``plan``, or repeat the launches of an earlier call of the same ``name``, ``settings`` and kind of
    ``inputs``.

    ``settings`` and the inputs' dtypes, shapes, strides and alignments must decide everything in the plan but its
    tensors, including the outputs' shapes. The plan's temporaries are new and uninitialised.
    """
    first = inputs[0]
    assert first is not None
    device = first.device
    tensors = [*inputs, *outputs]
    ids = [*map(id, tensors)]
    # One tensor may be two arguments, such as a teacher's probabilities as the labels: then both have one number.
    key = (name, device, settings, *map(ids.index, ids), *map(_kind, inputs))
    replay = _kept.get(key)
    if (seen := getattr(_watching, "seen", None)) is not None:
        seen.append((replay, tensors.copy()))
    if replay is not None:
        with cuda_devices.current(device):
            _launch(replay, tensors, device)
        return
    launches = plan()
    compiled = launching.run(launches, device)
    if key not in _kept:
        if len(_kept) >= MOST:
            _kept.clear()
        _kept[key] = _keep(launches, compiled, tensors)


def trace(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Sequence[Tensor], Repeat | None]:
    """Call an op's function. Return its results, and what may be called in its place for such arguments, with other
    contents and addresses: None if it does more than to replay launches."""
    seen: list[tuple[Replay | None, list[Tensor | None]]] = []
    _watching.seen = seen
    try:
        results = function(*arguments)
    finally:
        _watching.seen = None
    replay, tensors = seen[0] if len(seen) == 1 else (None, [])
    if replay is None:
        return results, None
    known = [*arguments, *results]
    places: list[int | None] = []
    for tensor in tensors:
        numbers = [number for number, each in enumerate(known) if each is tensor]
        if tensor is not None and len(numbers) != 1:
            return results, None  # made on the way, or two arguments
        places.append(None if tensor is None else numbers[0])
    # PyTorch counts its own writes to a tensor.
    if any(each._version or number not in places for number, each in enumerate(results, len(arguments))):
        return results, None
    return results, Repeat(replay, tuple((each.shape, each.dtype) for each in results), tuple(places))


def _kind(tensor: Tensor | None) -> Any:
    """Return what a plan depends on. Triton compiles another kernel for pointers that are not multiples of 16."""
    return tensor if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16)


def _launch(replay: Replay, tensors: list[Tensor | None], device: torch.device) -> None:
    for shape, dtype in replay.temporaries:
        tensors.append(torch.empty(shape, dtype=dtype, device=device))
    driver, knobs = _triton()
    active = driver.active
    stream = active.get_current_stream(active.get_current_device())
    # A profiler sets hooks, which get each kernel's name.
    hooked = any(bool(getattr(hook, "calls", hook)) for hook in (knobs.launch_enter_hook, knobs.launch_exit_hook))
    for kernel, programs, arguments, places in replay.steps:
        filled = arguments.copy()  # another thread may launch the same step
        for where, which in places:
            filled[where] = tensors[which]
        if hooked:
            kernel[(programs, 1, 1)](*filled, stream=stream)
        else:
            kernel.run(programs, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *filled)


@lru_cache(maxsize=1)
def _triton() -> tuple[Any, Any]:
    """Return Triton's driver and the settings of its runtime."""
    triton = importlib.import_module("triton")
    return triton.runtime.driver, triton.knobs.runtime


def _keep(launches: Sequence[Launch], compiled: Sequence[Any], known: list[Tensor | None]) -> Replay | None:
    """Return the replay of these launches, or None if there can be none."""
    numbers = {id(tensor): number for number, tensor in reversed(list(enumerate(known))) if tensor is not None}
    storages = {tensor.untyped_storage().data_ptr() for tensor in known if tensor is not None and tensor.numel()}
    temporaries: list[Tensor] = []
    steps = []
    for launch, kernel in zip(launches, compiled, strict=True):
        # PyTorch's functions and Triton's interpreter have no compiled kernel.
        if kernel is None:
            return None
        function = launching.kernels()[launch.kernel]
        arguments: list[Any] = []
        places = []
        given = iter(launch.arguments)
        for parameter in function.params:
            value = launch.options[parameter.name] if parameter.is_constexpr else next(given)
            if isinstance(value, Tensor):
                if id(value) not in numbers:
                    if value.untyped_storage().data_ptr() in storages or not value.is_contiguous():
                        return None  # a view of another tensor
                    numbers[id(value)] = len(known) + len(temporaries)
                    temporaries.append(value)
                places.append((len(arguments), numbers[id(value)]))
                value = None
            arguments.append(value)
        steps.append(Step(kernel, launch.programs, arguments, tuple(places)))
    return Replay(tuple((tensor.shape, tensor.dtype) for tensor in temporaries), tuple(steps))
