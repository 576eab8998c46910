"""Kinds of instructions, to count what warps issue."""

from __future__ import annotations

from collections import Counter

from tools.ptx.parse import Instruction

_SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh")
_BY_OPCODE = {
    **dict.fromkeys(("ld", "ldu", "st", "atom", "red"), "memory"),
    **dict.fromkeys(("ldmatrix", "stmatrix"), "memory"),
    **dict.fromkeys(("shfl", "vote", "match", "redux", "activemask", "elect"), "warp"),
    **dict.fromkeys(("bar", "barrier"), "barrier"),
    **dict.fromkeys(("bra", "brx", "ret", "exit", "trap"), "branch"),
    **dict.fromkeys(("setp", "set", "selp"), "compare"),
    "cvt": "convert",
    "mov": "move",
}
KINDS = ("float", "special", "integer", "compare", "convert", "move", "memory", "warp", "barrier", "branch")


def kind_of(i: Instruction) -> str:
    if i.opcode in _SPECIAL and "approx" in i.modifiers:
        return "special"
    if i.opcode in _BY_OPCODE:
        return _BY_OPCODE[i.opcode]
    kinds = i.types
    return "float" if kinds and kinds[-1] in ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2") else "integer"


def kinds_of(instructions: list[Instruction]) -> Counter[str]:
    """Instructions by kind that a warp issues in one pass through a straight run."""
    return Counter(f"{kind_of(i)} instructions" for i in instructions)
