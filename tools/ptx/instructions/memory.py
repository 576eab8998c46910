"""Loads, stores and atomics."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tools.ptx.instructions.common import Compiler, Run
from tools.ptx.instructions.moves import parts
from tools.ptx.memory import gather
from tools.ptx.parse import Instruction
from tools.ptx.state import State
from tools.ptx.types import BITS, NUMPY, UNSIGNED, Array, Unsupported

_SPACES = ("global", "shared", "local", "param", "const")
#: Cache hints and the like, which change no value.
_HINTS = re.compile(
    r"(nc|ca|cg|cs|cv|lu|wb|wt|volatile|relaxed|weak|acquire|release|acq_rel|cta|gpu|sys|v2|v4|v8|"
    r"(L1|L2)__.*|shared__cta|unaligned)$"
)


def _space(i: Instruction) -> str | None:
    for word in i.modifiers:
        if word.partition("__")[0] in _SPACES:
            return word.partition("__")[0]
    return None


def _known(i: Instruction, *words: str) -> None:
    """Raise Unsupported for modifiers that are no type, space, hint or one of the words."""
    for word in i.modifiers:
        if word not in (*words, *i.types, *_SPACES) and not _HINTS.match(word):
            raise Unsupported(f"modifier .{word}")


def _width(i: Instruction, operand: str) -> list[str]:
    """The registers of a vector; their number must match its modifier."""
    _known(i)
    names = parts(operand)
    width = next((int(word[1]) for word in i.modifiers if re.fullmatch(r"v[248]", word)), 1)
    if width != len(names):
        raise Unsupported(f"{len(names)} registers for a vector of {width}")
    return names


def _lanes(state: State, mask: Array | None) -> Array:
    return state.all_lanes if mask is None else np.nonzero(mask)[0]


def _load(state: State, i: Instruction) -> Run:
    names, kind, space = _width(i, i.operands[0]), i.types[-1], _space(i)
    address = state.address(i.operands[1])
    if kind == "b128":
        return _load_wide(state, i, names)
    size = BITS[kind] // 8
    puts = [state.target(name, kind) for name in names]

    def run(mask: Array | None) -> None:
        lanes = _lanes(state, mask)
        memory, places = state.access(space, address(), lanes, size * len(names), i, "load")
        for k, put in enumerate(puts):
            values = np.zeros(state.lanes, UNSIGNED[8 * size])
            values[lanes] = gather(memory, places + size * k, size)
            put(values.view(NUMPY[kind]), mask)

    return run


def _load_wide(state: State, i: Instruction, names: list[str]) -> Run:
    registers, address, space = [state.register(name) for name in names], state.address(i.operands[1]), _space(i)

    def run(mask: Array | None) -> None:
        lanes = _lanes(state, mask)
        memory, places = state.access(space, address(), lanes, 16 * len(names), i, "load")
        for k, register in enumerate(registers):
            for half in (0, 1):
                register[lanes, half] = gather(memory, places + 16 * k + 8 * half, 8)

    return run


def _store(state: State, i: Instruction) -> Run:
    names, kind, space = _width(i, i.operands[1]), i.types[-1], _space(i)
    address = state.address(i.operands[0])
    if kind == "b128":
        return _store_wide(state, i, names)
    size = BITS[kind] // 8
    sources = [state.source(name, f"b{8 * size}") for name in names]

    def run(mask: Array | None) -> None:
        lanes = _lanes(state, mask)
        memory, places = state.access(space, address(), lanes, size * len(names), i, "store")
        for k, source in enumerate(sources):
            state.store(memory, places + size * k, source()[lanes], lanes, i)

    return run


def _store_wide(state: State, i: Instruction, names: list[str]) -> Run:
    registers, address, space = [state.register(name) for name in names], state.address(i.operands[0]), _space(i)

    def run(mask: Array | None) -> None:
        lanes = _lanes(state, mask)
        memory, places = state.access(space, address(), lanes, 16 * len(names), i, "store")
        for k, register in enumerate(registers):
            for half in (0, 1):
                state.store(memory, places + 16 * k + 8 * half, register[lanes, half], lanes, i)

    return run


def _atomic(state: State, i: Instruction) -> Run:
    """atom and red, one thread after the other. Two atomics are not a race."""
    operation = next(word for word in i.modifiers if word in _ATOMICS)
    _known(i, operation)
    kind, gives = i.types[-1], i.opcode == "atom"
    where, *values = i.operands[1:] if gives else i.operands
    address, sources = state.address(where), [state.source(value, kind) for value in values]
    put = state.target(i.operands[0], kind) if gives else None
    size, space = BITS[kind] // 8, _space(i)

    def run(mask: Array | None) -> None:
        lanes = _lanes(state, mask)
        at = address()
        memory, places = state.access(space, at, lanes, size, i, "update")
        cells, old = memory.view(NUMPY[kind]), np.zeros(state.lanes, NUMPY[kind])
        arrays = [source() for source in sources]
        for lane, cell in zip(lanes, places // size, strict=True):
            old[lane] = cells[cell]
            cells[cell] = _ATOMICS[operation](cells[cell], *(array[lane] for array in arrays))
        if put:
            put(old, mask)

    return run


_ATOMICS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "min": min, "max": max, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "exch": lambda old, value: value,
    "cas": lambda old, expected, value: value if old == expected else old,
    "inc": lambda old, limit: 0 if old >= limit else old + 1,
    "dec": lambda old, limit: limit if old == 0 or old > limit else old - 1,
}  # fmt: skip


OPCODES: dict[str, Compiler] = {"ld": _load, "ldu": _load, "st": _store, "atom": _atomic, "red": _atomic}
