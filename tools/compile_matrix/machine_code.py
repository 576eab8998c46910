"""Compiles planned launches for NVIDIA's and AMD's GPUs without having them, and reads the compiler's report from the
machine code.

:func:`compile_launch` needs Triton, no GPU, and a process without TRITON_INTERPRET. :func:`read_cubin` needs cuobjdump,
which Triton ships. ``__main__`` decides which calls to compile, and checks the reports.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd.backends.triton import layout
from fused_kd.backends.triton.launch import Launch, kernels

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


class MachineCode(NamedTuple):
    """The compiler's report of a kernel. ``threads`` is the largest size of a block, 0 if unknown. ``stack`` is the
    local memory of a thread and ``local`` the number of instructions on it: 0 and 0 mean that nothing spills.

    ``loads`` and ``stores`` count the instructions on global memory by bytes per thread. ``instructions`` counts all,
    and ``exponentials`` those that compute one. Each counts once, however often a loop runs it. ``seconds`` is the
    compilation time, 0 if unknown.
    """

    registers: int
    stack: int
    shared: int
    local: int
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: int
    exponentials: int
    threads: int
    seconds: float = 0.0


def target_of(gpu: int | str) -> Any:
    """Return Triton's target for a compute capability (90 for 9.0), or for an AMD GPU such as "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if isinstance(gpu, int):
        return GPUTarget("cuda", gpu, layout.NVIDIA.lanes)
    return GPUTarget("hip", gpu, 64 if gpu.startswith("gfx9") else 32)


def source_of(launch: Launch, gpu: int | str = 90) -> tuple[Any, dict[str, Any]]:
    """Return the compiler's input for a launch: the source, specialised as by the JIT, and the options."""
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    target = target_of(gpu)
    backend = make_backend(target)
    known = layout.NVIDIA if isinstance(gpu, int) else layout.Gpu(target.warp_size, False)
    function = kernels()[launch.kernel]
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], Any] = {}
    arguments, options = iter(launch.arguments), dict(layout.fitted(launch.options, known))
    parameters = {parameter.name for parameter in function.params}
    compiler_options = {name: options.pop(name) for name in [*options] if name not in parameters}
    for parameter in function.params:
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            continue
        argument = next(arguments)
        if argument is None:
            signature[parameter.name], options[parameter.name] = "constexpr", None
        elif isinstance(argument, Tensor):
            signature[parameter.name] = "*" + TYPES[argument.dtype]
            # Whether it is aligned to 16 bytes, as meta tensors are, and for AMD within 2 GiB of its first element.
            if found := backend.parse_attr(backend.get_tensor_specialization(argument, align=True)):
                attributes[(parameter.num,)] = found
        else:
            signature[parameter.name] = parameter.annotation_type or "i32"  # an int that may be None has none
    # The compiler itself silently drops unknown options.
    if unknown := compiler_options.keys() - {field.name for field in fields(backend.parse_options({}))}:
        raise ValueError(f"{launch.kernel}: neither an argument nor an option of the compiler: {sorted(unknown)}")
    return ASTSource(function, signature, options, attributes), compiler_options


def compile_launch(launch: Launch, gpu: int | str) -> MachineCode:
    """Compile a planned launch for a GPU (:func:`target_of`) as Triton would at its first call."""
    import triton

    source, compiler_options = source_of(launch, gpu)
    start = time.perf_counter()
    kernel = triton.compile(source, target=target_of(gpu), options=compiler_options)
    seconds = time.perf_counter() - start
    if "amdgcn" in kernel.asm:
        code = read_amdgcn(kernel.asm["amdgcn"])
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(kernel.asm["cubin"])
            (code,) = read_cubin(path).values()
    # Triton's shared memory is all dynamic, so only the launcher's metadata has its size.
    return code._replace(shared=kernel.metadata.shared, seconds=seconds)


