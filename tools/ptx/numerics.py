"""Arithmetic exact to the last bit where PTX requires it: fused multiply-add, directed rounding, bf16, wide products.

Inexact sums are first rounded to odd: to the neighbour with last bit 1. Rounding again, to at least two bits less, then
equals a single rounding (Boldo and Melquiond, 2008).
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from tools.ptx.types import NUMPY, SIGNED, UNSIGNED, Array


def flush(x: Array) -> Array:
    """Replace subnormal numbers by zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).smallest_normal, np.copysign(x.dtype.type(0), x), x)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum and its rounding error (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def odd_sum(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd."""
    s, e = two_sum(a, b)
    bits = s.view(np.int64)
    inexact = np.isfinite(s) & np.isfinite(e) & (e != 0) & (bits & 1 == 0)
    # One step away from zero if the error has the sum's sign, else towards it.
    step = np.where((e > 0) == (s > 0), 1, -1)
    return np.where(inexact, bits + step, bits).view(np.float64)


def fma32(a: Array, b: Array, c: Array) -> Array:
    return odd_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)).astype(np.float32)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded product and its rounding error (Dekker)."""

    def halves(x: Array) -> tuple[Array, Array]:
        k = x * 134217729.0
        high = k - (k - x)
        return high, x - high

    p = a * b
    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def fma64(a: Array, b: Array, c: Array) -> Array:
    product, low = two_product(a, b)
    carried, rest = two_sum(c, low)
    high, middle = two_sum(product, carried)
    result = high + odd_sum(middle, rest)
    plain = np.where(np.isfinite(a) & np.isfinite(b) & ~np.isfinite(c), c, product + c)
    # Fractions are exact where a part may leave float64's range; infinities and NaN follow plain arithmetic.
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    sizes = np.abs(np.stack(np.broadcast_arrays(a, b, c, product)))
    risky = (((sizes != 0) & (sizes < 2.0**-900)) | (sizes > 2.0**900)).any(axis=0)
    risky = finite & (risky | ((product == 0) & (a != 0) & (b != 0)))
    zero = (product == 0) | ((high == 0) & (result == 0))  # an exact zero gets the sign of a plain sum
    result = np.where(finite & ~zero, result, plain)
    for k in np.nonzero(risky)[0]:
        result[k] = _fma_exactly(float(a[k]), float(b[k]), float(c[k]))
    return result


def _fma_exactly(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c
    try:
        return float(exact)
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def directed(x: Array, mode: str) -> Array:
    """Round float64, exact or rounded to odd, to float32: toward zero (rz), down (rm) or up (rp)."""
    near = x.astype(np.float32)
    wide = near.astype(np.float64)
    below = np.where(wide > x, np.nextafter(near, np.float32(-np.inf)), near)
    above = np.where(wide < x, np.nextafter(near, np.float32(np.inf)), near)
    if mode == "rm":
        return below
    if mode == "rp":
        return above
    return np.where(x > 0, below, np.where(x < 0, above, near))


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array, mode: str | None = "rn") -> Array:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if mode != "rz":  # to the nearest, ties to even
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint32(0x7FFF), bits >> np.uint32(16)).astype(np.uint16)


def high_product(a: Array, b: Array, kind: str) -> Array:
    """The upper half of a product."""
    bits = int(kind[1:])
    if bits < 64:
        wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * bits]
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(NUMPY[kind])
    if kind[0] == "s":  # the unsigned product, less the excess from the two's complements of negative factors
        x, y = a.view(np.uint64), b.view(np.uint64)
        excess = np.where(a < 0, y, np.uint64(0)) + np.where(b < 0, x, np.uint64(0))
        return (high_product(x, y, "u64") - excess).view(np.int64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a_low, a_high, b_low, b_high = a & low, a >> half, b & low, b >> half
    first, second = a_high * b_low, a_low * b_high
    carry = ((a_low * b_low) >> half) + (first & low) + (second & low)
    return a_high * b_high + (first >> half) + (second >> half) + (carry >> half)


def divide(a: Array, b: Array) -> tuple[Array, Array]:
    """Quotient toward zero and remainder. Division by zero gives all ones and the dividend, as GPUs do; PTX leaves it
    open."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        quotient = a // safe
    else:
        unsigned = UNSIGNED[8 * a.dtype.itemsize]
        size = np.abs(a).view(unsigned) // np.abs(safe).view(unsigned)  # unsigned, as -smallest overflows to itself
        quotient = np.where((a < 0) != (safe < 0), (unsigned(0) - size).view(a.dtype), size.view(a.dtype))
    return np.where(zero, ~np.zeros_like(a), quotient), np.where(zero, a, a - quotient * safe)


class Approximation:
    """Results of ``ex2.approx`` and the like: off by up to ``noise`` times the documented error.

    The error is a function of the value, because hardware gives the same result for the same input.
    """

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def relative(self, exact: Array, bound: float) -> Array:
        return self._off(exact, bound, relative=True)

    def log2(self, x: Array) -> Array:
        """The error is absolute from 1/2 to 2, where the logarithm passes 0, and relative elsewhere."""
        exact = np.log2(x)
        near = (x > 0.5) & (x < 2)
        off = np.where(near, self._off(exact, 2.0**-22, relative=False), self._off(exact, 2.0**-22, relative=True))
        return off.astype(np.float32)

    def _off(self, exact: Array, bound: float, *, relative: bool) -> Array:
        if self.noise:
            hashed = (exact.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
            error = (hashed.astype(np.float64) / 2.0**23 - 1) * self.noise * bound
            exact = exact + (np.where(np.isfinite(exact), exact, 0) * error if relative else error)
        return exact.astype(np.float32)
