"""Arithmetic of float16 and bf16, single and in pairs: computed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx.instructions.common import Compiler, Run, known
from tools.ptx.instructions.floats import extreme
from tools.ptx.numerics import from_bf16, odd_sum, to_bf16
from tools.ptx.parse import Instruction
from tools.ptx.state import State
from tools.ptx.types import NUMPY, Array


def widen(bits: Array, base: str) -> Array:
    return from_bf16(bits) if base == "bf16" else bits.view(np.float16).astype(np.float32)


def narrow(values: Array, base: str) -> Array:
    return to_bf16(values) if base == "bf16" else values.astype(np.float16).view(np.uint16)


def _fma(a: Array, b: Array, c: Array) -> Array:
    """Fused multiply-add in float32, rounded to odd, so that the result is rounded only once.

    The float64 sum is exact or rounded to odd; this rounds it to odd again, to float32.
    """
    exact = odd_sum(a.astype(np.float64) * b, c.astype(np.float64))
    near = exact.astype(np.float32)
    off = np.isfinite(near) & (near.astype(np.float64) != exact) & (near.view(np.int32) & 1 == 0)
    step = np.where(np.abs(near.astype(np.float64)) < np.abs(exact), 1, -1)
    return np.where(off, near.view(np.int32) + step, near.view(np.int32)).astype(np.int32).view(np.float32)


_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": _fma, "neg": np.negative, "abs": np.abs,
}  # fmt: skip


def _arithmetic(state: State, i: Instruction) -> Run:
    known(i, "rn", "NaN")
    kind = i.types[-1]
    base, pair = kind.removesuffix("x2"), kind.endswith("x2")
    put, sources = state.target(i.operands[0], kind), [state.source(operand, kind) for operand in i.operands[1:]]

    def function(*bits: Array) -> Array:
        if i.opcode == "neg":  # negates NaN too
            return bits[0] ^ np.uint16(0x8000)
        if i.opcode == "abs":
            return bits[0] & np.uint16(0x7FFF)
        values = tuple(widen(each, base) for each in bits)
        if i.opcode in ("min", "max"):
            return narrow(extreme(i.opcode, values, "NaN" in i.modifiers), base)
        return narrow(_FUNCTIONS[i.opcode](*values), base)

    def run(mask: Array | None) -> None:
        words = [source() for source in sources]
        if not pair:
            return put(function(*(word.view(np.uint16) for word in words)).view(NUMPY[kind]), mask)
        low, high = (
            function(*((word >> np.uint32(shift)).astype(np.uint16) for word in words)).astype(np.uint32)
            for shift in (0, 16)
        )
        return put(low | high << np.uint32(16), mask)

    return run


OPCODES: dict[str, Compiler] = dict.fromkeys((*_FUNCTIONS, "min", "max"), _arithmetic)
