"""Shifts, fields and counts of bits."""

from __future__ import annotations

import numpy as np

from tools.ptx.instructions.common import Compiler, Run, known
from tools.ptx.parse import Instruction, number
from tools.ptx.state import State
from tools.ptx.types import BITS, NUMPY, UNSIGNED, Array, Unsupported


def _shift(state: State, i: Instruction) -> Run:
    """shl and shr: a shift by the width or more leaves zero, or the sign."""
    known(i)
    kind = i.types[-1]
    bits, dtype = BITS[kind], NUMPY[kind]
    a, by, put = (
        state.source(i.operands[1], kind),
        state.source(i.operands[2], "u32"),
        state.target(i.operands[0], kind),
    )

    def run(mask: Array | None) -> None:
        n = by()
        capped = np.minimum(n, bits - 1).astype(dtype)
        shifted = a() << capped if i.opcode == "shl" else a() >> capped
        put(shifted if i.opcode == "shr" and kind[0] == "s" else np.where(n >= bits, dtype(0), shifted), mask)

    return run


def _funnel_shift(state: State, i: Instruction) -> Run:
    known(i, "l", "r", "wrap", "clamp")
    a, b, c = (state.source(operand, "u32") for operand in i.operands[1:])
    put = state.target(i.operands[0], "b32")

    def run(mask: Array | None) -> None:
        n = (np.minimum(c(), 32) if "clamp" in i.modifiers else c() & np.uint32(31)).astype(np.uint64)
        both = (b().astype(np.uint64) << np.uint64(32)) | a()
        put((both >> (np.uint64(32) - n) if "l" in i.modifiers else both >> n).astype(np.uint32), mask)

    return run


def _logic3(state: State, i: Instruction) -> Run:
    known(i)
    a, b, c = (state.source(operand, "b32") for operand in i.operands[1:4])
    put, table = state.target(i.operands[0], "b32"), int(number(i.operands[4]))

    def run(mask: Array | None) -> None:
        x, y, z = a(), b(), c()
        result = np.zeros_like(x)
        for k in range(8):
            if table >> k & 1:
                result |= (x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z)
        put(result, mask)

    return run


