"""Test rows for integers and bits: arithmetic, shifts, fields, selection, comparison."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from ptx_numbers import as_float, unpack, width
from ptx_programs import Row

Definition = Callable[..., Any]


def value(bits: int, kind: str) -> int:
    """The value of a bit pattern in a type: s32 has a sign, u32 and b32 have none."""
    bits &= (1 << width(kind)) - 1
    return bits - (1 << width(kind)) if kind[0] == "s" and bits >> (width(kind) - 1) else bits


def of(kind: str, function: Callable[..., int], result: str = "") -> Definition:
    """Make a definition from a function on Python integers."""
    mask = (1 << width(result or kind)) - 1
    return lambda *patterns: function(*(value(p, kind) for p in patterns)) & mask


def divide(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def never_zero(kind: str, function: Callable[[int, int], int]) -> Definition:
    """Divide by b | 1: the result of division by zero is undefined."""
    return lambda a, b: function(value(a, kind), value(b | 1, kind)) & ((1 << width(kind)) - 1)


def shift_right(kind: str) -> Definition:
    return lambda a, n: (value(a, kind) >> min(n, width(kind))) & ((1 << width(kind)) - 1)


def shift_left(bits: int) -> Definition:
    return lambda a, n: (a << min(n, bits)) & ((1 << bits) - 1)


def funnel(left: bool, clamp: bool) -> Definition:
    def definition(a: int, b: int, c: int) -> int:
        n = min(c, 32) if clamp else c % 32
        both = b << 32 | a
        return (both << n >> 32 if left else both >> n) & 0xFFFFFFFF

    return definition


def lop3(table: int) -> Definition:
    def definition(a: int, b: int, c: int) -> int:
        return sum((table >> (4 * (a >> k & 1) + 2 * (b >> k & 1) + (c >> k & 1)) & 1) << k for k in range(32))

    return definition


def permute(a: int, b: int, c: int) -> int:
    data = (b << 32 | a).to_bytes(8, "little")
    out = 0
    for k in range(4):
        choice = c >> 4 * k & 15
        byte = data[choice & 7]
        out |= (byte if choice < 8 else 255 * (byte >> 7)) << 8 * k
    return out


def extract(kind: str) -> Definition:
    bits = width(kind)

    def definition(a: int, start: int, length: int) -> int:
        start, length = start & 255, length & 255
        top = a >> min(start + length - 1, bits - 1) & 1 if kind[0] == "s" and length else 0
        return sum((a >> start + k & 1 if k < length and start + k < bits else top) << k for k in range(bits))

    return definition


def insert(bits: int) -> Definition:
    def definition(a: int, b: int, start: int, length: int) -> int:
        for k in range(min(length & 255, bits - (start & 255))):
            b = b & ~(1 << (start & 255) + k) | (a >> k & 1) << (start & 255) + k
        return b

    return definition


def mask_of(clamp: bool) -> Definition:
    def definition(start: int, length: int) -> int:
        start, length = (min(start, 32), min(length, 32)) if clamp else (start % 32, length % 32)
        return ((1 << length) - 1) << start & 0xFFFFFFFF

    return definition


def extend(kind: str, clamp: bool) -> Definition:
    def definition(a: int, n: int) -> int:
        n = min(n, 32) if clamp else n % 32
        low = a & ((1 << n) - 1)
        return (low - (1 << n) if kind[0] == "s" and n and low >> n - 1 else low) & 0xFFFFFFFF

    return definition


def find(kind: str, amount: bool) -> Definition:
    def definition(a: int) -> int:
        number = value(a, kind)
        place = (~number if number < 0 else number).bit_length() - 1
        return place & 0xFFFFFFFF if place < 0 or not amount else width(kind) - 1 - place

    return definition


def reverse(bits: int) -> Definition:
    return lambda a: int(f"{a:0{bits}b}"[::-1], 2)


COMPARISONS = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt}
COMPARISONS |= {"ge": operator.ge, "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
BOOLEAN = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def compared(op: str, kind: str, ftz: bool = False) -> Definition:
    def definition(a: int, b: int) -> int:
        if kind not in ("f32", "f64", "f16", "bf16"):
            return int(COMPARISONS[op](value(a, kind), value(b, kind)))
        x, y = (0.0 if ftz and unpack(v, kind, True)[1:] == (0, -149, "finite") else as_float(v, kind) for v in (a, b))
        unordered = x != x or y != y
        if op in ("num", "nan"):
            return int(unordered == (op == "nan"))
        return int(op[2:] == "u" if unordered else COMPARISONS[op[:2]](x, y))

    return definition


def combined(op: str, kind: str, boolean: str) -> Definition:
    plain = compared(op, kind)
    return lambda a, b, c: BOOLEAN[boolean](plain(a, b), c)


def comparisons() -> list[Row]:
    out = []
    for kind in ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64"):
        ops = ["eq", "ne"] + ["lt", "le", "gt", "ge"] * (kind[0] != "b") + ["lo", "ls", "hi", "hs"] * (kind[0] == "u")
        ops += ["equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"] * (kind[0] == "f")
        out += [Row(f"setp.{op}.{kind}", "pred", f"{kind} {kind}", compared(op, kind)) for op in ops]
    for kind in ("f16", "bf16"):
        for op in ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "geu", "num", "nan"):
            plain = compared(op, kind)
            out.append(Row(f"setp.{op}.{kind}", "pred", f"{kind} {kind}", plain))
            both = lambda a, b, f=plain: [f(a & 0xFFFF, b & 0xFFFF), f(a >> 16, b >> 16)]  # noqa: E731
            form = f"setp.{op}.{kind}x2 {{d}}|{{e}}, {{a}}, {{b}};"
            out.append(Row(f"setp.{op}.{kind}x2", "pred pred", f"{kind}x2 {kind}x2", both, form))
    out.append(Row("setp.lt.ftz.f32", "pred", "f32 f32", compared("lt", "f32", ftz=True)))
    out.append(Row("setp.eq.ftz.f32", "pred", "f32 f32", compared("eq", "f32", ftz=True)))
    for boolean in BOOLEAN:
        for op, kind in (("lt", "s32"), ("neu", "f32")):
            name, plain, form = f"setp.{op}.{boolean}.{kind}", combined(op, kind, boolean), "{d}, {a}, {b}, "
            out.append(Row(name, "pred", f"{kind} {kind} pred", plain, f"{name} {form}{{c}};"))
            other = lambda a, b, c, plain=plain: plain(a, b, 1 - c)  # noqa: E731
            out.append(Row(name, "pred", f"{kind} {kind} pred", other, f"{name} {form}!{{c}};"))
    for op, kind in (("lt", "s32"), ("geu", "f32"), ("eq", "f64")):
        plain = compared(op, kind)
        both = lambda a, b, plain=plain: [plain(a, b), 1 - plain(a, b)]  # noqa: E731
        out.append(
            Row(
                f"setp.{op}.{kind}", "pred pred", f"{kind} {kind}", both, f"setp.{op}.{kind} {{d}}|{{e}}, {{a}}, {{b}};"
            )
        )
        name = f"setp.{op}.and.{kind}"
        both = lambda a, b, c, plain=plain: [plain(a, b) & c, (1 - plain(a, b)) & c]  # noqa: E731
        out.append(Row(name, "pred pred", f"{kind} {kind} pred", both, f"{name} {{d}}|{{e}}, {{a}}, {{b}}, {{c}};"))
        ones = lambda a, b, plain=plain: -plain(a, b) & 0xFFFFFFFF  # noqa: E731
        out.append(Row(f"set.{op}.u32.{kind}", "u32", f"{kind} {kind}", ones))
        one = lambda a, b, plain=plain: 0x3F800000 * plain(a, b)  # noqa: E731
        out.append(Row(f"set.{op}.f32.{kind}", "f32", f"{kind} {kind}", one))
    for kind in ("b16", "b32", "b64", "u16", "u32", "u64", "s32", "f32", "f64"):
        out.append(Row(f"selp.{kind}", kind, f"{kind} {kind} pred", lambda a, b, c: a if c else b, exact=True))
    return out


def carries() -> list[Row]:
    add = "add.cc.u32 {d}, {a}, {c}; "

    def chain(a: int, b: int, c: int, f: int) -> list[int]:
        whole = (b << 32 | a) + (f << 32 | c)
        return [whole & 0xFFFFFFFF, whole >> 32 & 0xFFFFFFFF]

    def last(a: int, b: int, c: int, f: int) -> int:
        return (b + f + (a + c >> 32) >> 32) + b + f & 0xFFFFFFFF

    def less(a: int, b: int, c: int, f: int) -> list[int]:
        whole = (b << 32 | a) - (f << 32 | c)
        return [whole & 0xFFFFFFFF, whole >> 32 & 0xFFFFFFFF]

    four = "u32 u32 u32 u32"
    out = [
        Row("addc.u32", "u32 u32", four, chain, add + "addc.u32 {e}, {b}, {f};"),
        Row("addc.cc.u32", "u32", four, last, add + "addc.cc.u32 {d}, {b}, {f}; addc.u32 {d}, {b}, {f};"),
        Row("subc.u32", "u32 u32", four, less, "sub.cc.u32 {d}, {a}, {c}; subc.u32 {e}, {b}, {f};"),
    ]
    for row in out:
        row.label = row.name
    return out


def rows() -> list[Row]:
    out = []
    for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
        two, bits = f"{kind} {kind}", width(kind)
        out += [Row(f"{n}.{kind}", kind, two, of(kind, f)) for n, f in (("add", operator.add), ("sub", operator.sub))]
        out.append(Row(f"mul.lo.{kind}", kind, two, of(kind, operator.mul)))
        out.append(Row(f"mul.hi.{kind}", kind, two, of(kind, lambda a, b, n=bits: a * b >> n)))
        out.append(Row(f"mad.lo.{kind}", kind, f"{two} {kind}", of(kind, lambda a, b, c: a * b + c)))
        out.append(Row(f"mad.hi.{kind}", kind, f"{two} {kind}", of(kind, lambda a, b, c, n=bits: (a * b >> n) + c)))
        out.append(
            Row(
                f"div.{kind}",
                kind,
                two,
                never_zero(kind, divide),
                f"or.b{bits} {{b}}, {{b}}, 1; div.{kind} {{d}}, {{a}}, {{b}};",
                label=f"div.{kind}",
            )
        )
        out.append(
            Row(
                f"rem.{kind}",
                kind,
                two,
                never_zero(kind, lambda a, b: a - b * divide(a, b)),
                f"or.b{bits} {{b}}, {{b}}, 1; rem.{kind} {{d}}, {{a}}, {{b}};",
                label=f"rem.{kind}",
            )
        )
        out.append(Row(f"min.{kind}", kind, two, of(kind, min)))
        out.append(Row(f"max.{kind}", kind, two, of(kind, max)))
        out.append(Row(f"shr.{kind}", kind, f"{kind} u32:shift", shift_right(kind)))
        if bits < 64:
            wide = kind[0] + str(2 * bits)
            out.append(Row(f"mul.wide.{kind}", wide, two, of(kind, operator.mul, wide)))
            multiply = lambda a, b, c, k=kind, w=wide: value(a, k) * value(b, k) + c & (1 << width(w)) - 1  # noqa: E731
            out.append(Row(f"mad.wide.{kind}", wide, f"{two} {wide}", multiply))
        if kind[0] == "s":
            out.append(Row(f"neg.{kind}", kind, kind, of(kind, operator.neg)))
            out.append(Row(f"abs.{kind}", kind, kind, of(kind, abs)))
        if bits > 16:
            out.append(Row(f"bfe.{kind}", kind, f"{kind} u32:byte u32:byte", extract(kind)))
            out.append(Row(f"bfind.{kind}", "u32", kind, find(kind, False)))
            out.append(Row(f"bfind.shiftamt.{kind}", "u32", kind, find(kind, True)))
    out.append(Row("add.sat.s32", "s32", "s32 s32", of("s32", lambda a, b: max(-(1 << 31), min(a + b, (1 << 31) - 1)))))
    for bits in (16, 32, 64):
        kind, mask = f"b{bits}", (1 << bits) - 1
        out += [Row(f"{n}.{kind}", kind, f"{kind} {kind}", f) for n, f in BOOLEAN.items()]
        out.append(Row(f"not.{kind}", kind, kind, lambda a, m=mask: a ^ m))
        out.append(Row(f"cnot.{kind}", kind, kind, lambda a: int(a == 0)))
        out.append(Row(f"shl.{kind}", kind, f"{kind} u32:shift", shift_left(bits)))
        out.append(Row(f"shr.{kind}", kind, f"{kind} u32:shift", shift_right(kind)))
        if bits > 16:
            out.append(Row(f"bfi.{kind}", kind, f"{kind} {kind} u32:byte u32:byte", insert(bits)))
            out.append(Row(f"popc.{kind}", "u32", kind, int.bit_count))
            out.append(Row(f"clz.{kind}", "u32", kind, lambda a, n=bits: n - a.bit_length()))
            out.append(Row(f"brev.{kind}", kind, kind, reverse(bits)))
    out += [Row(f"{n}.pred", "pred", "pred pred", f) for n, f in BOOLEAN.items()]
    out.append(Row("not.pred", "pred", "pred", lambda a: 1 - a))
    out += [Row("lop3.b32", "b32", "b32 b32 b32", lop3(t), tail=f", {t}") for t in (0xE8, 0x96, 0x01, 0xCA, 0x80, 0xFE)]
    for way in ("l", "r"):
        for mode in ("wrap", "clamp"):
            out.append(Row(f"shf.{way}.{mode}.b32", "b32", "b32 b32 u32:shift", funnel(way == "l", mode == "clamp")))
    out.append(Row("prmt.b32", "b32", "b32 b32 b32", permute))
    for mode in ("clamp", "wrap"):
        out.append(Row(f"bmsk.{mode}.b32", "b32", "u32:shift u32:shift", mask_of(mode == "clamp")))
        out += [Row(f"szext.{mode}.{k}", k, f"{k} u32:shift", extend(k, mode == "clamp")) for k in ("s32", "u32")]
    return out + comparisons() + carries()
