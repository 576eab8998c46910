"""Comparisons and selections."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx.instructions.common import Compiler, Run, known
from tools.ptx.instructions.halves import widen
from tools.ptx.numerics import flush
from tools.ptx.parse import Instruction
from tools.ptx.state import Source, State
from tools.ptx.types import BITS, Array, Unsupported, is_float

_ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_JOIN: dict[str, Callable[[Array, Array], Array]] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def relation(name: str, floating: bool) -> Callable[[Array, Array], Array]:
    """A comparison; for floats with NaN an ordered one is false, one with u is true."""
    if name in _ORDERED:
        plain = _ORDERED[name]
        if not floating or name != "ne":
            return plain
        return lambda a, b: plain(a, b) & ~(np.isnan(a) | np.isnan(b))
    if not floating:
        raise Unsupported(f"comparison {name}")
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    plain = _ORDERED[name.removesuffix("u")]
    return lambda a, b: plain(a, b) | np.isnan(a) | np.isnan(b)


def _compare(state: State, i: Instruction) -> Run:
    name, *rest = i.modifiers
    join = next((word for word in rest if word in _JOIN), None)
    known(i, name, "ftz", *_JOIN, types=2 if i.opcode == "set" else 1)
    kind = i.types[-1]
    if name in _UNSIGNED and not is_float(kind):
        name, kind = _UNSIGNED[name], f"u{BITS[kind]}"
    packed = kind in ("f16x2", "bf16x2")
    test = relation(name, packed or is_float(kind))
    a, b = (_value(state, operand, kind, "ftz" in i.modifiers) for operand in i.operands[1:3])
    also = state.source(i.operands[3], "pred") if join else None
    names = i.operands[0].split("|")
    if i.opcode == "set":
        return _as_word(state, i, lambda: _joined(test(a(), b()), join, also))
    puts = [state.target(name, "pred") for name in names]

    def run(mask: Array | None) -> None:
        result = test(a(), b())
        # For pairs the second destination gets the upper halves' result, else the negated result.
        second = result[:, 1] if packed else ~result
        result = result[:, 0] if packed else result
        values = [_joined(value, join, also) for value in (result, second)]
        for put, value in zip(puts, values, strict=False):
            put(value, mask)

    return run


def _joined(result: Array, join: str | None, also: Source | None) -> Array:
    return result if join is None or also is None else _JOIN[join](result, also())


def _value(state: State, operand: str, kind: str, ftz: bool) -> Source:
    source = state.source(operand, "b32" if kind.endswith("x2") else kind)
    if kind.endswith("x2"):
        base = kind.removesuffix("x2")
        return lambda: np.stack(
            [widen((source() >> np.uint32(shift)).astype(np.uint16), base) for shift in (0, 16)], axis=1
        )
    if kind in ("f16", "bf16"):
        return lambda: widen(source().view(np.uint16), kind)
    return (lambda: flush(source())) if ftz else source


def _as_word(state: State, i: Instruction, test: Source) -> Run:
    """set: 1.0 or all ones if true, 0 if false."""
    kind = i.types[0]
    put = state.target(i.operands[0], kind)
    if kind == "f32":
        return lambda mask: put(test().astype(np.float32), mask)
    return lambda mask: put(np.where(test(), np.uint32(0xFFFFFFFF), np.uint32(0)), mask)


def _select(state: State, i: Instruction) -> Run:
    known(i)
    kind = i.types[-1]
    bits = f"b{BITS[kind]}" if kind != "pred" else kind  # a selection changes no bits
    a, b = state.source(i.operands[1], bits), state.source(i.operands[2], bits)
    test, put = state.source(i.operands[3], "pred"), state.target(i.operands[0], bits)
    return lambda mask: put(np.where(test(), a(), b()), mask)


OPCODES: dict[str, Compiler] = {"setp": _compare, "set": _compare, "selp": _select}
