"""A Triton driver whose device is the interpreter: CPU tensors run what Triton compiles for an NVIDIA GPU.

Binding, specialisation, cache, compilation and the check of globals at each launch are Triton's own JIT. What is not
executed is ptxas: the "binary" is the PTX.
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
#: Bytes of shared memory that a block can have, by compute capability.
_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


class Launched(NamedTuple):
    """``shared`` are the bytes of shared memory of a block of ``threads``."""

    kernel: str
    grid: tuple[int, int, int]
    result: Result
    seconds: float
    threads: int
    shared: int
    ptx: str


class Session:
    """What has been launched, and how."""

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
    """Packs arguments as the driver's API has them, and runs the kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.types = list(src.signature.values())
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        # Before the kernel's own arguments come Triton's: metadata, hooks. Their number changes with its release.
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
        # Triton adds pointers to scratch memory, which no kernel of ours has.
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
    """Where a tensor begins, after its storage has been given a place of its own, as aligned as it is."""
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
        return session.capability  # the JIT then keeps what it compiled for each apart

    def get_current_stream(self, device: int) -> int:
        return 0


_make_cubin = compiler.CUDABackend.make_cubin


def assemble(ptx: str, capability: int) -> bytes:
    """The cubin that Triton has of a launch's PTX, made by its own ptxas."""
    backend = compiler.CUDABackend(GPUTarget("cuda", capability, 32))
    options = backend.parse_options({"enable_fp_fusion": False, "arch": f"sm{capability}"})
    cubin: bytes = _make_cubin(backend, ptx, {}, options, capability)
    return cubin


def _no_binary(self: Any, source: str, metadata: Any, options: Any, capability: int) -> bytes:
    return source.encode()


def install(capability: int = 90, options: Options | None = None) -> Session:
    """From now on fused_kd's Triton backend runs CPU tensors on the interpreter, compiled for a compute capability (90
    for 9.0). For a process in which Triton has not been asked for anything yet."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 asks for Triton's own interpreter, which compiles nothing")
    # What is cached here is no binary that a GPU could run.
    os.environ["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "fused_kd_ptx_cache")
    session.capability, session.options = capability, options or Options()
    compiler.CUDABackend.make_cubin = _no_binary
    driver.set_active(Driver())
    cpu_tensors.admit()
    return session
