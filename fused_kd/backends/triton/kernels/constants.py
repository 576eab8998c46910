"""Numbers that Triton's functions read as constants."""

from __future__ import annotations

import triton.language as tl

# NaN cannot be one: the JIT compares constants with != at every launch, and would reject the second.
NEG_INF = tl.constexpr(float("-inf"))
INF = tl.constexpr(float("inf"))
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
NO_CLASS = tl.constexpr(2147483647)  # larger than every class