#: The bytes that an instruction on global memory moves, by the suffix of its name.
_AMD_WIDTHS = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def read_amdgcn(text: str) -> MachineCode:
    """Read the kernel of AMD's assembly. ``registers`` are vector registers; ``local`` also counts spilled ones."""

    def number(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)$", text, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"expected .{name} in AMD's assembly")
        return int(found[1])

    def moved(what: str) -> dict[int, int]:
        names = re.findall(rf"^\s+(?:global|buffer)_{what}_[us]?(byte|short|dword(?:x\d)?)(?=_|\s)", text, re.MULTILINE)
        return dict(sorted(Counter(_AMD_WIDTHS[name] for name in names).items()))

    body = text.partition(".section")[0]
    return MachineCode(
        number("vgpr_count"),
        number("private_segment_fixed_size"),
        number("group_segment_fixed_size"),
        len(re.findall(r"^\s+scratch_(?:load|store)", text, re.MULTILINE)) + number("vgpr_spill_count"),
        moved("load"),
        moved("store"),
        len(re.findall(r"^\t[a-z]\w+", body, re.MULTILINE)),
        len(re.findall(r"^\s+v_exp_f32", body, re.MULTILINE)),
        number("max_flat_workgroup_size"),
    )


def cuobjdump() -> str | None:
    """Return the program that reads cubins: Triton's, as new as its compiler or newer, else CUDA's."""
    triton = find_spec("triton")
    for folder in (triton.submodule_search_locations if triton else None) or ():
        path = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return str(path)
    return shutil.which("cuobjdump")


def read_cubin(path: Path) -> dict[str, MachineCode]:
    """Read the kernels of a cubin, by their mangled names."""
    program = cuobjdump()
    if program is None:
        raise RuntimeError("cuobjdump is needed to read machine code: it comes with Triton and with CUDA")

    def dump(option: str) -> str:
        command = [program, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    # A table of sections comes first, so a part must start at a section's own header.
    threads = {
        name: int(text[1], 16) * int(text[2], 16) * int(text[3], 16)
        for name, part in _parts(r"^\.nv\.info\.(\S+)$", dump("-elf"))
        if (text := re.search(r"EIATTR_MAX_THREADS\s+Format:\s*\S+\s+Value:\s*(\w+) (\w+) (\w+)", part))
    }
    code = dict(_parts(r"^\s*Function : (\S+)$", dump("-sass")))
    kernels = {}
    for name, usage in _parts(r"^\s*Function (\S+):$", dump("-res-usage")):
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        if found is None or name not in code:
            raise RuntimeError(f"cuobjdump: expected resource usage and code of {name}, got {usage!r}")
        registers, stack, shared, local = map(int, found.groups())
        instructions = code[name]
        kernels[name] = MachineCode(
            registers,
            stack + local,
            shared,
            len(re.findall(r"\b(?:LDL|STL)\b", instructions)),
            widths("LDG", instructions),
            widths("STG", instructions),
            len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?!NOP)", instructions)),
            len(re.findall(r"\bMUFU\.EX2\b", instructions)),
            threads.get(name, 0),
        )
    if not kernels:
        raise RuntimeError(f"cuobjdump: found no kernel in {path.name}")
    return kernels


def _parts(header: str, text: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text up to the next header) for each line that matches ``header``. Its group is the name."""
    pieces = re.split(header, text, flags=re.MULTILINE)
    yield from zip(pieces[1::2], pieces[2::2], strict=True)


def widths(instruction: str, sass: str) -> dict[int, int]:
    """Count such instructions by width, in bytes per thread. Without a width in the name it is 4 bytes, a register."""
    counts: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", sass):
        bits = [
            int(word.lstrip("US")) for word in modifiers.split(".") if re.fullmatch(r"[US]?(8|16)|64|128|256", word)
        ]
        counts[bits[0] // 8 if bits else 4] += 1
    return dict(sorted(counts.items()))
