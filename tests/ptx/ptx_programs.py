"""Small PTX kernels around single instructions, and how to run them on the interpreter."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ptx_numbers import Near, agrees, columns, width

from tools.ptx import Memory, Module, Options, launch

HEAD = ".version 8.8\n.target sm_100a\n.address_size 64\n"
SETUP = """
    .reg .pred %p<32>;
    .reg .b16 %h<32>;
    .reg .b32 %r<64>, %lane, %thread;
    .reg .b64 %d<64>, %slot;
    mov.u32 %thread, %tid.x;
    mov.u32 %lane, %laneid;
"""


@dataclass
class Row:
    """An instruction and its plain definition.

    ``form`` is its text, with {d}, {e} for the operands that it writes and {a}, {b}, {c}, {f} for those that it reads;
    by default the name and the operands in order. The definition takes the operands' bit patterns as integers and
    returns the result's bit pattern (a list for two results), or a :class:`Near`.
    """

    name: str
    out: str
    inputs: str
    definition: Callable[..., Any]
    form: str = ""
    tail: str = ""  # what follows the operands: an immediate
    exact: bool = False  # a NaN must be the definition's own
    label: str = ""

    def text(self) -> str:
        outs, ins = self.out.split(), self.inputs.split()
        names = [*"de"[: len(outs)], *"abcf"[: len(ins)]]
        return self.form or f"{self.name} " + ", ".join(f"{{{n}}}" for n in names) + self.tail + ";"

    def __str__(self) -> str:
        return self.label or self.name


def register_type(kind: str, typed: bool) -> str:
    name = kind.split(":")[0]
    if name == "pred":
        return "pred"
    if typed and name in ("f32", "f64", "s16", "u16", "s32", "u32", "s64", "u64"):
        return name
    return f"b{max(width(name), 16)}"


def kernel(row: Row, typed: bool) -> str:
    """A kernel in which each thread applies the instruction to its own operands."""
    outs, ins = row.out.split(), row.inputs.split()
    names = dict(zip("de"[: len(outs)], outs, strict=True)) | dict(zip("abcf"[: len(ins)], ins, strict=True))
    before, after = [], []
    registers = {n: f"%{n}v" for n in names}
    declared = [f".reg .{register_type(k, typed)} %{n}v;" for n, k in names.items()]
    for number, (name, kind) in enumerate(names.items()):
        size = width(kind) // 8
        where = [
            f"ld.param.u64 %base{number}, [p{number}];",
            f"mad.wide.u32 %base{number}, %index, {size}, %base{number};",
        ]
        declared.append(f".reg .b64 %base{number};")
        raw = f"b{width(kind)}"
        if name in "de":
            after += where
            if kind == "pred":
                after.append(f"selp.b16 %flag, 1, 0, %{name}v;")
            after.append(f"st.global.{raw} [%base{number}], {'%flag' if kind == 'pred' else registers[name]};")
        else:
            before += where
            before.append(f"ld.global.{raw} {'%flag' if kind == 'pred' else registers[name]}, [%base{number}];")
            if kind == "pred":
                before.append(f"setp.ne.b16 %{name}v, %flag, 0;")
    lines = [
        ".reg .b32 %index, %block;",
        ".reg .b16 %flag;",
        *declared,
        "mov.u32 %index, %tid.x;",
        "mov.u32 %block, %ctaid.x;",
        "mad.lo.u32 %index, %block, 256, %index;",
        *before,
        row.text().format(**registers),
        *after,
        "ret;",
    ]
    parameters = ", ".join(f".param .u64 p{k}" for k in range(len(names)))
    return HEAD + f".visible .entry k({parameters})\n{{\n    " + "\n    ".join(lines) + "\n}\n"


def to_bytes(values: Sequence[int], size: int) -> np.ndarray:
    return np.frombuffer(b"".join(v.to_bytes(size, "little") for v in values), np.uint8).copy()


def from_bytes(data: np.ndarray, size: int) -> list[int]:
    raw = data.tobytes()
    return [int.from_bytes(raw[k : k + size], "little") for k in range(0, len(raw), size)]


def pack_parameters(function: Any, values: Sequence[Any]) -> bytes:
    """Put integers, or raw bytes, at the offsets of a kernel's parameters."""
    data = bytearray(function.param_bytes)
    for (_, offset, size), value in zip(function.params, values, strict=True):
        data[offset : offset + size] = value if isinstance(value, bytes) else value.to_bytes(size, "little")
    return bytes(data)


def apply(row: Row, inputs: list[list[int]], typed: bool, options: Options | None = None) -> list[list[int]]:
    """Run the instruction on the operands. Return a list for each output."""
    module = Module(kernel(row, typed))
    count = 512
    memory, arrays = Memory(), []
    kinds = row.out.split() + row.inputs.split()
    outs = len(row.out.split())
    for number, kind in enumerate(kinds):
        size = width(kind) // 8
        arrays.append(np.zeros(count * size, np.uint8) if number < outs else to_bytes(inputs[number - outs], size))
    addresses = [memory.add(a) for a in arrays]
    data = pack_parameters(module.functions["k"], addresses)
    result = launch(module, "k", memory, (count // 256, 1, 1), (256, 1, 1), 0, data, options or Options())
    assert not result.problems, result.problems
    return [from_bytes(a, width(k) // 8) for a, k in zip(arrays[:outs], kinds, strict=False)]


def check(row: Row, typed: bool, options: Options | None = None) -> None:
    inputs = columns(tuple(row.inputs.split()), 512, seed=len(row.name) % 3)
    got = apply(row, inputs, typed, options)
    wrong = []
    for lane, operands in enumerate(zip(*inputs, strict=True)):
        want = row.definition(*operands)
        wants = want if isinstance(want, list) else [want]
        for kind, values, one in zip(row.out.split(), got, wants, strict=True):
            if not agrees(values[lane], one, kind.split(":")[0], row.exact):
                shown = hex(one.bits if isinstance(one, Near) else one)
                wrong.append(f"{[hex(v) for v in operands]}: {hex(values[lane])}, not {shown}")
    assert not wrong, f"{row.text()} {len(wrong)} of 512 wrong: " + "; ".join(wrong[:4])


@dataclass
class Program:
    """A kernel with parameters p0, p1, ... (addresses of its arrays), loaded into %d0, %d1, ..."""

    body: str
    arrays: int = 1
    declarations: str = ""  # of the module, such as shared memory
    directives: str = ""
    text: str = field(init=False)

    def __post_init__(self) -> None:
        parameters = ", ".join(f".param .u64 p{k}" for k in range(self.arrays))
        loads = "".join(f"    ld.param.u64 %d{k}, [p{k}];\n" for k in range(self.arrays))
        self.text = (
            f"{HEAD}{self.declarations}\n.visible .entry k({parameters}) {self.directives}\n"
            f"{{{SETUP}{loads}    {self.body}\n    ret;\n}}\n"
        )

    def run(
        self,
        *arrays: np.ndarray,
        grid: int = 1,
        threads: int = 32,
        shared: int = 0,
        options: Options | None = None,
        moved: Sequence[int] = (),
    ) -> Any:
        """Run on the arrays' bytes; ``moved`` is added to their addresses."""
        module = Module(self.text)
        memory = Memory()
        addresses = [memory.add(a.view(np.uint8).reshape(-1)) for a in arrays]
        addresses = [a + b for a, b in zip(addresses, [*moved, *[0] * len(arrays)], strict=False)]
        data = struct.pack(f"<{len(addresses)}Q", *addresses)
        return launch(module, "k", memory, (grid, 1, 1), (threads, 1, 1), shared, data, options or Options())
