"""The interpreter's options: the order of the warps, errors of approximations, and contraction as ptxas may do it."""

from __future__ import annotations

import math

import numpy as np
import ptx_floats
import pytest
from ptx_numbers import as_float, columns
from ptx_programs import Program, Row, apply

from tools.ptx import Options

SHARED = ".shared .align 16 .b8 buffer[1024];"
#: A sum over 128 threads: within the warp by shuffles, between the warps through shared memory.
SUM = """
        mad.wide.u32 %d2, %thread, 4, %d0;
        ld.global.u32 %r0, [%d2];
        shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1;
        add.u32 %r0, %r0, %r1;
        shfl.sync.bfly.b32 %r1, %r0, 8, 31, -1;
        add.u32 %r0, %r0, %r1;
        shfl.sync.bfly.b32 %r1, %r0, 4, 31, -1;
        add.u32 %r0, %r0, %r1;
        shfl.sync.bfly.b32 %r1, %r0, 2, 31, -1;
        add.u32 %r0, %r0, %r1;
        shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;
        add.u32 %r0, %r0, %r1;
        mov.u32 %r4, buffer;
        shr.u32 %r2, %thread, 5;
        mad.lo.u32 %r3, %r2, 4, %r4;
        setp.eq.u32 %p0, %lane, 0;
        @%p0 st.shared.u32 [%r3], %r0;
        BARRIER
        ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r4];
        add.u32 %r5, %r5, %r6;
        add.u32 %r7, %r7, %r8;
        add.u32 %r5, %r5, %r7;
        st.global.u32 [%d2], %r5;"""


def summed(barrier: str, schedule: str):
    values = np.arange(128, dtype=np.uint32)
    program = Program(SUM.replace("BARRIER", barrier), 1, SHARED)
    return program.run(values, threads=128, options=Options(schedule=schedule)), values


@pytest.mark.parametrize("schedule", ["together", "backward"])
def test_schedule(schedule):
    result, values = summed("bar.sync 0;", schedule)
    assert not result.problems
    assert set(values) == {127 * 64}
    result, _ = summed("", schedule)
    assert any("shared" in problem for problem in result.problems)


def test_backward_is_another_order():
    """The last warp runs first: it does not see the first warp's write, so the race shows."""
    body = """
        mov.u32 %r0, buffer;
        mad.lo.u32 %r1, %lane, 4, %r0;
        st.shared.u32 [%r1+128], %lane;
        setp.lt.u32 %p0, %thread, 32;
        @%p0 bra FIRST;
        ld.shared.u32 %r2, [%r1];
        bra END;
    FIRST:
        mov.u32 %r2, 7;
        st.shared.u32 [%r1], %r2;
    END:
        mad.wide.u32 %d0, %thread, 4, %d0;
        st.global.u32 [%d0], %r2;"""
    out = np.zeros(64, np.uint32)
    result = Program(body, 1, SHARED).run(out, threads=64, options=Options(schedule="backward"))
    assert result.problems
    assert (out[:32] == 7).all() and not (out[32:] == 7).any()


