"""Runs the CUDA library's launches on the interpreter.

    library = Library(build(folder))
    with library.patched(native_cuda):
        native_cuda.uskd(library.core, ...)  # CPU tensors

A launch may access its call's arguments and the tensors allocated during the call: each tensor's own extent, so that
one element past its end is out of bounds.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

from tools.ptx import Fault, Memory, Module, Options, launch
from tools.ptx.cuda.build import architecture_of

#: The library's functions.
CALLS = ("uskd_batch_sums", "uskd", "scale_gradient")
#: CUDA's error numbers that this driver returns; runtime.cpp returns others.
INVALID_VALUE, ILLEGAL_ADDRESS = 1, 700


class Request(ctypes.Structure):
    """``Launch`` of runtime.cpp."""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("device", ctypes.c_int),
    ]


LAUNCHER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Request))


@dataclass
class Totals:
    """Totals of all launches."""

    launches: int = 0
    seconds: float = 0.0
    problems: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)


#: Functions that allocate outputs and workspaces.
_MAKERS = (torch.empty, torch.empty_like, torch.Tensor.new_empty)


class Extents(TorchFunctionMode):
    """Memory extents of added tensors and of tensors made while the mode is active; keeps all of them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def add(self, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.numel():
            self.tensors.append(value)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _MAKERS:
            self.add(result)
        return result

    def ranges(self) -> list[tuple[int, int]]:
        """(start, end) addresses, with overlapping ranges merged."""
        merged: list[tuple[int, int]] = []
        for start, end in sorted(map(_extent, self.tensors)):
            if merged and start < merged[-1][1]:
                start, end = merged[-1][0], max(end, merged.pop()[1])
            merged.append((start, end))
        return merged


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class Library:
    """A module from :func:`tools.ptx.cuda.build.build`. Only one per process: Python would return it for a second."""

    def __init__(self, path: Path, options: Options | None = None) -> None:
        self.core = _import(path)
        self.options = options or Options()
        self.totals = Totals()
        self.extents = Extents()
        self.fault: BaseException | None = None  # the error that ended the last launch
        self._texts = {ptx: ptx.read_text() for ptx in sorted(path.parent.glob("*.ptx"))}
        self._modules: dict[Path, Module] = {}
        self._runtime = ctypes.CDLL(str(path))
        self._runtime.ptx_waits.restype = ctypes.c_long
        self._runtime.ptx_runs_backwards.restype = ctypes.c_bool
        self._launcher = LAUNCHER(self._answer)  # a reference, because C keeps none
        self._runtime.ptx_set_launcher(self._launcher, architecture_of(path.parent))

    def reset(self) -> None:
        """Restore the context after a fault."""
        self._runtime.ptx_reset()
        self.fault = None

    @contextlib.contextmanager
    def patched(self, native_cuda: ModuleType) -> Iterator[None]:
        """Make the functions of fused_kd.backends.native.cuda accept CPU tensors and raise errors of launches."""
        before = {name: getattr(native_cuda, name) for name in (*CALLS, "_place")}
        for name in CALLS:
            setattr(native_cuda, name, self.checked(before[name]))
        native_cuda._place = lambda device: (0, 0)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(native_cuda, name, function)

    def checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            problems, waits = self.totals.problems.copy(), self._runtime.ptx_waits()
            try:
                result = self.unchecked(function)(*args, **kwargs)
            except RuntimeError:
                if self.fault is None:
                    raise  # the runtime refused the launch; CUDA's message is all there is
                fault = self.fault
                self.reset()
                raise fault from None
            new = self.totals.problems - problems
            if self._runtime.ptx_waits() != waits:
                new["the call waited for the GPU"] += 1
            if new:
                raise Fault("; ".join(f"{text} ({count})" for text, count in new.items()))
            return result

        return call

    def unchecked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The call as on a GPU, with CUDA's errors alone."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.extents = Extents()
            for value in (*args, *kwargs.values()):
                self.extents.add(value)
            with self.extents:
                return function(*args, **kwargs)

        return call

    def _module(self, kernel: str) -> Module:
        """The module with this kernel; parsed on demand, as CUB's are long."""
        path = next(path for path, text in self._texts.items() if f".entry {kernel}(" in text)
        if path not in self._modules:
            self._modules[path] = Module(self._texts[path])
        return self._modules[path]

    def _answer(self, pointer: Any) -> int:
        """Called by runtime.cpp through C, so it must not raise."""
        try:
            return self._launch(pointer.contents)
        except BaseException as fault:
            self.fault = fault
        return -ILLEGAL_ADDRESS

    def _launch(self, request: Request) -> int:
        name = request.kernel.decode()
        module = self._module(name)
        kernel = module.functions[name]
        grid, block = (tuple(request.grid), tuple(request.block))
        if kernel.maxntid and block[0] * block[1] * block[2] > kernel.maxntid:
            return INVALID_VALUE  # more threads than its __launch_bounds__
        parameters = bytearray(kernel.param_bytes)
        for index, (_, offset, size) in enumerate(kernel.params):
            parameters[offset : offset + size] = ctypes.string_at(request.arguments[index] or 0, size)
        memory = Memory()
        for start, end in self.extents.ranges():
            memory.add(_bytes_at(start, end - start), start)
        options = self.options
        if self._runtime.ptx_runs_backwards():  # set by a test
            options = replace(options, schedule="backward")
        began = time.perf_counter()
        result = launch(module, name, memory, grid, block, request.shared, bytes(parameters), options)
        self.totals.launches += 1
        self.totals.kernels[name] += 1
        self.totals.seconds += time.perf_counter() - began
        self.totals.problems.update(result.problems)
        self.totals.counts.update(result.counts)
        return 0


def _bytes_at(address: int, size: int) -> npt.NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _import(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