def _permute(state: State, i: Instruction) -> Run:
    """prmt: four of the eight bytes of two words; bit 3 of a selector replicates the byte's sign instead."""
    known(i)
    a, b, c = (state.source(operand, "u32") for operand in i.operands[1:])
    put = state.target(i.operands[0], "b32")

    def run(mask: Array | None) -> None:
        both, selector = (b().astype(np.uint64) << np.uint64(32)) | a(), c()
        result = np.zeros(state.lanes, np.uint32)
        for k in range(4):
            which = (selector >> np.uint32(4 * k)) & np.uint32(15)
            byte = (both >> ((which & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            result |= np.where(which & 8, sign, byte).astype(np.uint32) << np.uint32(8 * k)
        put(result, mask)

    return run


def _low_mask(n: Array, bits: int) -> Array:
    """A word with its lowest n bits set; n may exceed the width."""
    word = UNSIGNED[bits]
    return np.where(n >= bits, ~word(0), (word(1) << np.minimum(n, bits - 1).astype(word)) - word(1))


def _extract(state: State, i: Instruction) -> Run:
    """bfe: a field, sign-extended; a field that reaches past the word takes the word's sign."""
    known(i)
    kind = i.types[-1]
    bits = BITS[kind]
    word = UNSIGNED[bits]
    a, b, c = state.source(i.operands[1], f"b{bits}"), *(state.source(operand, "u32") for operand in i.operands[2:])
    put = state.target(i.operands[0], f"b{bits}")

    def run(mask: Array | None) -> None:
        x, at, n = a(), b() & np.uint32(255), c() & np.uint32(255)
        field = np.where(at >= bits, word(0), x >> np.minimum(at, bits - 1).astype(word)) & _low_mask(n, bits)
        if kind[0] == "s":
            last = np.minimum(at + n - np.uint32(1), np.uint32(bits - 1)).astype(word)
            negative = (n > 0) & ((x >> last) & word(1) == 1)
            left = np.minimum(n, np.where(at >= bits, np.uint32(0), np.uint32(bits) - np.minimum(at, np.uint32(bits))))
            field = np.where(negative, field | ~_low_mask(left, bits), field)
        put(field, mask)

    return run


def _insert(state: State, i: Instruction) -> Run:
    known(i)
    kind = i.types[-1]
    bits = BITS[kind]
    word = UNSIGNED[bits]
    a, b = (state.source(operand, kind) for operand in i.operands[1:3])
    c, d = (state.source(operand, "u32") for operand in i.operands[3:])
    put = state.target(i.operands[0], kind)

    def run(mask: Array | None) -> None:
        at, n = c() & np.uint32(255), d() & np.uint32(255)
        by = np.minimum(at, bits - 1).astype(word)
        field = np.where(at >= bits, word(0), _low_mask(n, bits) << by)
        put((b() & ~field) | ((a() << by) & field), mask)

    return run


def _length(x: Array, bits: int) -> Array:
    """Position of the highest set bit, counted from 1; 0 if there is none."""
    n = np.zeros(x.shape, np.uint32)
    word = UNSIGNED[bits]
    for half in (32, 16, 8, 4, 2, 1):
        if half < bits:
            up = x >> word(half) != 0
            n += np.where(up, np.uint32(half), np.uint32(0))
            x = np.where(up, x >> word(half), x)
    return n + (x != 0).astype(np.uint32)


def _count(state: State, i: Instruction) -> Run:
    known(i, "shiftamt")
    kind = i.types[-1]
    bits = BITS[kind]
    a, put = state.source(i.operands[1], f"b{bits}"), state.target(i.operands[0], "u32")

    def run(mask: Array | None) -> None:
        x = a()
        if i.opcode == "popc":
            return put(np.bitwise_count(x).astype(np.uint32), mask)
        if i.opcode == "clz":
            return put(np.uint32(bits) - _length(x, bits), mask)
        if kind[0] == "s":
            x = np.where(x >> UNSIGNED[bits](bits - 1) == 1, ~x, x)
        n = _length(x, bits)
        none = np.uint32(0xFFFFFFFF)
        return put(
            np.where(n == 0, none, (np.uint32(bits) - n) if "shiftamt" in i.modifiers else n - np.uint32(1)), mask
        )

    return run


def _reverse(state: State, i: Instruction) -> Run:
    known(i)
    kind = i.types[-1]
    bits = BITS[kind]
    word = UNSIGNED[bits]
    a, put = state.source(i.operands[1], kind), state.target(i.operands[0], kind)

    def run(mask: Array | None) -> None:
        x = a()
        result = np.zeros_like(x)
        for k in range(bits):
            result |= ((x >> word(k)) & word(1)) << word(bits - 1 - k)
        put(result, mask)

    return run


def _bit_mask(state: State, i: Instruction) -> Run:
    """bmsk: n set bits from a position on."""
    known(i, "wrap", "clamp")
    if "clamp" not in i.modifiers:
        raise Unsupported("bmsk.wrap")
    a, b = (state.source(operand, "u32") for operand in i.operands[1:])
    put = state.target(i.operands[0], "b32")

    def run(mask: Array | None) -> None:
        at, n = np.minimum(a(), 32).astype(np.uint64), np.minimum(b(), 32).astype(np.uint64)
        put((((np.uint64(1) << n) - np.uint64(1)) << at).astype(np.uint32), mask)

    return run


OPCODES: dict[str, Compiler] = {
    "shl": _shift, "shr": _shift, "shf": _funnel_shift, "lop3": _logic3, "prmt": _permute, "bfe": _extract,
    "bfi": _insert, "popc": _count, "clz": _count, "bfind": _count, "brev": _reverse, "bmsk": _bit_mask,
}  # fmt: skip