APPROXIMATE = {
    "ex2.approx.ftz.f32": (ptx_floats.exp2, 2.0**-22),
    "ex2.approx.f32": (ptx_floats.exp2, 2.0**-22),
    "rcp.approx.ftz.f32": (ptx_floats.reciprocal, 2.0**-23),
    "sqrt.approx.ftz.f32": (ptx_floats.square_root, 2.0**-23),
    "rsqrt.approx.ftz.f32": (ptx_floats.reciprocal_root, 2.0**-22.9),
    "lg2.approx.f32": (ptx_floats.log2, 2.0**-22),
    "div.full.f32": (None, 2.0**-22),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_noise(name):
    """Errors within the documented bounds, the same in each run, and different from a run without noise."""
    function, bound = APPROXIMATE[name]
    kinds = ["f32"] * (2 if function is None else 1)
    row = Row(name, "f32", " ".join(kinds), lambda *a: 0)
    inputs = columns(tuple(kinds), 512, 11)
    (exact,) = apply(row, inputs, False)
    (noisy,) = apply(row, inputs, False, Options(noise=1.0))
    assert (noisy,) == tuple(apply(row, inputs, False, Options(noise=1.0)))
    assert sum(a != b for a, b in zip(exact, noisy, strict=True)) > 50
    largest = 0.0
    for operands, bits in zip(zip(*inputs, strict=True), noisy, strict=True):
        x = [as_float(v, "f32") for v in operands]
        if function is None:
            want = as_float(ptx_floats.arithmetic("div", "f64")(*(ptx_floats.from_float(v, "f64") for v in x)), "f64")
        else:
            want = function(x[0])
        got = as_float(bits, "f32")
        near_one = name.startswith("lg2") and 0.5 < x[0] < 2
        if any(0 < abs(v) < 2.0**-126 for v in x):
            continue  # flushed or not, by the modifier
        if math.isnan(want) or math.isinf(want) or (want == 0 and not near_one):
            assert got == want or (math.isnan(want) and math.isnan(got)), operands
        elif near_one or 2.0**-125 < abs(want) < 2.0**127:
            error = abs(got - want) / (1.0 if near_one else abs(want))
            assert error <= bound + 2.0**-24, operands
            largest = max(largest, error)
    assert largest > 0.8 * bound


def test_noise_is_not_in_exact_instructions():
    for name, kinds in (
        ("add.f32", "f32 f32"),
        ("div.rn.f32", "f32 f32"),
        ("sqrt.rn.f32", "f32"),
        ("rcp.rn.f32", "f32"),
    ):
        row = Row(name, "f32", kinds, lambda *a: 0)
        inputs = columns(tuple(kinds.split()), 512, 12)
        assert apply(row, inputs, False) == apply(row, inputs, False, Options(noise=1.0))


#: 1 + 2**-12 squared is 1 + 2**-11 + 2**-24, which is rounded to 1 + 2**-11.
A, C = 1 + 2.0**-12, -(1 + 2.0**-11)


def contracted(body: str, fuse: bool = True) -> list[float]:
    """The last %f3 of each thread; %f0, %f1 and %f2 are a, c and -c."""
    setup = f"""
        .reg .f32 %f<8>;
        ld.global.f32 %f0, [%d0];
        ld.global.f32 %f1, [%d0+4];
        ld.global.f32 %f2, [%d0+8];
        setp.eq.u32 %p0, %thread, 0;
        {body}
        mad.wide.u32 %d1, %thread, 4, %d1;
        st.global.f32 [%d1], %f3;"""
    out = np.zeros(2, np.float32)
    Program(setup, 2).run(np.array([A, C, -C], np.float32), out, threads=2, options=Options(fuse=fuse))
    return out.tolist()


@pytest.mark.parametrize(
    "body,fused",
    [
        ("mul.f32 %f4, %f0, %f0; add.f32 %f3, %f4, %f1;", 2.0**-24),
        ("mul.f32 %f4, %f0, %f0; add.f32 %f3, %f1, %f4;", 2.0**-24),
        ("mul.f32 %f4, %f0, %f0; sub.f32 %f3, %f4, %f2;", 2.0**-24),
        ("mul.f32 %f4, %f0, %f0; sub.f32 %f3, %f2, %f4;", -(2.0**-24)),
    ],
)
def test_contraction(body, fused):
    """Without rounding modes the sum may use the unrounded product; with a mode on either it may not."""
    assert contracted(body) == [fused] * 2
    assert contracted(body, fuse=False) == [0.0] * 2
    for op in ("mul", "add", "sub"):
        if f"{op}.f32" in body:
            assert contracted(body.replace(f"{op}.f32", f"{op}.rn.f32")) == [0.0] * 2


@pytest.mark.parametrize(
    "between,values",
    [
        ("mov.f32 %f0, %f1;", [0.0, 2.0**-24]),  # a factor that changes in between counts as it was
        ("@%p0 mov.f32 %f0, %f1;", [0.0, 2.0**-24]),
        ("mov.f32 %f4, %f0;", [A + C]),  # another product altogether
    ],
)
def test_contraction_of_what_was(between, values):
    out = contracted(f"mul.f32 %f4, %f0, %f0; {between} add.f32 %f3, %f4, %f1;")
    assert set(out) <= set(values)


def test_contraction_of_a_product_that_some_threads_replace():
    first, second = contracted("mul.f32 %f4, %f0, %f0; @%p0 mov.f32 %f4, %f2; add.f32 %f3, %f4, %f1;")
    assert first == 0.0
    assert second in (0.0, 2.0**-24)
    first, _ = contracted("mov.f32 %f4, %f2; @!%p0 mul.f32 %f4, %f0, %f0; add.f32 %f3, %f4, %f1;")
    assert first == 0.0


def test_contraction_across_a_label():
    """A thread that jumps to the label may have another product."""
    first, second = contracted("mov.f32 %f4, %f2; @%p0 bra HERE; mul.f32 %f4, %f0, %f0; HERE: add.f32 %f3, %f4, %f1;")
    assert first == 0.0
    assert second in (0.0, 2.0**-24)
