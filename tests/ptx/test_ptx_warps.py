"""Operations of a warp or a block: shuffles, votes, reductions, matrices, barriers."""

from __future__ import annotations

import functools
import operator

import numpy as np
import ptx_corpus
import ptx_floats
import pytest
from ptx_numbers import agrees, columns
from ptx_programs import Program

from tools.ptx import Unsupported

FULL = 0xFFFFFFFF


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def run(body: str, *arrays: np.ndarray, threads: int = 64, declarations: str = ""):
    """Return None if the interpreter refuses an instruction that the kernels do not use."""
    try:
        result = Program(body, len(arrays), declarations).run(*arrays, threads=threads)
    except Unsupported as error:
        if any(f"{entry.split()[0]} " in str(error) for entry in ptx_corpus.entries()):
            raise
        return None
    assert not result.problems, result.problems
    return result


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The source lane, and whether it is in range, as the PTX manual defines them."""
    bound, segment, b = c & 31, c >> 8 & 31, b & 31
    top = (lane & segment) | (bound & ~segment & 31)
    low = lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segment & 31)}[mode]
    inside = source >= top if mode == "up" else source <= top
    return (source if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("segment", [32, 16, 8, 2, 1])
def test_shuffle(mode, segment, rng):
    """With a distance per lane, and one for all; with and without the predicate."""
    bound = 0 if mode == "up" else 31
    c = (32 - segment) << 8 | bound
    body = f"""
        mad.wide.u32 %d4, %thread, 4, %d0;
        ld.global.u32 %r0, [%d4];
        mad.wide.u32 %d4, %thread, 4, %d1;
        ld.global.u32 %r1, [%d4];
        shfl.sync.{mode}.b32 %r2|%p0, %r0, %r1, {c}, -1;
        shfl.sync.{mode}.b32 %r3, %r0, 3, {c}, 0xffffffff;
        selp.u32 %r4, 1, 0, %p0;
        mad.wide.u32 %d4, %thread, 16, %d2;
        st.global.v4.u32 [%d4], {{%r2, %r3, %r4, %r0}};"""
    # The source may be any lane: outside the segment it is the lane itself.
    values, distance = rng.integers(0, 1 << 32, 64, np.uint32), rng.integers(0, 40, 64).astype(np.uint32)
    out = np.zeros((64, 4), np.uint32)
    run(body, values, distance, out)
    for thread in range(64):
        first, lane = thread & 32, thread & 31
        own, inside = shuffled(mode, lane, int(distance[thread]), c)
        assert out[thread, 0] == values[first + own] and out[thread, 2] == inside
        assert out[thread, 1] == values[first + shuffled(mode, lane, 3, c)[0]]


def test_shuffle_of_some():
    """A mask of the even lanes, the only ones present."""
    body = """
        and.b32 %r0, %lane, 1;
        setp.ne.u32 %p0, %r0, 0;
        mov.u32 %r2, 0;
        @%p0 bra END;
        shfl.sync.bfly.b32 %r2, %thread, 2, 31, 0x55555555;
    END:
        mad.wide.u32 %d0, %thread, 4, %d0;
        st.global.u32 [%d0], %r2;"""
    out = np.zeros(64, np.uint32)
    run(body, out)
    np.testing.assert_array_equal(out, [0 if t % 2 else t ^ 2 for t in range(64)])


REDUCTIONS = {
    "add": operator.add,
    "min": min,
    "max": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}


@pytest.mark.parametrize(
    "name",
    [f"{op}.{kind}" for op in ("add", "min", "max") for kind in ("s32", "u32")] + ["and.b32", "or.b32", "xor.b32"],
)
@pytest.mark.parametrize("mask", [FULL, 0xFFFF])
def test_reduction(name, mask, rng):
    op, kind = name.split(".")
    body = f"""
        mad.wide.u32 %d0, %thread, 4, %d0;
        ld.global.b32 %r0, [%d0];
        setp.gt.u32 %p0, %lane, {31 if mask == FULL else 15};
        @%p0 bra END;
        redux.sync.{op}.{kind} %r0, %r0, {mask};
        st.global.b32 [%d0], %r0;
    END:"""
    values = rng.integers(0, 1 << 32, 64, np.uint32)
    typed = values.view(np.int32) if kind == "s32" else values
    want = values.copy()
    count = 32 if mask == FULL else 16
    for first in (0, 32):
        whole = functools.reduce(REDUCTIONS[op], map(int, typed[first : first + count]))
        want[first : first + count] = whole & FULL
    assert run(body, values)
    np.testing.assert_array_equal(values, want)


@pytest.mark.parametrize("op", ["min", "max"])
@pytest.mark.parametrize("modifier", ["", ".NaN"])
def test_reduction_of_floats(op, modifier):
    body = f"""
        mad.wide.u32 %d0, %thread, 4, %d0;
        ld.global.b32 %r0, [%d0];
        redux.sync.{op}{modifier}.f32 %r0, %r0, -1;
        st.global.b32 [%d0], %r0;"""
    given = columns(("f32",), 512, 3)[0][:64] + [0x7FC00001] * 32 + [0x3F800000, 0xBF800000, 0x7FC00001, 5] * 8
    values = np.array(given, np.uint32)
    if run(body, values, threads=128) is None:
        return
    extreme = ptx_floats.extreme(op, "f32", modifier == ".NaN")
    for first in range(0, 128, 32):
        want = functools.reduce(extreme, given[first : first + 32])
        assert {agrees(int(v), want, "f32") for v in values[first : first + 32]} == {True}


def test_votes(rng):
    body = """
        mad.wide.u32 %d2, %thread, 4, %d0;
        ld.global.u32 %r0, [%d2];
        setp.ne.u32 %p0, %r0, 0;
        vote.sync.ballot.b32 %r1, %p0, -1;
        vote.sync.any.pred %p1, %p0, -1;
        vote.sync.all.pred %p2, %p0, -1;
        vote.sync.uni.pred %p3, %p0, -1;
        vote.sync.ballot.b32 %r5, !%p0, -1;
        selp.u32 %r2, 1, 0, %p1;
        selp.u32 %r3, 2, 0, %p2;
        selp.u32 %r4, 4, 0, %p3;
        or.b32 %r2, %r2, %r3;
        or.b32 %r2, %r2, %r4;
        mad.wide.u32 %d2, %thread, 8, %d1;
        st.global.v2.u32 [%d2], {%r1, %r2};"""
    given = np.concatenate([np.zeros(32), np.ones(32), rng.integers(0, 2, 32), rng.integers(0, 2, 32)]).astype(
        np.uint32
    )
    out = np.zeros((128, 2), np.uint32)
    if run(body, given, out, threads=128):
        for first in range(0, 128, 32):
            warp = given[first : first + 32]
            flags = int(warp.any()) + 2 * int(warp.all()) + 4 * int(warp.all() or not warp.any())
            assert set(out[first : first + 32, 0]) == {sum(int(v) << k for k, v in enumerate(warp))}
            assert set(out[first : first + 32, 1]) == {flags}


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_match(kind, rng):
    bits = int(kind[1:])
    register = "%r0" if bits == 32 else "%d3"
    body = f"""
        mad.wide.u32 %d2, %thread, {bits // 8}, %d0;
        ld.global.{kind} {register}, [%d2];
        match.any.sync.{kind} %r1, {register}, -1;
        mad.wide.u32 %d2, %thread, 4, %d1;
        st.global.u32 [%d2], %r1;"""
    given = rng.integers(0, 5, 64, f"u{bits // 8}") << np.array(bits - 4, f"u{bits // 8}")
    out = np.zeros(64, np.uint32)
    if run(body, given, out):
        same = given.reshape(2, 1, 32) == given.reshape(2, 32, 1)
        np.testing.assert_array_equal(out, (same << np.arange(32)).sum(-1).reshape(-1))


def test_masks_and_elected():
    """activemask under a branch, elect, a barrier of one warp, the lane masks, and brev of them."""
    body = """
        mov.u32 %r6, 0;
        setp.lt.u32 %p0, %lane, 12;
        @%p0 bra SOME;
        bra.uni END;
    SOME:
        activemask.b32 %r0;
        elect.sync _|%p1, 0xFFF;
        bar.warp.sync 0xFFF;
        selp.u32 %r1, 1, 0, %p1;
        mov.u32 %r2, %lanemask_lt;
        mov.u32 %r3, %lanemask_ge;
        mad.wide.u32 %d0, %thread, 16, %d0;
        st.global.v4.u32 [%d0], {%r0, %r1, %r2, %r3};
    END:
        bar.warp.sync -1;"""
    out = np.zeros((64, 4), np.uint32)
    if run(body, out):
        for thread in range(64):
            lane = thread % 32
            below = (1 << lane) - 1
            want = [0xFFF, lane == 0, below, FULL ^ below] if lane < 12 else [0] * 4
            assert out[thread].tolist() == want


@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices(count, transposed, rng):
    """Eight rows of eight: lane i has elements 2i and 2i + 1, by rows or by columns; stored and loaded."""
    registers = "{" + ", ".join(f"%r{k}" for k in range(count)) + "}"
    body = f"""
        mad.wide.u32 %d2, %thread, 16, %d0;
        ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%d2];
        mov.u32 %r20, buffer;
        mad.lo.u32 %r21, %thread, 16, %r20;
        st.shared.v4.u32 [%r21], {{%r10, %r11, %r12, %r13}};
        bar.sync 0;
        mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 0;
        ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {registers}, [%r21];
        mad.wide.u32 %d2, %thread, 16, %d1;
        st.global.v4.u32 [%d2], {{%r0, %r1, %r2, %r3}};
        stmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 [%r21+512], {registers};
        bar.sync 0;
        ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r21+512];
        mad.wide.u32 %d2, %thread, 16, %d0;
        setp.ge.u32 %p0, %lane, {8 * count};
        @%p0 bra END;
        st.global.v4.u32 [%d2], {{%r10, %r11, %r12, %r13}};
    END:"""
    given = rng.integers(0, 1 << 16, (4, 8, 8), np.uint16)
    stays, out = given.copy(), np.zeros((32, 4), np.uint32)
    declared = ".shared .align 16 .b8 buffer[1024];"
    body = body.replace("ld.shared.v4.u32", f"setp.lt.u32 %p1, %lane, {8 * count};\n @%p1 ld.shared.v4.u32")
    if run(body, stays, out, threads=32, declarations=declared) is None:
        return
    for k in range(count):
        matrix = given[k].T if transposed else given[k]
        np.testing.assert_array_equal(
            out[:, k],
            matrix.reshape(-1).view(np.uint32)
            if not transposed
            else np.ascontiguousarray(matrix).reshape(-1).view(np.uint32),
        )
    assert not out[:, count:].any()
    np.testing.assert_array_equal(stays, given)


@pytest.mark.parametrize("op", ["and", "or", "popc"])
def test_barrier_that_reduces(op, rng):
    kind, target = ("u32", "%r1") if op == "popc" else ("pred", "%p1")
    body = f"""
        mad.wide.u32 %d2, %thread, 4, %d0;
        ld.global.u32 %r0, [%d2];
        setp.ne.u32 %p0, %r0, 0;
        bar.red.{op}.{kind} {target}, 0, %p0;
        {"" if op == "popc" else "selp.u32 %r1, 1, 0, %p1;"}
        st.global.u32 [%d2], %r1;"""
    for given in (np.zeros(96), np.ones(96), rng.integers(0, 2, 96)):
        values = given.astype(np.uint32)
        want = {"and": int(given.all()), "or": int(given.any()), "popc": int(given.sum())}[op]
        if run(body, values, threads=96):
            assert set(values) == {want}


@pytest.mark.parametrize(
    "barrier", ["bar.sync 0;", "bar.sync 0, 128;", "barrier.sync 0;", "barrier.sync.aligned 0;", "barrier.cta.sync 1;"]
)
def test_barriers(barrier):
    """Through shared memory and a loop: every thread sees what the others wrote before the barrier."""
    body = f"""
        mov.u32 %r1, buffer;
        mad.lo.u32 %r2, %thread, 4, %r1;
        xor.b32 %r3, %thread, 96;
        mad.lo.u32 %r3, %r3, 4, %r1;
        mov.u32 %r4, %thread;
        mov.u32 %r5, 0;
    AGAIN:
        st.shared.u32 [%r2], %r4;
        {barrier}
        ld.shared.u32 %r4, [%r3];
        {barrier}
        add.u32 %r4, %r4, 1;
        add.u32 %r5, %r5, 1;
        setp.lt.u32 %p0, %r5, 3;
        @%p0 bra AGAIN;
        mad.wide.u32 %d0, %thread, 4, %d0;
        st.global.u32 [%d0], %r4;"""
    out = np.zeros(128, np.uint32)
    if run(body, out, threads=128, declarations=".shared .align 4 .b8 buffer[512];"):
        np.testing.assert_array_equal(out, (np.arange(128) ^ 96) + 3)


COVERED = {
    *(f"shfl.sync.{mode}.b32" for mode in ("up", "down", "bfly", "idx")),
    *(f"redux.sync.{op}.{kind}32" for op in ("add", "min", "max") for kind in "su"),
    *(f"redux.sync.{op}.b32" for op in ("and", "or", "xor")),
    *(f"redux.sync.{op}.f32" for op in ("min", "max", "min.NaN", "max.NaN")),
    *(f"vote.sync.{op}" for op in ("ballot.b32", "any.pred", "all.pred", "uni.pred")),
    *(
        f"{op}matrix.sync.aligned.m8n8.x{n}{way}.shared.b16"
        for op in ("ld", "st")
        for n in "124"
        for way in ("", ".trans")
    ),
    *("match.any.sync.b32", "match.any.sync.b64", "activemask.b32", "elect.sync", "bar.warp.sync"),
    *("bar.red.and.pred", "bar.red.or.pred", "bar.red.popc.u32", "bar.sync", "barrier.sync", "barrier.cta.sync"),
}
