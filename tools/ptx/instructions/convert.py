"""Conversions between formats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx.instructions.common import ROUNDINGS, Compiler, Run, known
from tools.ptx.instructions.halves import narrow, widen
from tools.ptx.numerics import directed, flush, to_bf16
from tools.ptx.parse import Instruction
from tools.ptx.state import State
from tools.ptx.types import BITS, NUMPY, SIGNED, UNSIGNED, Array, Unsupported, is_float

_TO_INTEGER: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(state: State, i: Instruction) -> Run:
    known(i, *ROUNDINGS, *_TO_INTEGER, "ftz", "sat", types=2)
    to, source_type = i.types
    mode = next((word for word in i.modifiers if word in ROUNDINGS or word in _TO_INTEGER), None)
    put = state.target(i.operands[0], to)
    if to in ("f16x2", "bf16x2"):
        return _pack(state, i, to.removesuffix("x2"), mode)
    function = _function(to, source_type, mode)
    source = state.source(i.operands[1], source_type)
    ftz, saturated = "ftz" in i.modifiers, "sat" in i.modifiers
    if saturated and not is_float(to):
        raise Unsupported("saturation of an integer")

    def run(mask: Array | None) -> None:
        values = source()
        if ftz and source_type == "f32":
            values = flush(values)
        result = function(values)
        if saturated:
            result = np.where(np.isnan(result), result.dtype.type(0), np.clip(result, 0, 1))
        put(flush(result) if ftz and to == "f32" else result, mask)

    return run


def _pack(state: State, i: Instruction, base: str, mode: str | None) -> Run:
    """Convert two float32 to a pair, the first into the upper half."""
    high, low = (state.source(operand, "f32") for operand in i.operands[1:])
    put = state.target(i.operands[0], f"{base}x2")

    def half(values: Array) -> Array:
        if base == "f16" and mode != "rn":
            raise Unsupported(f"f16x2 rounded {mode}")
        return (to_bf16(values, mode) if base == "bf16" else narrow(values, base)).astype(np.uint32)

    return lambda mask: put(half(high()) << np.uint32(16) | half(low()), mask)


def _function(to: str, source: str, mode: str | None) -> Callable[[Array], Array]:
    if is_float(source):
        if not is_float(to):
            return lambda values: _to_integer(_widened(values, source), to, mode)
        if mode in _TO_INTEGER:
            rounded = _TO_INTEGER[mode]
            if to != source or to == "bf16":
                raise Unsupported(f".{mode} from {source} to {to}")
            return lambda values: rounded(values)
        return lambda values: _to_float(_widened(values, source), to, mode)
    if is_float(to):
        return lambda values: _to_float(values, to, mode)
    # Extended by the source's sign, or truncated.
    word = SIGNED[64] if source[0] == "s" else UNSIGNED[64]
    return lambda values: values.astype(word).view(np.uint64).astype(UNSIGNED[BITS[to]]).view(NUMPY[to])


def _widened(values: Array, kind: str) -> Array:
    return widen(values.view(np.uint16), kind) if kind in ("f16", "bf16") else values


def _to_float(values: Array, to: str, mode: str | None) -> Array:
    if to == "bf16":
        if values.dtype != np.float32:
            raise Unsupported(f"bf16 from {values.dtype}")
        return to_bf16(values, mode)
    if mode in ("rz", "rm", "rp"):
        if to != "f32" or (values.dtype.kind in "iu" and values.itemsize > 4):
            raise Unsupported(f"{to} rounded {mode}")
        return directed(values.astype(np.float64), mode)
    return values.astype(NUMPY[to])


def _to_integer(values: Array, to: str, mode: str | None) -> Array:
    """Convert with saturation. NaN becomes 0 if neither type has 64 bits, else the highest bit alone."""
    wide = values.dtype == np.float64 or BITS[to] == 64
    if mode not in _TO_INTEGER:
        raise Unsupported("an integer without its rounding")
    rounded = _TO_INTEGER[mode](values.astype(np.float64))
    info = np.iinfo(NUMPY[to])
    nan, low, high = np.isnan(rounded), rounded <= info.min, rounded >= float(info.max)
    inside = np.where(nan | low | high, 0, rounded).astype(NUMPY[to])
    cut = np.where(low, NUMPY[to](info.min), np.where(high, NUMPY[to](info.max), inside))
    return np.where(nan, NUMPY[to]((info.min or 1 << BITS[to] - 1) if wide else 0), cut)


OPCODES: dict[str, Compiler] = {"cvt": _convert}
