"""Helpers shared by the instructions' modules."""

from __future__ import annotations

from collections.abc import Callable

from tools.ptx.parse import Instruction
from tools.ptx.state import State
from tools.ptx.types import Array, Unsupported

Run = Callable[[Array | None], None]
Compiler = Callable[[State, Instruction], Run]
ROUNDINGS = ("rn", "rz", "rm", "rp")


def known(i: Instruction, *words: str, types: int = 1) -> None:
    """Raise Unsupported for unknown modifiers, so that none is ignored: allowed are ``words`` and up to ``types``
    types."""
    if len(i.types) > types:
        raise Unsupported(f"types {', '.join(i.types)}")
    for word in i.modifiers:
        if word not in words and word not in i.types:
            raise Unsupported(f"modifier .{word}")


def mapped(
    state: State, i: Instruction, kind: str, function: Callable[..., Array], result: str | None = None, first: int = 1
) -> Run:
    """Compile an instruction that is a function of its operands, all of one type."""
    sources = [state.source(operand, kind) for operand in i.operands[first:]]
    put = state.target(i.operands[0], result or kind)
    return lambda mask: put(function(*[source() for source in sources]), mask)
