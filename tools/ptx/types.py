"""PTX's types, and NumPy's types for their values. Formats that NumPy lacks (bf16 and pairs) are held as bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}

BITS = {"pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32x2": 64, "b128": 128}
BITS |= {kind + str(bits): bits for kind in "bus" for bits in UNSIGNED}
BITS |= {f"f{bits}": bits for bits in FLOAT}

NUMPY: dict[str, Any] = {
    "pred": np.bool_,
    "bf16": np.uint16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "f32x2": np.uint64,
}
NUMPY |= {kind + str(bits): dtype for kind in "bu" for bits, dtype in UNSIGNED.items()}
NUMPY |= {f"s{bits}": dtype for bits, dtype in SIGNED.items()}
NUMPY |= {f"f{bits}": dtype for bits, dtype in FLOAT.items()}


class Fault(Exception):
    """An error that stops a program on a GPU: an address out of bounds, a deadlock, a trap."""


class Unsupported(NotImplementedError):
    """Code that the interpreter does not know; it does not guess."""


def is_float(name: str) -> bool:
    return name in ("f16", "f32", "f64", "bf16")


def as_type(values: Array, name: str) -> Array:
    """Values converted to a type."""
    dtype = NUMPY[name]
    return values if values.dtype == dtype else values.astype(dtype)
