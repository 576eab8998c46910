"""Plain definitions of arithmetic on bit patterns: numbers are integers times powers of two, rounded once here."""

from __future__ import annotations

import random
import struct
from fractions import Fraction
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

#: precision in bits with the hidden one, exponent of the smallest normal number, of the largest
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}
#: What PTX calls canonical: the NaN that min, max and narrowing conversions give.
CANONICAL = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}


class Number(NamedTuple):
    """(-1)**sign * mantissa * 2**exponent; kind is "finite", "inf" or "nan"."""

    sign: int
    mantissa: int = 0
    exponent: int = 0
    kind: str = "finite"


NAN = Number(0, kind="nan")


class Near(NamedTuple):
    """A float result that may be off by some units of the last place, or by some amount, whichever is larger."""

    bits: int
    ulps: float
    absolute: float = 0.0


def width(kind: str) -> int:
    """Bits of a type. "pred" is a byte in memory; "u32:shift" is a u32 with special test values."""
    kind = kind.split(":")[0]
    return {"pred": 8, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32x2": 64}.get(kind) or int(kind[1:])


def unpack(bits: int, kind: str, ftz: bool = False) -> Number:
    precision, low, high = FORMATS[kind]
    sign, rest = bits >> (width(kind) - 1), bits & ((1 << (width(kind) - 1)) - 1)
    exponent, fraction = rest >> (precision - 1), rest & ((1 << (precision - 1)) - 1)
    if exponent == high - low + 2:
        return Number(sign, kind="nan" if fraction else "inf")
    if exponent == 0:
        return Number(sign, 0 if ftz else fraction, low - precision + 1)
    return Number(sign, fraction | 1 << (precision - 1), low + exponent - precision)


def pack(x: Number, kind: str, mode: str = "rn", ftz: bool = False, sticky: bool = False) -> int:
    """The bit pattern of x, rounded; ``sticky`` says that the exact magnitude is slightly larger than x."""
    precision, low, high = FORMATS[kind]
    top = x.sign << (width(kind) - 1)
    infinite = (high - low + 2) << (precision - 1)
    if x.kind == "nan":
        return CANONICAL[kind]
    if x.kind == "inf":
        return top | infinite
    m, e = x.mantissa, x.exponent
    if m == 0 and not sticky:
        return top
    drop = max(m.bit_length() - precision, low - precision + 1 - e)  # the last place that is kept
    if drop <= 0:
        m, e, part, half = m << -drop, e + drop, int(sticky), 2
    else:
        part, half = 2 * (m & ((1 << drop) - 1)) + int(sticky), 1 << drop
        m, e = m >> drop, e + drop
    more = {
        "rn": part > half or (part == half and m & 1),
        "rz": False,
        "rm": bool(part and x.sign),
        "rp": bool(part and not x.sign),
    }[mode]
    m += int(more)
    if m.bit_length() > precision:
        m, e = m >> 1, e + 1
    if m.bit_length() + e - 1 > high:
        finite = mode == "rz" or (mode == "rm" and not x.sign) or (mode == "rp" and bool(x.sign))
        return top | (infinite - finite)
    if m >> (precision - 1) == 0:  # subnormal
        return top if ftz else top | m
    return top | ((e + precision - 1 - low + 1) << (precision - 1)) | (m & ((1 << (precision - 1)) - 1))


def negative(x: Number) -> Number:
    return x._replace(sign=1 - x.sign)


def product(x: Number, y: Number) -> Number:
    sign = x.sign ^ y.sign
    zero = any(v.kind == "finite" and v.mantissa == 0 for v in (x, y))
    if "nan" in (x.kind, y.kind) or ("inf" in (x.kind, y.kind) and zero):
        return NAN
    if "inf" in (x.kind, y.kind):
        return Number(sign, kind="inf")
    return Number(sign, x.mantissa * y.mantissa, x.exponent + y.exponent)


def total(x: Number, y: Number, mode: str = "rn") -> Number:
    if "nan" in (x.kind, y.kind) or (x.kind == y.kind == "inf" and x.sign != y.sign):
        return NAN
    if "inf" in (x.kind, y.kind):
        return x if x.kind == "inf" else y
    e = min(x.exponent, y.exponent)
    value = sum((-1) ** v.sign * (v.mantissa << (v.exponent - e)) for v in (x, y))
    if value == 0:
        return Number(x.sign if x.sign == y.sign else int(mode == "rm"), 0, e)
    return Number(int(value < 0), abs(value), e)


def quotient(x: Number, y: Number, kind: str, mode: str = "rn", ftz: bool = False) -> int:
    sign = x.sign ^ y.sign
    if "nan" in (x.kind, y.kind) or x.kind == y.kind == "inf":
        return pack(NAN, kind)
    if x.kind == "inf" or y.kind == "inf":
        return pack(Number(sign, kind="inf" if x.kind == "inf" else "finite"), kind)
    if y.mantissa == 0:
        return pack(Number(sign, kind="inf") if x.mantissa else NAN, kind)
    shift = 130 + y.mantissa.bit_length()
    m, rest = divmod(x.mantissa << shift, y.mantissa)
    return pack(Number(sign, m, x.exponent - y.exponent - shift), kind, mode, ftz, bool(rest))


def root(x: Number, kind: str, mode: str = "rn", ftz: bool = False) -> int:
    if x.kind == "nan" or (x.sign and (x.kind == "inf" or x.mantissa)):
        return pack(NAN, kind)
    if x.kind == "inf" or x.mantissa == 0:
        return pack(x, kind)
    shift = 200 + x.exponent % 2
    m = isqrt(x.mantissa << shift)
    sticky = m * m != x.mantissa << shift
    return pack(Number(0, m, (x.exponent - shift) // 2), kind, mode, ftz, sticky)


def whole(x: Number, mode: str) -> int:
    """Round a finite number to an integer: rni, rzi, rmi, rpi."""
    value = Fraction(x.mantissa) * Fraction(2) ** x.exponent * (-1) ** x.sign
    low = value.numerator // value.denominator
    if mode == "rni":
        return round(value)
    if mode == "rmi":
        return low
    up = low + (value != low)
    return up if mode == "rpi" or x.sign else low


def is_nan(bits: int, kind: str) -> bool:
    return unpack(bits, kind).kind == "nan"


def as_float(bits: int, kind: str) -> float:
    x = unpack(bits, kind)
    if x.kind != "finite":
        return {"nan": float("nan"), "inf": float("inf")}[x.kind] * (-1) ** x.sign
    return float(Fraction(x.mantissa) * Fraction(2) ** x.exponent) * (-1) ** x.sign


def from_float(value: float, kind: str, mode: str = "rn", ftz: bool = False) -> int:
    """The bit pattern of a Python float."""
    return pack(unpack(struct.unpack("<Q", struct.pack("<d", value))[0], "f64"), kind, mode, ftz)


def agrees(got: int, want: int | Near | None, kind: str, exact: bool = False) -> bool:
    """NaN agrees with any NaN unless ``exact``; everything agrees with None."""
    if want is None:
        return True
    if kind.endswith("x2") and isinstance(want, int):
        half = width(kind) // 2
        pairs = [(got >> k & (1 << half) - 1, want >> k & (1 << half) - 1) for k in (0, half)]
        return all(agrees(a, b, kind[:-2], exact) for a, b in pairs)
    if isinstance(want, Near):
        if is_nan(want.bits, kind) or is_nan(got, kind):
            return is_nan(want.bits, kind) and is_nan(got, kind)
        x, y = as_float(got, kind), as_float(want.bits, kind)
        if x == y:
            return True
        if float("inf") in (abs(x), abs(y)):
            return False
        precision, low, _ = FORMATS[kind]
        mantissa, exponent = unpack(want.bits, kind)[1:3]
        place = max(mantissa.bit_length() + exponent - precision, low - precision + 1)
        return abs(x - y) <= max(want.ulps * 2.0**place, want.absolute)
    if got == want:
        return True
    return kind in FORMATS and not exact and is_nan(got, kind) and is_nan(want, kind)


# Values


@lru_cache(None)
def specials(kind: str) -> list[int]:
    name, _, pool = kind.partition(":")
    bits = width(name)
    mask = (1 << bits) - 1
    if pool == "shift":
        return [*range(72), 127, 128, 255, 256, 257, 1 << 31, mask, mask - 1]
    if pool == "byte":
        return [*range(40), 63, 64, 65, 127, 128, 254, 255]
    if pool == "exponent":  # of moderate exponentials
        return [from_float(v, name) for v in (0.0, -0.0, 1.0, -1.0, 0.5, -0.75, 20.0, -30.0, 125.5, -125.5, 127.99)]
    if name == "pred":
        return [0, 1]
    if name in ("f16x2", "bf16x2", "f32x2"):
        half = specials(name[:-2])
        return [a | b << bits // 2 for a, b in zip(half, half[5:] + half[:5], strict=True)]
    if name in FORMATS:
        precision, low, high = FORMATS[name]
        top = (high - low + 2) << (precision - 1)
        one = (high) << (precision - 1)
        signless = [
            *(
                0,
                1,
                2,
                (1 << (precision - 1)) - 1,
                1 << (precision - 1),
                (1 << (precision - 1)) + 1,
            ),  # around the normal
            *(one, one - 1, one + 1, one + (1 << (precision - 2)), top - 1, top - 2, top),
            *(top | 1 << (precision - 2), top | 1 << (precision - 2) | 1, top - (1 << (precision - 1)) + 5),
            *(from_float(v, name) for v in (0.5, 1.5, 2.5, 3.5, 1 / 3, 255.5, 65504.0, 65520.0, 32767.5, 2.0**23 + 1)),
            *(from_float(v, name) for v in (2.0**24 + 1, 2.0**31, 2.0**32, 2.0**63, 2.0**64, 2.0**31 - 64, 1e-5)),
        ]
        return [s | x for x in signless for s in (0, 1 << (bits - 1))]
    around = [0, 1, 2, 3, 7, 10, 31, 32, 33, 1 << (bits - 1), (1 << (bits - 1)) - 1, (1 << (bits - 1)) + 1]
    return [
        v & mask for v in (*around, mask, mask - 1, mask >> 2, 0x5555555555555555, 0xFF, 0x80, 0x7F, 1 << bits // 2)
    ]


def draw(kind: str, rng: random.Random) -> int:
    name = kind.split(":")[0]
    if ":" in kind or name == "pred":
        return rng.choice(specials(kind))
    if name in ("f16x2", "bf16x2", "f32x2"):
        half = width(name) // 2
        return draw(name[:-2], rng) | draw(name[:-2], rng) << half
    if name in FORMATS and rng.random() < 0.7:
        spread = rng.choice((1, 4, 14))
        return from_float(rng.gauss(0, 1) * 2.0 ** rng.uniform(-spread, spread), name)
    if name not in FORMATS and rng.random() < 0.3:
        return rng.getrandbits(rng.randrange(1, width(name) + 1))
    return rng.getrandbits(width(name))


@lru_cache(None)
def columns(kinds: tuple[str, ...], count: int, seed: int) -> list[list[int]]:
    """``count`` values for each operand; half of them pair special values."""
    rng = random.Random(seed)
    pools = [specials(k) for k in kinds]
    out: list[list[int]] = [[] for _ in kinds]
    if len(kinds) == 1:
        out[0] = pools[0][: count // 2]
    for _ in range(count - len(out[0]) if out else 0):
        both = rng.random() < 0.4
        row = [
            rng.choice(p) if both or rng.random() < 0.15 else draw(k, rng) for k, p in zip(kinds, pools, strict=True)
        ]
        if len(kinds) == 3 and len(set(kinds)) == 1 and kinds[0] in FORMATS and rng.random() < 0.3:
            kind = kinds[0]  # a sum that cancels almost or wholly
            row[2] = pack(negative(product(*(unpack(v, kind) for v in row[:2]))), kind) ^ rng.choice((0, 0, 1))
        elif len(set(kinds)) == 1 and len(kinds) > 1 and kinds[0] != "pred" and rng.random() < 0.15:
            row[1] = row[0] ^ rng.choice((0, 0, 1, 1 << (width(kinds[0]) - 1)))
        if len(kinds) > 1 and len(out[0]) < 16:  # each zero and each smallest number with each
            row[:2] = [p[n % len(p)] for p, n in zip(pools[:2], divmod(len(out[0]), 4), strict=True)]
        for values, v in zip(out, row, strict=True):
            values.append(v)
    return out
