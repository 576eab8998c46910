"""Every instruction in the kernels, and related ones, against plain definitions."""

from __future__ import annotations

import ctypes
import ctypes.util
import struct

import numpy as np
import ptx_conversions
import ptx_corpus
import ptx_floats
import ptx_integers
import pytest
from ptx_numbers import columns
from ptx_programs import Row, check

from tools.ptx import Unsupported

ROWS = [*ptx_floats.rows(), *ptx_integers.rows(), *ptx_conversions.rows()]
USED = {line.split()[0] for line in ptx_corpus.entries()}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_opcode(row: Row):
    """Instructions in the kernels must be right; others must be right or refused."""
    try:
        check(row, typed=len(str(row)) % 2 == 0)
    except Unsupported:
        if row.name in USED:
            raise


@pytest.mark.parametrize("kind,dtype,name", [("f32", np.float32, "fmaf"), ("f64", np.float64, "fma")])
def test_definitions_are_the_hosts(kind, dtype, name):
    """The definitions' arithmetic against the processor and the C library."""
    values = columns((kind,) * 3, 2000, 5)
    code, size = ("f", 4) if kind == "f32" else ("d", 8)
    a, b, c = (np.frombuffer(b"".join(v.to_bytes(size, "little") for v in x), dtype) for x in values)
    fused = getattr(ctypes.CDLL(ctypes.util.find_library("m")), name)
    fused.restype = ctypes.c_float if kind == "f32" else ctypes.c_double
    fused.argtypes = [fused.restype] * 3
    with np.errstate(all="ignore"):
        hosts = {"add": a + b, "sub": a - b, "mul": a * b, "div": a / b, "sqrt": np.sqrt(a)}
    hosts["fma"] = np.array([fused(*map(float, x)) for x in zip(a, b, c, strict=True)], dtype)
    for op, host in hosts.items():
        definition = ptx_floats.arithmetic(op, kind)
        count = {"sqrt": 1, "fma": 3}.get(op, 2)
        ours = np.array(
            [
                struct.unpack(f"<{code}", definition(*x[:count]).to_bytes(size, "little"))[0]
                for x in zip(*values, strict=True)
            ],
            dtype,
        )
        np.testing.assert_array_equal(ours, host, err_msg=op)
        kept = ~np.isnan(host)
        np.testing.assert_array_equal(np.signbit(ours[kept]), np.signbit(host[kept]), err_msg=op)
