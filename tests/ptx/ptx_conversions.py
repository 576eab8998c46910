"""Test rows for conversions, moves and immediates."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from ptx_integers import of, value
from ptx_numbers import Near, Number, pack, total, unpack, whole, width
from ptx_programs import Row

Definition = Callable[..., Any]
INTEGERS = [sign + bits for bits in ("8", "16", "32", "64") for sign in "su"]
FLOATS = ["f16", "bf16", "f32", "f64"]


def narrowed(to: str, come: str) -> Definition:
    """To a register of 32 or 64 bits, extended there by the sign of the type."""
    return lambda a: value(value(a, come), to) & ((1 << max(width(to), 32)) - 1)


def between_integers(to: str, come: str) -> Definition:
    return lambda a: value(value(a, come), to) & ((1 << width(to)) - 1)


def to_float(to: str, come: str, mode: str) -> Definition:
    def definition(a: int) -> int:
        n = value(a, come)
        return pack(Number(int(n < 0), abs(n), 0), to, mode)

    return definition


def to_integer(to: str, come: str, mode: str, ftz: bool = False) -> Definition:
    """Out of range gives the end of the range. NaN gives 0, or the top bit if either side has 64 bits."""
    nan = 1 << (width(to) - 1) if come == "f64" or width(to) == 64 else 0
    low, high = (-1 << width(to) - 1, (1 << width(to) - 1) - 1) if to[0] == "s" else (0, (1 << width(to)) - 1)

    def definition(a: int) -> int:
        x = unpack(a, come, ftz)
        if x.kind == "nan":
            return nan
        n = (low if x.sign else high) if x.kind == "inf" else max(low, min(whole(x, mode), high))
        return n & ((1 << width(to)) - 1)

    return definition


def between(to: str, come: str, mode: str = "rn", ftz: bool = False) -> Definition:
    return lambda a: pack(unpack(a, come, ftz), to, mode, ftz)


def integral(kind: str, mode: str) -> Definition:
    def definition(a: int) -> int:
        x = unpack(a, kind)
        if x.kind != "finite":
            return pack(x, kind)
        return pack(Number(x.sign, abs(whole(x, mode)), 0), kind)

    return definition


def saturated(a: int) -> int | Near:
    x = unpack(a, "f32")
    if x.kind == "nan" or x.sign or a == 0:
        return Near(0, 0.0)
    return min(a, 0x3F800000)


def two(to: str, mode: str) -> Definition:
    """The first operand goes to the upper half."""
    one = between(to, "f32", mode)
    return lambda a, b: one(a) << 16 | one(b)


def conversions() -> list[Row]:
    out = []
    for to in INTEGERS:
        for come in INTEGERS:
            if to == come:
                continue
            register = f"b{max(width(to), 32)}"
            if width(to) >= 16:
                out.append(Row(f"cvt.{to}.{come}", to, come, between_integers(to, come)))
            if width(to) < 32:
                out.append(Row(f"cvt.{to}.{come}", register, come, narrowed(to, come), label=f"cvt.{to}.{come} wider"))
        for come in ("f16", "bf16", "f32", "f64"):
            modes = ("rni", "rzi", "rmi", "rpi") if come in ("f32", "f64") else ("rzi",)
            if width(to) > 8:
                out += [Row(f"cvt.{mode}.{to}.{come}", to, come, to_integer(to, come, mode)) for mode in modes]
        if width(to) > 8:
            out.append(Row(f"cvt.rzi.ftz.{to}.f32", to, "f32", to_integer(to, "f32", "rzi", True)))
            out += [Row(f"cvt.rn.{f}.{to}", f, to, to_float(f, to, "rn")) for f in FLOATS]
            for mode in ("rz", "rm", "rp"):
                out.append(Row(f"cvt.{mode}.f32.{to}", "f32", to, to_float("f32", to, mode)))
    for narrow, wide in (("f16", "f32"), ("bf16", "f32"), ("f16", "f64"), ("bf16", "f64"), ("f32", "f64")):
        out.append(Row(f"cvt.{wide}.{narrow}", wide, narrow, between(wide, narrow)))
        modes = ("rn", "rz", "rm", "rp") if narrow != "bf16" or wide == "f64" else ("rn", "rz")
        exact = narrow == "bf16"
        out += [Row(f"cvt.{m}.{narrow}.{wide}", narrow, wide, between(narrow, wide, m), exact=exact) for m in modes]
    for kind in ("f16x2", "bf16x2"):
        for mode in ("rn", "rz"):
            out.append(Row(f"cvt.{mode}.{kind}.f32", kind, "f32 f32", two(kind[:-2], mode), exact=kind[0] == "b"))
    out.append(Row("cvt.sat.f32.f32", "f32", "f32", saturated))
    out.append(Row("cvt.ftz.f32.f32", "f32", "f32", between("f32", "f32", ftz=True)))
    for mode in ("rni", "rzi", "rmi", "rpi"):
        out += [Row(f"cvt.{mode}.{k}.{k}", k, k, integral(k, mode)) for k in ("f32", "f64", "f16")]
    return out


def same(a: int) -> int:
    return a


def moves() -> list[Row]:
    out = []
    kinds = ("b16", "b32", "b64", "u16", "s16", "u32", "s32", "u64", "s64", "f32", "f64", "pred")
    out += [Row(f"mov.{kind}", kind, kind, same, exact=True) for kind in kinds]
    for whole_kind, part in (("b32", "b16"), ("b64", "b32")):
        bits, mask = width(part), (1 << width(part)) - 1
        apart = f"mov.{whole_kind} {{{{{{d}}, {{e}}}}}}, {{a}};"
        together = f"mov.{whole_kind} {{d}}, {{{{{{a}}, {{b}}}}}};"
        out.append(
            Row(f"mov.{whole_kind}", f"{part} {part}", whole_kind, lambda a, n=bits, m=mask: [a & m, a >> n], apart)
        )
        out.append(Row(f"mov.{whole_kind}", whole_kind, f"{part} {part}", lambda a, b, n=bits: a | b << n, together))
        low = f"mov.{whole_kind} {{{{{{d}}, _}}}}, {{a}};"
        out.append(
            Row(f"mov.{whole_kind}", part, whole_kind, lambda a, m=mask: a & m, low, label=f"mov.{whole_kind} a half")
        )
    four = "mov.b64 {d}, {{{a}, {b}, {c}, {f}}};"
    out.append(Row("mov.b64", "b64", "b16 b16 b16 b16", lambda *a: sum(v << 16 * k for k, v in enumerate(a)), four))
    lanes = "mov.b64 {{%q0, {d}, %q1, {e}}}, {a};"
    parts = lambda a: [a >> 16 & 0xFFFF, a >> 48]  # noqa: E731
    out.append(Row("mov.b64", "b16 b16", "b64", parts, ".reg .b16 %q0, %q1; " + lanes, label="mov.b64 to four"))
    return out


def immediates() -> list[Row]:
    """Every form of a constant."""
    plus = lambda x: lambda a: pack(total(unpack(a, "f32"), unpack(x, "f32")), "f32")  # noqa: E731
    three = {
        "add.s32": [("-1", -1), ("0x10", 16), ("2147483647", 2**31 - 1), ("4294967295", -1), ("0xFFFFFFF0", -16)],
        "add.s64": [
            ("-1", -1),
            ("4294967296", 1 << 32),
            ("-9223372036854775808", -(1 << 63)),
            ("0x100000000", 1 << 32),
        ],
        "and.b32": [("255", 255), ("-2", -2), ("0x80000000", 1 << 31), ("017", 15), ("7U", 7)],
        "add.s16": [("-1", -1), ("255", 255)],
        "or.b64": [("-4294967296", -1 << 32), ("0xFFFFFFFF", 0xFFFFFFFF)],
        "mul.lo.s64": [("-3", -3)],
    }
    out = []
    operators = {"add": operator.add, "and": operator.and_, "or": operator.or_, "mul": operator.mul}
    for name, texts in three.items():
        kind, op = name.split(".")[-1], operators[name.split(".")[0]]
        for text, number in texts:
            use = of(kind, lambda a, f=op, n=number: f(a, n))
            out.append(Row(name, kind, kind, use, tail=f", {text}", label=f"{name} with {text}"))
    for text, pattern in (
        ("0f3F800000", 0x3F800000),
        ("0fFF800000", 0xFF800000),
        ("0f00000001", 1),
        ("0fBF000000", 0xBF000000),
    ):
        out.append(Row("add.f32", "f32", "f32", plus(pattern), tail=f", {text}", label=f"add.f32 with {text}"))
        out.append(
            Row("mov.f32", "f32", "", lambda p=pattern: p, f"mov.f32 {{d}}, {text};", label=f"mov.f32 of {text}")
        )
    moved = [("mov.b32", "b32", "-8388608", 0xFF800000), ("mov.b32", "b32", "0f7FC00001", 0x7FC00001)]
    moved += [
        ("mov.b32", "b32", "1065353216", 0x3F800000),
        ("mov.f64", "f64", "0dBFF0000000000001", 0xBFF0000000000001),
    ]
    moved += [("mov.b64", "b64", "0x3FF0000000000000", 0x3FF0000000000000), ("mov.b16", "b16", "-1", 0xFFFF)]
    moved += [("mov.u16", "u16", "0x3C00", 0x3C00), ("mov.pred", "pred", "-1", 1), ("mov.pred", "pred", "0", 0)]
    moved += [("mov.b64", "b64", "-1", (1 << 64) - 1), ("mov.u32", "u32", "4294967295", 0xFFFFFFFF)]
    for name, kind, text, pattern in moved:
        out.append(Row(name, kind, "", lambda p=pattern: p, f"{name} {{d}}, {text};", label=f"{name} of {text}"))
    both = "mov.b32 {d}, {{{a}, 16256}};"
    out.append(Row("mov.b32", "b32", "b16", lambda a: a | 16256 << 16, both, label="mov.b32 with an immediate half"))
    picked = lambda a, c: a if c else 0xFF800000  # noqa: E731
    out.append(
        Row(
            "selp.f32",
            "f32",
            "f32 pred",
            picked,
            "selp.f32 {d}, {a}, 0fFF800000, {b};",
            exact=True,
            label="selp.f32 of an immediate",
        )
    )
    out.append(
        Row(
            "selp.b32",
            "b32",
            "pred",
            lambda a: 1 if a else 0xFFFFFFFF,
            "selp.b32 {d}, 1, -1, {a};",
            label="selp.b32 of immediates",
        )
    )
    out.append(
        Row("setp.eq.s32", "pred", "s32", lambda a: int(a == 0xFFFFFFFF), tail=", -1", label="setp.eq.s32 with -1")
    )
    out.append(
        Row(
            "setp.gt.f32",
            "pred",
            "f32",
            lambda a: int(0 < a <= 0x7F800000),
            tail=", 0f00000000",
            label="setp.gt.f32 with 0",
        )
    )
    return out


def guards() -> list[Row]:
    """If its guard is off, an instruction keeps the register."""
    kept = lambda a, b, c: b if c else a  # noqa: E731
    out = []
    for text, label in (("@{c} mov.b32 {d}, {b};", "guard"), ("@!{c} mov.b32 {d}, {b};", "negated guard")):
        use = kept if label == "guard" else lambda a, b, c: a if c else b
        out.append(Row("mov.b32", "b32", "b32 b32 pred", use, "mov.b32 {d}, {a}; " + text, label=label))
    added = lambda a, b, c: a + b & 0xFFFFFFFF if c else a  # noqa: E731
    out.append(
        Row(
            "add.s32",
            "s32",
            "s32 s32 pred",
            added,
            "mov.b32 {d}, {a}; @{c} add.s32 {d}, {d}, {b};",
            label="guarded add.s32",
        )
    )
    out.append(
        Row(
            "add.u32",
            "u32",
            "u32 u32 pred",
            added,
            "mov.b32 {d}, {a}; @{c} add.u32 {d}, {d}, {b};",
            label="guarded add.u32",
        )
    )
    out.append(
        Row(
            "setp.lt.s32",
            "pred",
            "pred s32",
            lambda a, b: a if not a else int(b >> 31),
            "mov.pred {d}, {a}; @{a} setp.lt.s32 {d}, {b}, 0;",
            label="guarded setp",
        )
    )
    return out


def rows() -> list[Row]:
    return [*conversions(), *moves(), *immediates(), *guards()]
