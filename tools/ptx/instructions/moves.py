"""Moves, packing, address conversions, and hints that change no value."""

from __future__ import annotations

import numpy as np

from tools.ptx.instructions.common import Compiler, Run, known
from tools.ptx.memory import LOCAL, PARAM, SHARED
from tools.ptx.parse import Instruction
from tools.ptx.state import State
from tools.ptx.types import BITS, UNSIGNED, Array, Unsupported

_SPACES = {"global": 0, "const": 0, "shared": SHARED, "shared__cta": SHARED, "local": LOCAL, "param": PARAM}


def parts(operand: str) -> list[str]:
    """The registers of ``{%r1, %r2}``, or a single one."""
    return [part.strip() for part in operand[1:-1].split(",")] if operand.startswith("{") else [operand]


def _move(state: State, i: Instruction) -> Run:
    known(i)
    kind = i.types[-1]
    destination, source = i.operands
    if destination.startswith("{"):
        return _unpack(state, parts(destination), source, BITS[kind])
    if source.startswith("{"):
        return _pack(state, destination, parts(source), BITS[kind])
    if kind == "b128":
        raise Unsupported("a whole b128")
    bits = kind if kind == "pred" else f"b{BITS[kind]}"
    value, put = state.source(source, bits), state.target(destination, bits)
    return lambda mask: put(value(), mask)


def _unpack(state: State, names: list[str], source: str, bits: int) -> Run:
    width = bits // len(names)
    puts = [state.target(name, f"b{width}") for name in names]
    if bits == 128:
        array = state.register(source)

        def run128(mask: Array | None) -> None:
            for k, put in enumerate(puts):
                put(array[:, k].copy(), mask)

        return run128
    value, word = state.source(source, f"b{bits}"), UNSIGNED[bits]

    def run(mask: Array | None) -> None:
        values = value().copy()  # a part may overwrite its whole
        for k, put in enumerate(puts):
            put((values >> word(k * width)).astype(UNSIGNED[width]), mask)

    return run


def _pack(state: State, destination: str, names: list[str], bits: int) -> Run:
    width = bits // len(names)
    values = [state.source(name, f"b{width}") for name in names]
    if bits == 128:
        array = state.register(destination)

        def run128(mask: Array | None) -> None:
            here = slice(None) if mask is None else mask
            for k, value in enumerate(values):
                array[here, k] = value()[here]

        return run128
    put, word = state.target(destination, f"b{bits}"), UNSIGNED[bits]

    def run(mask: Array | None) -> None:
        whole = np.zeros(state.lanes, word)
        for k, value in enumerate(values):
            whole |= value().astype(word) << word(k * width)
        put(whole, mask)

    return run


def _address(state: State, i: Instruction) -> Run:
    """cvta: converts between a space's addresses and generic ones. Global addresses are generic."""
    known(i, "to", *_SPACES)
    kind = i.types[-1]
    base = np.uint64(_SPACES[next(word for word in i.modifiers if word in _SPACES)])
    if base and kind != "u64":
        raise Unsupported("addresses of 32 bits")
    value, put = state.source(i.operands[1], kind), state.target(i.operands[0], kind)
    if "to" in i.modifiers:
        return lambda mask: put(value() - base, mask)
    return lambda mask: put(value() + base, mask)


def _nothing(state: State, i: Instruction) -> Run:
    """Fences and prefetches: the interpreter reorders nothing and has no caches."""
    return lambda mask: None


def _policy(state: State, i: Instruction) -> Run:
    put = state.target(i.operands[0], "b64")
    zero = np.zeros(state.lanes, np.uint64)
    return lambda mask: put(zero, mask)


OPCODES: dict[str, Compiler] = {
    "mov": _move, "cvta": _address, "createpolicy": _policy,
    **dict.fromkeys(("membar", "fence", "prefetch", "prefetchu", "nanosleep", "griddepcontrol"), _nothing),
}  # fmt: skip
