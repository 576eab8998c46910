"""Test rows for floating point: arithmetic, extremes, approximations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ptx_numbers import (
    CANONICAL,
    Near,
    Number,
    as_float,
    from_float,
    is_nan,
    negative,
    pack,
    product,
    quotient,
    root,
    total,
    unpack,
    width,
)
from ptx_programs import Row

Definition = Callable[..., Any]
ONE = Number(0, 1)


def halves(definition: Definition, kind: str) -> Definition:
    """Apply a definition to both halves of packed operands."""
    bits = width(kind)
    mask = (1 << bits) - 1

    def both(*values: int) -> int:
        low = definition(*(v & mask for v in values))
        return low | definition(*(v >> bits for v in values)) << bits

    return both


def arithmetic(op: str, kind: str, mode: str = "rn", ftz: bool = False, sat: bool = False) -> Definition:
    def definition(*values: int) -> int | Near:
        x = [unpack(v, kind, ftz) for v in values]
        if op in ("div", "rcp"):
            return quotient(x[0] if op == "div" else ONE, x[-1], kind, mode, ftz)
        if op == "sqrt":
            return root(x[0], kind, mode, ftz)
        if op == "mul":
            exact = product(x[0], x[1])
        elif op == "fma":
            exact = total(product(x[0], x[1]), x[2], mode)
        else:
            exact = total(x[0], negative(x[1]) if op == "sub" else x[1], mode)
        if sat and (exact.kind == "nan" or (exact.sign and exact.mantissa)):
            exact = Number(0)
        result = pack(exact, kind, mode, ftz)
        if not sat:
            return result
        return min(result, pack(ONE, kind)) if 0 < result < 1 << (width(kind) - 1) else Near(0, 0.0)  # of either sign

    return definition


def extreme(op: str, kind: str, nan: bool = False, ftz: bool = False) -> Definition:
    """min and max: if one operand is NaN, the other; -0 is less than +0."""

    def definition(*values: int) -> int:
        values = tuple(pack(x, kind) if (x := unpack(v, kind, ftz)).kind != "nan" else CANONICAL[kind] for v in values)
        numbers = [v for v in values if not is_nan(v, kind)]
        if not numbers or (nan and len(numbers) < len(values)):
            return CANONICAL[kind]
        key = lambda v: (as_float(v, kind), not v >> (width(kind) - 1))  # noqa: E731
        return min(numbers, key=key) if op == "min" else max(numbers, key=key)

    return definition


def mixed(op: str, kind: str) -> Definition:
    """add, sub and fma of narrow operands and an f32."""

    def definition(*values: int) -> int:
        x = [unpack(v, kind) for v in values[:-1]]
        c = unpack(values[-1], "f32")
        first = product(x[0], x[1]) if op == "fma" else x[0]
        return pack(total(first, negative(c) if op == "sub" else c), "f32")

    return definition


def approximate(function: Callable[[float], float], bound: float, kind: str = "f32", ftz: bool = False) -> Definition:
    """A function on Python floats, within a number of units of the last place."""

    def definition(a: int) -> Near:
        value = function(as_float(pack(unpack(a, kind, ftz), kind), kind))
        # A result that is subnormal or close to it may be flushed.
        return Near(from_float(value, kind, ftz=ftz), bound, 2.0**-126 if ftz and abs(value) <= 2.0**-126 else 0.0)

    return definition


def exp2(x: float) -> float:
    if math.isnan(x):
        return x
    return math.inf if x > 1100 else 0.0 if x < -1100 else 2.0**x if x < 1023 else math.inf


def log2(x: float) -> float:
    return -math.inf if x == 0 else math.nan if x < 0 or math.isnan(x) else math.log2(x) if x < math.inf else x


def reciprocal(x: float) -> float:
    return math.copysign(math.inf, x) if x == 0 else 1 / x


def square_root(x: float) -> float:
    return x if x == 0 or math.isnan(x) else math.nan if x < 0 else math.sqrt(x)


def reciprocal_root(x: float) -> float:
    return math.copysign(math.inf, x) if x == 0 else math.nan if not x >= 0 else 1 / math.sqrt(x)


def logarithm(a: int) -> Near:
    value = log2(as_float(a, "f32"))
    near = 0.5 < as_float(a, "f32") < 2  # there the bound is absolute
    return Near(from_float(value, "f32"), 4.0, 2.0**-22 if near else 0.0)


def divided(a: int, b: int) -> Near:
    return Near(arithmetic("div", "f32")(a, b), 2.0)


def divided_approximately(a: int, b: int) -> Near | None:
    """For large divisors PTX guarantees nothing that a kernel could use."""
    return divided(a, b) if 2.0**-126 <= abs(as_float(b, "f32")) <= 2.0**126 else None


def upper_half(function: Callable[[float], float]) -> Definition:
    """f64 approximations return the upper word: 20 bits of the result. They flush subnormals."""

    def definition(a: int) -> Near:
        value = function(as_float(pack(unpack(a, "f64", True), "f64"), "f64"))
        return Near(from_float(value, "f64", ftz=True), 2.0**33, 2.0**-1021 if abs(value) < 2.0**-1021 else 0.0)

    return definition


def sign(op: str, kind: str) -> Definition:
    top = 1 << (width(kind) - 1)
    return {"neg": lambda a: a ^ top, "abs": lambda a: a & ~top}[op]


def copied(a: int, b: int) -> int:
    return (b & 0x7FFFFFFF) | (a & 0x80000000)


def rows() -> list[Row]:
    out = []
    for op, count in (("add", 2), ("sub", 2), ("mul", 2), ("fma", 3)):
        suffix = "" if op != "fma" else ".rn"
        for kind in ("f32", "f64"):
            ins = " ".join([kind] * count)
            out.append(Row(f"{op}{suffix}.{kind}", kind, ins, arithmetic(op, kind)))
            if not suffix:
                out.append(Row(f"{op}.rn.{kind}", kind, ins, arithmetic(op, kind)))
            out += [Row(f"{op}.{m}.{kind}", kind, ins, arithmetic(op, kind, m)) for m in ("rz", "rm", "rp")]
        ins = " ".join(["f32"] * count)
        out.append(Row(f"{op}{suffix}.ftz.f32", "f32", ins, arithmetic(op, "f32", ftz=True)))
        out.append(Row(f"{op}{suffix}.sat.f32", "f32", ins, arithmetic(op, "f32", sat=True)))
        pairs = " ".join(["f32x2"] * count)
        out.append(Row(f"{op}.rn.f32x2", "f32x2", pairs, halves(arithmetic(op, "f32"), "f32")))
        if not suffix:
            out.append(Row(f"{op}.f32x2", "f32x2", pairs, halves(arithmetic(op, "f32"), "f32")))
        out.append(Row(f"{op}.rn.ftz.f32x2", "f32x2", pairs, halves(arithmetic(op, "f32", ftz=True), "f32")))
        for kind in ("f16", "bf16"):
            one, two = " ".join([kind] * count), " ".join([f"{kind}x2"] * count)
            out.append(Row(f"{op}.rn.{kind}", kind, one, arithmetic(op, kind)))
            out.append(Row(f"{op}.rn.{kind}x2", f"{kind}x2", two, halves(arithmetic(op, kind), kind)))
            if op != "mul":
                out.append(Row(f"{op}.rn.f32.{kind}", "f32", f"{' '.join([kind] * (count - 1))} f32", mixed(op, kind)))
    out.append(Row("mad.rn.f32", "f32", "f32 f32 f32", arithmetic("fma", "f32")))
    for mode in ("rn", "rz", "rm", "rp"):
        for kind in ("f32", "f64"):
            out.append(Row(f"div.{mode}.{kind}", kind, f"{kind} {kind}", arithmetic("div", kind, mode)))
            out.append(Row(f"rcp.{mode}.{kind}", kind, kind, arithmetic("rcp", kind, mode)))
            out.append(Row(f"sqrt.{mode}.{kind}", kind, kind, arithmetic("sqrt", kind, mode)))
    out.append(Row("div.rn.ftz.f32", "f32", "f32 f32", arithmetic("div", "f32", ftz=True)))
    for op in ("min", "max"):
        for kind in ("f32", "f64", "f16", "bf16"):
            out.append(Row(f"{op}.{kind}", kind, f"{kind} {kind}", extreme(op, kind), exact=kind != "f64"))
            if kind != "f64":
                out.append(Row(f"{op}.NaN.{kind}", kind, f"{kind} {kind}", extreme(op, kind, True), exact=True))
            if kind[-2:] == "16":
                two = f"{kind}x2 {kind}x2"
                out.append(Row(f"{op}.{kind}x2", f"{kind}x2", two, halves(extreme(op, kind), kind)))
        out.append(Row(f"{op}.ftz.f32", "f32", "f32 f32", extreme(op, "f32", ftz=True), exact=True))
        out.append(Row(f"{op}.f32", "f32", "f32 f32 f32", extreme(op, "f32"), exact=True))
        out.append(Row(f"{op}.NaN.f32", "f32", "f32 f32 f32", extreme(op, "f32", True), exact=True))
    for op in ("neg", "abs"):
        out += [Row(f"{op}.{kind}", kind, kind, sign(op, kind)) for kind in ("f32", "f64", "f16", "bf16")]
        out += [Row(f"{op}.{k}x2", f"{k}x2", f"{k}x2", halves(sign(op, k), k)) for k in ("f16", "bf16")]
    out.append(Row("copysign.f32", "f32", "f32 f32", copied))
    out.append(Row("ex2.approx.f32", "f32", "f32:exponent", approximate(exp2, 2.0), label="ex2 of moderate"))
    out.append(Row("ex2.approx.f32", "f32", "f32", approximate(exp2, 2.0)))
    out.append(Row("ex2.approx.ftz.f32", "f32", "f32", approximate(exp2, 2.0, ftz=True)))
    out.append(Row("lg2.approx.f32", "f32", "f32", logarithm))
    out.append(Row("rcp.approx.f32", "f32", "f32", approximate(reciprocal, 1.0)))
    out.append(Row("rcp.approx.ftz.f32", "f32", "f32", approximate(reciprocal, 1.0, ftz=True)))
    out.append(Row("sqrt.approx.f32", "f32", "f32", approximate(square_root, 2.0)))
    out.append(Row("sqrt.approx.ftz.f32", "f32", "f32", approximate(square_root, 2.0, ftz=True)))
    out.append(Row("rsqrt.approx.f32", "f32", "f32", approximate(reciprocal_root, 2.0)))
    out.append(Row("rsqrt.approx.ftz.f32", "f32", "f32", approximate(reciprocal_root, 2.0, ftz=True)))
    out.append(Row("rcp.approx.ftz.f64", "f64", "f64", upper_half(reciprocal)))
    out.append(Row("rsqrt.approx.ftz.f64", "f64", "f64", upper_half(reciprocal_root)))
    out.append(Row("div.full.f32", "f32", "f32 f32", divided))
    out.append(Row("div.approx.f32", "f32", "f32 f32", divided_approximately))
    return out
