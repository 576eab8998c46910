"""Effects of instructions on a state: each is compiled to a function of the mask of its threads.

Instructions that wait for other threads (shuffles, votes, barriers) are in tools.ptx.warps, jumps in tools.ptx.machine.
"""

from __future__ import annotations

import numpy as np

from tools.ptx.instructions import bits, compare, convert, floats, halves, integers, memory, moves
from tools.ptx.instructions.common import Compiler, Run
from tools.ptx.parse import Instruction
from tools.ptx.state import State
from tools.ptx.types import Array, Unsupported

#: Compilers by opcode, for all types.
GENERAL: dict[str, Compiler] = {
    **memory.OPCODES, **moves.OPCODES, **convert.OPCODES, **compare.OPCODES, **bits.OPCODES,
}  # fmt: skip


def compile_instruction(state: State, i: Instruction) -> Run:
    """Compile an instruction; raise Unsupported, naming it, if it is unknown."""
    try:
        run = _compiler(i)(state, i)
    except (KeyError, IndexError, ValueError, StopIteration, NotImplementedError) as error:
        raise Unsupported(f"{i}: {error if isinstance(error, NotImplementedError) else repr(error)}") from error
    if i.guard is None:
        return run
    guard = state.source(f"!{i.guard}" if i.negated else i.guard, "pred")

    def guarded(mask: Array | None) -> None:
        here = guard() if mask is None else guard() & mask
        if np.any(here):
            run(here)

    return guarded


def _compiler(i: Instruction) -> Compiler:
    if i.opcode in GENERAL:
        return GENERAL[i.opcode]
    kind = i.types[0] if i.types else None  # the result's
    if kind in ("f32", "f64", "f32x2"):
        table = floats.OPCODES
    elif kind in ("f16", "bf16", "f16x2", "bf16x2"):
        table = halves.OPCODES
    elif kind is not None:
        table = integers.OPCODES
    else:
        table = {}
    if i.opcode not in table:
        raise Unsupported(f"unknown opcode {i.opcode!r}" + (f" of {kind}" if kind else ""))
    return table[i.opcode]
