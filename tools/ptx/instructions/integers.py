"""Integer arithmetic, and logic of bits and predicates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx.instructions.common import Compiler, Run, known, mapped
from tools.ptx.numerics import divide, high_product
from tools.ptx.parse import Instruction
from tools.ptx.state import State
from tools.ptx.types import BITS, NUMPY, Array, Unsupported


def _simple(function: Callable[..., Array]) -> Compiler:
    def compiler(state: State, i: Instruction) -> Run:
        known(i)
        return mapped(state, i, i.types[-1], function)

    return compiler


def _add(state: State, i: Instruction) -> Run:
    """add, add.cc, addc and addc.cc: each thread has a carry register."""
    known(i, "cc")
    kind = i.types[-1]
    carries, sets = i.opcode == "addc", "cc" in i.modifiers

    def function(a: Array, b: Array) -> Array:
        total = a + b
        out = total < a
        if carries:
            more = total + state.carry.astype(total.dtype)
            total, out = more, out | (more < total)
        if sets:
            state.carry = out
        return total

    if (carries or sets) and i.guard is not None:
        raise Unsupported("a guarded carry")
    if carries or sets:
        kind = "u" + kind[1:]
    return mapped(state, i, kind, function)


def _multiply(state: State, i: Instruction) -> Run:
    """mul and mad: the lower half of the product, the upper half, or all of it."""
    known(i, "lo", "hi", "wide")
    kind = i.types[-1]
    if "wide" in i.modifiers:
        wide = kind[0] + str(2 * BITS[kind])
        a, b = state.source(i.operands[1], kind), state.source(i.operands[2], kind)
        put, dtype = state.target(i.operands[0], wide), NUMPY[wide]
        if i.opcode == "mul":
            return lambda mask: put(a().astype(dtype) * b().astype(dtype), mask)
        c = state.source(i.operands[3], wide)
        return lambda mask: put(a().astype(dtype) * b().astype(dtype) + c(), mask)

    def product(a: Array, b: Array) -> Array:
        return high_product(a, b, kind) if "hi" in i.modifiers else a * b

    if "hi" not in i.modifiers and "lo" not in i.modifiers:
        raise Unsupported("a product without lo, hi or wide")
    if i.opcode == "mul":
        return mapped(state, i, kind, product)
    return mapped(state, i, kind, lambda a, b, c: product(a, b) + c)


def _quotient(state: State, i: Instruction) -> Run:
    known(i)
    which = 0 if i.opcode == "div" else 1
    return mapped(state, i, i.types[-1], lambda a, b: divide(a, b)[which])


OPCODES: dict[str, Compiler] = {
    "add": _add, "addc": _add, "sub": _simple(np.subtract), "mul": _multiply, "mad": _multiply, "div": _quotient,
    "rem": _quotient, "neg": _simple(lambda a: np.zeros_like(a) - a), "abs": _simple(np.abs),
    "min": _simple(np.minimum), "max": _simple(np.maximum), "and": _simple(np.bitwise_and),
    "or": _simple(np.bitwise_or), "xor": _simple(np.bitwise_xor), "not": _simple(np.invert),
    "cnot": _simple(lambda a: (a == 0).astype(a.dtype)),
}  # fmt: skip
