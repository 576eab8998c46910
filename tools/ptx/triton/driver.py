"""A Triton driver with the interpreter as its device: runs code compiled for an NVIDIA GPU on CPU tensors.

Triton's own JIT does the binding, specialisation, caching, compilation and the check of globals at each launch. Only
ptxas does not run: the "binary" is the PTX.
"""

from __future__ import annotations

import ctypes
import os
import struct
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.runtime import driver

from tools import cpu_tensors
from tools.ptx import Fault, Memory, Module, Options, Result, launch
from tools.ptx.types import Array

_FORMATS = {
    "i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u1": "<B", "u8": "<B", "u16": "<H", "u32": "<I",
    "u64": "<Q", "fp32": "<f", "fp64": "<d",
}  # fmt: skip
#: KiB of shared memory available to a block, by compute capability.
_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


class Launched(NamedTuple):
    """One launch; ``shared``: bytes of shared memory of a block of ``threads``."""

    kernel: str
    grid: tuple[int, int, int]
    result: Result
    seconds: float
    threads: int
    shared: int
    ptx: str


class Session:
    """All launches so far, and the options for the next ones."""

    def __init__(self) -> None:
        self.capability = 90
        self.options = Options()
        self.launches: list[Launched] = []
        self.modules: dict[bytes, Module] = {}

    @property
    def problems(self) -> list[str]:
        return [f"{each.kernel}: {text}" for each in self.launches for text in each.result.problems]


session = Session()


def _bytes_of(tensor: Tensor) -> Array:
    """A tensor's whole storage."""
    storage = tensor.untyped_storage()
    return np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))


class _Utils:
    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        if binary not in session.modules:
            session.modules[binary] = Module(binary.decode())
        module = session.modules[binary]
        # Module, function, registers, spills, most threads of a block.
        return module, (module, name, shared, binary), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED[device] * 1024}


class _Launcher:
    """Packs arguments as for CUDA's driver API, and runs the kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.types = list(src.signature.values())
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        # Triton's own arguments (metadata, hooks) come first; their number differs between releases.
        arguments = rest[len(rest) - len(self.types) :]
        module, name, shared, binary = function
        memory, pieces = Memory(), []
        places: dict[int, int] = {}
        for kind, value in zip(self.types, arguments, strict=True):
            if kind == "constexpr":
                continue
            if kind[0] != "*":
                pieces.append(struct.pack(_FORMATS[kind], value))
            else:
                pieces.append(struct.pack("<Q", _pointer(memory, places, value)))
        kernel = module.functions[name]
        # Triton adds pointers to scratch memory, which none of our kernels uses.
        if getattr(self.metadata, "global_scratch_size", 0) or getattr(self.metadata, "profile_scratch_size", 0):
            raise Fault(f"{name}: scratch memory")
        pieces += [bytes(8)] * (len(kernel.params) - len(pieces))
        params = bytearray(kernel.param_bytes)
        for (label, offset, size), piece in zip(kernel.params, pieces, strict=True):
            if len(piece) != size:
                raise Fault(f"{name}: {label} has {size} bytes, its argument {len(piece)}")
            params[offset : offset + size] = piece
        began = time.perf_counter()
        threads = 32 * self.metadata.num_warps
        result = launch(module, name, memory, (x, y, z), (threads, 1, 1), shared, bytes(params), session.options)
        seconds = time.perf_counter() - began
        session.launches.append(Launched(name, (x, y, z), result, seconds, threads, shared, binary.decode()))
        if result.problems:
            raise Fault(f"{name}: {'; '.join(result.problems)}")


def _pointer(memory: Memory, places: dict[int, int], tensor: Tensor) -> int:
    """A tensor's address in ``memory``; adds its storage on first use, with the same alignment."""
    storage = tensor.untyped_storage()
    start = storage.data_ptr()
    if not storage.nbytes():
        return 0
    if start not in places:
        places[start] = memory.add(_bytes_of(tensor), offset=start % 512)
    return places[start] + tensor.data_ptr() - start


class Driver:
    utils = _Utils()
    launcher_cls = _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", session.capability, 32)

    def get_current_device(self) -> int:
        return session.capability  # makes the JIT cache kernels per capability

    def get_current_stream(self, device: int) -> int:
        return 0


_make_cubin = compiler.CUDABackend.make_cubin


def assemble(ptx: str, capability: int) -> bytes:
    """Assemble a launch's PTX to a cubin with Triton's own ptxas."""
    backend = compiler.CUDABackend(GPUTarget("cuda", capability, 32))
    options = backend.parse_options({"enable_fp_fusion": False, "arch": f"sm{capability}"})
    cubin: bytes = _make_cubin(backend, ptx, {}, options, capability)
    return cubin


def _no_binary(self: Any, source: str, metadata: Any, options: Any, capability: int) -> bytes:
    return source.encode()


def install(capability: int = 90, options: Options | None = None) -> Session:
    """Make fused_kd's Triton backend run CPU tensors on the interpreter, compiled for a capability (90 for 9.0).

    Call it before any use of Triton in the process.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: Triton's interpreter compiles nothing")
    # A cache of its own: a GPU cannot run these binaries.
    os.environ["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "fused_kd_ptx_cache")
    session.capability, session.options = capability, options or Options()
    compiler.CUDABackend.make_cubin = _no_binary
    driver.set_active(Driver())
    cpu_tensors.admit()
    return session
