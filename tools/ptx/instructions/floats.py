"""Arithmetic of float32 and float64, and of sm_100's pairs of float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx.instructions.common import ROUNDINGS, Compiler, Run, known
from tools.ptx.numerics import directed, flush, fma32, fma64, from_bf16, odd_sum
from tools.ptx.parse import Instruction
from tools.ptx.state import Source, State
from tools.ptx.types import NUMPY, Array, Unsupported

Operation = Callable[..., Array]


def _fma(kind: str) -> Operation:
    return fma64 if kind == "f64" else fma32


def _plain(i: Instruction, kind: str) -> Operation:
    """Operation rounded to nearest."""
    table: dict[str, Operation] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": _fma(kind), "mad": _fma(kind),
        "sqrt": np.sqrt, "rcp": lambda a: NUMPY[kind](1) / a,
    }  # fmt: skip
    return table[i.opcode]


def _rounded(i: Instruction, mode: str) -> Operation:
    """float32 operation with directed rounding, from a float64 result that is exact or rounded to odd."""

    def wide(function: Operation) -> Operation:
        return lambda *values: directed(function(*(value.astype(np.float64) for value in values)), mode)

    def total(a: Array, b: Array) -> Array:
        """The sum; an exact zero from cancellation is -0 when rounding down."""
        result = odd_sum(a, b)
        return np.where((result == 0) & (np.signbit(a) | np.signbit(b)), -0.0, result) if mode == "rm" else result

    exact: dict[str, Operation] = {
        "add": total, "sub": lambda a, b: total(a, -b), "mul": np.multiply,
        "fma": lambda a, b, c: total(a * b, c), "mad": lambda a, b, c: total(a * b, c),
    }  # fmt: skip
    return wide(exact[i.opcode])


def _arithmetic(state: State, i: Instruction) -> Run:
    kind = i.types[-1]
    if kind == "f32x2":
        return _pairs(state, i)
    if len(i.types) > 1:
        return _mixed(state, i)
    known(i, *ROUNDINGS, "ftz", "sat", "approx", "full")
    mode = next((word for word in i.modifiers if word in ROUNDINGS), "rn")
    if "approx" in i.modifiers or "full" in i.modifiers:
        function = _approximate(state, i, kind)
    elif mode == "rn":
        function = _plain(i, kind)
    elif kind == "f32":
        function = _rounded(i, mode)
    else:
        raise Unsupported(f".{mode} of {kind}")
    sources: list[Source] = [state.source(operand, kind) for operand in i.operands[1:]]
    if state.options.fuse and i.opcode in ("add", "sub"):
        sources, function = _contracted(state, i, sources, function)
    return _finish(state, i, kind, sources, function)


def _finish(state: State, i: Instruction, kind: str, sources: list[Source], function: Operation) -> Run:
    """Apply .ftz (flush subnormal inputs and results) and .sat (clamp results to [0, 1])."""
    put = state.target(i.operands[0], kind)
    ftz, saturated = "ftz" in i.modifiers, "sat" in i.modifiers
    if not ftz and not saturated:
        return lambda mask: put(function(*[source() for source in sources]), mask)

    def run(mask: Array | None) -> None:
        values = [source() for source in sources]
        result = function(*(map(flush, values) if ftz else values))
        if saturated:
            result = np.where(np.isnan(result), result.dtype.type(0), np.clip(result, 0, 1))
        put(flush(result) if ftz else result, mask)

    return run


def _contracted(
    state: State, i: Instruction, sources: list[Source], function: Operation
) -> tuple[list[Source], Operation]:
    """Contract the sum of a product to a fused multiply-add if neither has an explicit rounding."""
    kind = i.types[-1]
    if any(word in ROUNDINGS or word == "sat" for word in i.modifiers):
        return sources, function
    negative = i.opcode == "sub"
    for k, operand in enumerate(i.operands[1:]):
        product = state.products.get(operand)
        if product is None or product[0] != ".".join(i.modifiers):
            continue
        state.counts["contracted"] += 1
        a, b = (state.source(each, kind) for each in product[1:])
        return [a, b, sources[1 - k]], _fused(kind, negative and k == 1, negative and k == 0)
    return sources, function


def _fused(kind: str, minus_product: bool, minus_sum: bool) -> Operation:
    fused = _fma(kind)
    return lambda a, b, c: fused(-a if minus_product else a, b, -c if minus_sum else c)


def remember_product(state: State, i: Instruction) -> None:
    """Update the registers that hold a product to contract, after each instruction of a straight run."""
    written = set(i.operands[:1])
    state.products = {
        register: product
        for register, product in state.products.items()
        if register not in written and not written & set(product)
    }
    rounded = any(word in ROUNDINGS or word == "sat" for word in i.modifiers)
    open_product = i.opcode == "mul" and i.guard is None and not rounded and i.types in (["f32"], ["f64"])
    if open_product and i.operands[0] not in i.operands[1:]:
        state.products[i.operands[0]] = (".".join(i.modifiers), *i.operands[1:])


def _pairs(state: State, i: Instruction) -> Run:
    known(i, "rn", "ftz")
    function, ftz = _plain(i, "f32"), "ftz" in i.modifiers
    sources = [state.source(operand, "b64") for operand in i.operands[1:]]
    put = state.target(i.operands[0], "b64")

    def run(mask: Array | None) -> None:
        words = [np.ascontiguousarray(source()).view(np.float32) for source in sources]
        result = function(*(map(flush, words) if ftz else words))
        put(np.ascontiguousarray(flush(result) if ftz else result).view(np.uint64), mask)

    return run


def _mixed(state: State, i: Instruction) -> Run:
    """add, sub and fma with factors, or a first term, of 16 bits."""
    known(i, "rn", types=2)
    result, narrow = i.types
    if result != "f32" or narrow not in ("f16", "bf16") or i.opcode not in ("add", "sub", "fma"):
        raise Unsupported("mixed types")
    widen = from_bf16 if narrow == "bf16" else (lambda values: values.astype(np.float32))
    *first, last = i.operands[1:]
    sources = [state.source(operand, narrow) for operand in first]
    c, put = state.source(last, "f32"), state.target(i.operands[0], "f32")
    function = _plain(i, "f32")
    return lambda mask: put(function(*[widen(source()) for source in sources], c()), mask)


def _approximate(state: State, i: Instruction, kind: str) -> Operation:
    """Approximate operation, with the errors that the PTX manual documents."""
    relative, wide = state.approximation.relative, np.float64
    if kind == "f64":  # rcp and rsqrt.approx.ftz.f64 compute only the upper word
        upper = np.uint64(0xFFFFFFFF00000000)
        upper_of: dict[str, Operation] = {"rcp": lambda a: 1 / a, "rsqrt": lambda a: 1 / np.sqrt(a)}
        function = upper_of[i.opcode]
        return lambda a: (function(a).view(np.uint64) & upper).view(np.float64)
    table: dict[str, Operation] = {
        "ex2": lambda a: relative(np.exp2(a.astype(wide)), 2.0**-22),
        "lg2": lambda a: state.approximation.log2(a.astype(wide)),
        "rcp": lambda a: relative(1 / a.astype(wide), 2.0**-23),
        "sqrt": lambda a: relative(np.sqrt(a.astype(wide)), 2.0**-23),
        "rsqrt": lambda a: relative(1 / np.sqrt(a.astype(wide)), 2.0**-22.9),
        "div": lambda a, b: relative(a.astype(wide) / b, 2.0**-22),
    }
    if i.opcode == "div" and "approx" in i.modifiers:
        return lambda a, b: _approximate_quotient(a, b, relative)
    return table[i.opcode]


def _approximate_quotient(a: Array, b: Array, relative: Operation) -> Array:
    """div.approx multiplies by the reciprocal: the result is 0 if that is subnormal."""
    quotient = relative(a.astype(np.float64) / b, 2.0**-22)
    large = np.isfinite(b) & (np.abs(b) > np.float32(2.0**126))
    zero = np.where(np.isinf(a), np.float32(np.nan), np.copysign(np.float32(0), quotient))
    return np.where(large, zero, quotient)


def _sign(state: State, i: Instruction) -> Run:
    known(i, "ftz")
    kind = i.types[-1]
    function = np.negative if i.opcode == "neg" else np.abs
    return _finish(state, i, kind, [state.source(i.operands[1], kind)], function)


def _extreme(state: State, i: Instruction) -> Run:
    """min and max: a number wins over NaN, except with .NaN; -0 is below 0."""
    known(i, "ftz", "NaN")
    kind = i.types[-1]
    sources = [state.source(operand, kind) for operand in i.operands[1:]]
    return _finish(state, i, kind, sources, lambda *values: extreme(i.opcode, values, "NaN" in i.modifiers))


def extreme(opcode: str, values: tuple[Array, ...], nan: bool) -> Array:
    least = opcode == "min"
    function = (np.minimum if nan else np.fmin) if least else (np.maximum if nan else np.fmax)
    result, *others = values
    for other in others:
        zeros = (result == 0) & (other == 0)
        negative = np.signbit(result) | np.signbit(other) if least else np.signbit(result) & np.signbit(other)
        zero = np.where(negative, result.dtype.type(-0.0), result.dtype.type(0))
        result = np.where(zeros, zero, function(result, other))
    canonical = np.array(0x7FFFFFFF, np.uint32).view(np.float32) if result.dtype == np.float32 else np.float64(np.nan)
    return np.where(np.isnan(result), canonical, result)


def _copy_sign(state: State, i: Instruction) -> Run:
    """copysign: the second operand with the sign of the first."""
    known(i)
    kind = i.types[-1]
    return _finish(
        state, i, kind, [state.source(operand, kind) for operand in i.operands[1:]], lambda a, b: np.copysign(b, a)
    )


def _needs(word: str) -> Compiler:
    """Compiler of an instruction that exists only with a modifier, such as .approx."""

    def compiler(state: State, i: Instruction) -> Run:
        if word not in i.modifiers:
            raise Unsupported(f"{i.opcode} without .{word}")
        return _arithmetic(state, i)

    return compiler


def _test(state: State, i: Instruction) -> Run:
    words = ("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    known(i, *words)
    kind = i.types[-1]
    smallest = np.finfo(NUMPY[kind]).smallest_normal
    tests: dict[str, Operation] = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda a: ~np.isnan(a), "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= smallest),
        "subnormal": lambda a: (np.abs(a) < smallest) & (a != 0),
    }  # fmt: skip
    function = tests[next(word for word in i.modifiers if word in words)]
    a, put = state.source(i.operands[1], kind), state.target(i.operands[0], "pred")
    return lambda mask: put(function(a()), mask)


OPCODES: dict[str, Compiler] = {
    **dict.fromkeys(("add", "sub", "mul", "fma", "mad", "div", "rcp", "sqrt"), _arithmetic),
    **dict.fromkeys(("ex2", "lg2", "rsqrt"), _needs("approx")),
    "neg": _sign, "abs": _sign, "min": _extreme, "max": _extreme, "copysign": _copy_sign, "testp": _test,
}  # fmt: skip
