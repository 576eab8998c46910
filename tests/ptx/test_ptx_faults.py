"""Planted faults, which the interpreter must find, and correct twins, in which it must find nothing."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_programs import Program

from tools.ptx import Fault, Options, Unsupported

SHARED = ".shared .align 16 .b8 buffer[1024];"
SCHEDULES = ("together", "backward")
#: Own cell, the cell of the same lane of the warp beside it, and the end: what was seen goes out.
CELLS = """
        mov.u32 %r0, buffer;
        mad.lo.u32 %r1, %thread, 4, %r0;
        xor.b32 %r2, %thread, 32;
        mad.lo.u32 %r2, %r2, 4, %r0;
        xor.b32 %r3, %thread, 1;
        mad.lo.u32 %r3, %r3, 4, %r0;
        mov.u32 %r9, 0;
        setp.lt.u32 %p1, %thread, 32;
        mad.wide.u32 %d2, %thread, 4, %d0;
"""
END = "\n st.global.u32 [%d2], %r9;"


def run(body: str, *, grid: int = 1, threads: int = 64, schedule: str = "together", words: int = 256, **more):
    out = np.zeros(words, np.uint32)
    program = Program(body, 1, SHARED, **more)
    return program.run(out, grid=grid, threads=threads, options=Options(schedule=schedule)), out


# (name, the racing code, its clean twin)
IN_SHARED_MEMORY = [
    (
        "a warp reads what another writes",
        "st.shared.u32 [%r1], %thread; ld.shared.u32 %r9, [%r2];",
        "st.shared.u32 [%r1], %thread; bar.sync 0; ld.shared.u32 %r9, [%r2];",
    ),
    (
        "two warps write a cell at once",
        "and.b32 %r4, %lane, 31; mad.lo.u32 %r4, %r4, 4, %r0; st.shared.u32 [%r4], %thread;",
        "st.shared.u32 [%r1], %thread;",
    ),
    (
        "two warps write a cell in turn",
        "@%p1 st.shared.u32 [%r0], %r9; @!%p1 st.shared.u32 [%r0], %thread;",
        "@%p1 st.shared.u32 [%r0], %r9; bar.sync 0; @!%p1 st.shared.u32 [%r0], %r9;",
    ),
    (  # as Triton does where a layout has a value in several warps
        "two warps write a cell at once, of different values",
        "mad.lo.u32 %r4, %lane, 4, %r0; add.u32 %r5, %thread, 1; st.shared.u32 [%r4], %r5;",
        "mad.lo.u32 %r4, %lane, 4, %r0; add.u32 %r5, %lane, 1; st.shared.u32 [%r4], %r5;",
    ),
    (
        "a warp overwrites what another has read",
        "st.shared.u32 [%r1], %thread; bar.sync 0; ld.shared.u32 %r9, [%r2]; st.shared.u32 [%r1], %r9;",
        "st.shared.u32 [%r1], %thread; bar.sync 0; ld.shared.u32 %r9, [%r2]; bar.sync 0; st.shared.u32 [%r1], %r9;",
    ),
    (
        "part of a vector",
        """mad.lo.u32 %r4, %lane, 16, %r0; @%p1 st.shared.v4.u32 [%r4], {%r1, %r1, %r1, %r1};
           @!%p1 ld.shared.u32 %r9, [%r4+12];""",
        """mad.lo.u32 %r4, %lane, 16, %r0; @%p1 st.shared.v4.u32 [%r4], {%r1, %r1, %r1, %r1}; bar.sync 0;
           @!%p1 ld.shared.u32 %r9, [%r4+12];""",
    ),
    (
        "a byte of a word",
        """@%p1 st.shared.u32 [%r1], %thread; bar.sync 0; @%p1 st.shared.u8 [%r1+3], %lane;
           @!%p1 ld.shared.u32 %r9, [%r2];""",
        """@%p1 st.shared.u32 [%r1], %thread; bar.sync 0; @%p1 st.shared.u8 [%r1+3], %lane;
           @%p1 ld.shared.u32 %r9, [%r1];""",
    ),
    (
        "a barrier of the warp alone",
        "st.shared.u32 [%r1], %thread; bar.warp.sync -1; ld.shared.u32 %r9, [%r2];",
        "st.shared.u32 [%r1], %thread; bar.warp.sync -1; ld.shared.u32 %r9, [%r3];",
    ),
    (
        "the second round of a loop",
        """mov.u32 %r5, 0;
        AGAIN: st.shared.u32 [%r1], %r5; bar.sync 0; ld.shared.u32 %r9, [%r2];
           add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 2; @%p2 bra AGAIN;""",
        """mov.u32 %r5, 0;
        AGAIN: st.shared.u32 [%r1], %r5; bar.sync 0; ld.shared.u32 %r9, [%r2]; bar.sync 0;
           add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 2; @%p2 bra AGAIN;""",
    ),
    (
        "two warps read before one of them writes",
        "st.shared.u32 [%r1], %thread; bar.sync 0; ld.shared.u32 %r9, [%r0]; @%p1 st.shared.u32 [%r0], %r9;",
        """st.shared.u32 [%r1], %thread; bar.sync 0; ld.shared.u32 %r9, [%r0]; bar.sync 0;
           @%p1 st.shared.u32 [%r0], %r9;""",
    ),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name,racing,clean", IN_SHARED_MEMORY, ids=[row[0] for row in IN_SHARED_MEMORY])
def test_race_in_shared_memory(name, racing, clean, schedule):
    result, _ = run(CELLS + racing + END, schedule=schedule)
    assert any("shared" in problem for problem in result.problems)
    result, _ = run(CELLS + clean + END, schedule=schedule)
    assert not result.problems


# (name, racing code, its clean twin, blocks)
IN_GLOBAL_MEMORY = [
    (
        "two blocks write a cell",
        "mov.u32 %r1, %ctaid.x; st.global.u32 [%d0], %r1;",
        "mov.u32 %r1, %ctaid.x; mad.wide.u32 %d0, %r1, 4, %d0; st.global.u32 [%d0], %r1;",
        2,
    ),
    (
        "a block reads what another writes",
        """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p0, %r1, 0; @%p0 st.global.u32 [%d0], %r1;
           @!%p0 ld.global.u32 %r2, [%d0];""",
        """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p0, %r1, 0; @%p0 st.global.u32 [%d0], %r1;
           @!%p0 ld.global.u32 %r2, [%d0+4];""",
        2,
    ),
    (
        "a block writes what another has read",
        """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p0, %r1, 1; @!%p0 ld.global.u32 %r2, [%d0];
           @%p0 st.global.u32 [%d0], %r1;""",
        "mov.u32 %r1, %ctaid.x; ld.global.u32 %r2, [%d0];",
        2,
    ),
    (
        "blocks share a byte at the edge of their vectors",
        "mov.u32 %r1, %ctaid.x; mad.wide.u32 %d0, %r1, 4, %d0; st.global.u32 [%d0], %r1; ld.global.u8 %r2, [%d0+7];",
        "mov.u32 %r1, %ctaid.x; mad.wide.u32 %d0, %r1, 4, %d0; st.global.u32 [%d0], %r1; ld.global.u8 %r2, [%d0+3];",
        3,
    ),
    (
        "a warp of a block reads what another writes",
        """setp.lt.u32 %p0, %thread, 32; mad.wide.u32 %d1, %lane, 4, %d0; @%p0 st.global.u32 [%d1], %lane;
           @!%p0 ld.global.u32 %r1, [%d1];""",
        """setp.lt.u32 %p0, %thread, 32; mad.wide.u32 %d1, %lane, 4, %d0; @%p0 st.global.u32 [%d1], %lane; bar.sync 0;
           @!%p0 ld.global.u32 %r1, [%d1];""",
        1,
    ),
    (
        "a warp of a block writes what another has read",
        """setp.lt.u32 %p0, %thread, 32; mad.wide.u32 %d1, %lane, 4, %d0; @%p0 ld.global.u32 %r1, [%d1];
           @!%p0 st.global.u32 [%d1], %lane;""",
        """setp.lt.u32 %p0, %thread, 32; mad.wide.u32 %d1, %lane, 4, %d0; @%p0 ld.global.u32 %r1, [%d1]; bar.sync 0;
           @!%p0 st.global.u32 [%d1], %lane;""",
        1,
    ),
    (
        "two warps of a block write a cell in one instruction",
        "mad.wide.u32 %d1, %lane, 4, %d0; st.global.u32 [%d1], %thread;",
        "mad.wide.u32 %d1, %thread, 4, %d0; st.global.u32 [%d1], %thread;",
        1,
    ),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name,racing,clean,grid", IN_GLOBAL_MEMORY, ids=[row[0] for row in IN_GLOBAL_MEMORY])
def test_race_in_global_memory(name, racing, clean, grid, schedule):
    threads = 64 if grid == 1 else 1
    result, _ = run(racing, grid=grid, threads=threads, schedule=schedule)
    assert any("global" in problem for problem in result.problems)
    result, _ = run(clean, grid=grid, threads=threads, schedule=schedule)
    assert not result.problems


@pytest.mark.parametrize("access", ["ld.global.u32 %r1, [{}];", "st.global.u32 [{}], %r1;"])
@pytest.mark.parametrize("offset,inside", [(0, True), (1020, True), (1024, False), (-4, False), (1 << 40, False)])
def test_bounds(access, offset, inside):
    body = f"mov.u32 %r1, 5; add.s64 %d1, %d0, {offset};" + access.format("%d1")
    if inside:
        assert not run(body, threads=1)[0].problems
    else:
        with pytest.raises(Fault):
            run(body, threads=1)


@pytest.mark.parametrize(
    "access", ["ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [{}];", "st.global.v2.u64 [{}], {{%d1, %d1}};"]
)
@pytest.mark.parametrize("offset", [1012, 8, 4])
def test_vectors_that_are_misaligned_or_partly_outside(access, offset):
    text = access.replace("{{", "{").replace("}}", "}")
    assert not run("mov.u64 %d1, 3;" + text.replace("[{}]", "[%d0+1008]"), threads=1)[0].problems
    with pytest.raises(Fault):
        run("mov.u64 %d1, 3;" + text.replace("[{}]", f"[%d0+{offset}]"), threads=1)


def test_a_hole_between_two_arrays():
    """One element past the end is out of bounds, even if another array follows."""
    program = Program("ld.global.u32 %r1, [%d0+64]; st.global.u32 [%d1], %r1;", 2)
    with pytest.raises(Fault):
        program.run(np.zeros(16, np.uint32), np.zeros(16, np.uint32), threads=1)


@pytest.mark.parametrize(
    "access", ["ld.shared.u32 %r1, [%r0+1024];", "st.shared.u32 [%r0+1024], %r0;", "ld.shared.u32 %r1, [%r0+-4];"]
)
def test_bounds_of_shared_memory(access):
    with pytest.raises(Fault):
        run("mov.u32 %r0, buffer;" + access)


@pytest.mark.parametrize("offset", [2, 4])
def test_misaligned_shared_vector(offset):
    with pytest.raises(Fault):
        run(
            f"mov.u32 %r0, buffer; mov.u32 %r1, 0; mov.u32 %r2, 0; st.shared.v2.u32 [%r0+{offset}], {{%r1, %r2}};",
            threads=1,
        )


def test_shared_memory_never_written():
    clean = "st.shared.u32 [%r1], %thread; bar.sync 0; ld.shared.u32 %r9, [%r2];"
    result, out = run(CELLS + clean + END)
    assert not result.problems
    assert out[5] == 5 ^ 32
    result, _ = run(CELLS + "@%p1 st.shared.u32 [%r1], %thread; bar.sync 0; ld.shared.u32 %r9, [%r2];" + END)
    assert any("shared" in problem for problem in result.problems)


def test_part_of_a_word_never_written():
    result, _ = run(CELLS + "st.shared.u16 [%r1], %r9; bar.sync 0; ld.shared.u32 %r9, [%r2];" + END)
    assert result.problems


def test_shuffles_outside_the_mask():
    """Half a warp is present, as the mask says; a distance of 16 leaves it."""
    body = """
        setp.ge.u32 %p0, %lane, 16;
        @%p0 bra END;
        shfl.sync.bfly.b32 %r1, %thread, {}, 31, 0xFFFF;
    END:"""
    assert not run(body.format(8))[0].problems
    problems = run(body.format(16))[0].problems
    assert any("shfl" in problem for problem in problems)


def test_shuffle_of_a_thread_that_its_mask_has_not():
    body = "setp.ge.u32 %p0, %lane, {}; @%p0 bra END; shfl.sync.idx.b32 %r1, %thread, 0, 31, 0xFF; END:"
    assert not run(body.format(8))[0].problems
    assert any("shfl" in problem for problem in run(body.format(16))[0].problems)


def test_shuffle_that_some_of_the_mask_never_reach():
    """The others wait at a barrier of the block, or have returned."""
    late = "setp.ge.u32 %p0, %lane, 16; @%p0 bra WAIT; shfl.sync.bfly.b32 %r1, %thread, 1, 31, -1; WAIT: bar.sync 0;"
    with pytest.raises(Fault, match="deadlock"):
        run(late)
    gone = "setp.ge.u32 %p0, %lane, 16; @%p0 ret; shfl.sync.bfly.b32 %r1, %thread, 1, 31, -1;"
    assert run(gone)[0].problems
    clean = (
        "setp.ge.u32 %p0, %lane, 16; @%p0 bra WAIT; mov.u32 %r1, 1; WAIT: shfl.sync.bfly.b32 %r1, %thread, 1, 31, -1;"
    )
    assert not run(clean)[0].problems


def test_barrier_that_some_threads_never_reach():
    """Part of a warp waits elsewhere. Threads that have returned count as arrived."""
    stuck = """
        setp.lt.u32 %p0, %thread, 8;
        @%p0 bra HERE;
        bar.sync 0;
        bra END;
    HERE:
        shfl.sync.bfly.b32 %r1, %thread, 16, 31, -1;
    END:"""
    with pytest.raises(Fault, match="deadlock"):
        run(stuck)
    assert not run(stuck.replace("thread, 8", "thread, 0"))[0].problems
    assert not run("setp.lt.u32 %p0, %thread, 32; @%p0 ret; bar.sync 0;")[0].problems


def test_barriers_of_two_numbers():
    """Each waits for the whole block."""
    body = "setp.lt.u32 %p0, %thread, 32; @%p0 bra OTHER; bar.sync 0; bra END; OTHER: bar.sync {}; END:"
    assert not run(body.format(0))[0].problems
    with pytest.raises(Fault, match="deadlock"):
        run(body.format(1))


def test_more_threads_than_the_kernel_allows():
    body = "mad.wide.u32 %d0, %thread, 4, %d0; st.global.u32 [%d0], %thread;"
    assert not run(body, threads=64, directives=".maxntid 64, 1, 1")[0].problems
    with pytest.raises(Fault):
        run(body, threads=96, directives=".maxntid 64, 1, 1")


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.u32 %r1, %r2;",
        "add.u33 %r1, %r2, %r3;",
        "add.sideways.u32 %r1, %r2, %r3;",
        "shfl.sync.twist.b32 %r1, %r2, 1, 31, -1;",
        "mul.middle.u32 %r1, %r2, %r3;",
        "cvt.rn.f128.f32 %r1, %r2;",
        "setp.almost.f32 %p1, %r1, %r2;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1}, %d1, %d2, 1, 1, 1, 0, 0;",
    ],
)
def test_unknown_instruction(instruction):
    """Refused by its text and never run as a similar one, even if no thread reaches it."""
    for before in ("", "bra END; "):
        with pytest.raises(Unsupported) as refusal:
            run(f"mov.u32 %r1, 1; mov.u32 %r2, 1; mov.u32 %r3, 1; {before}{instruction} END:")
        assert " ".join(instruction.rstrip(";").split()) in str(refusal.value)


def test_missing_label_and_trap():
    with pytest.raises((Fault, Unsupported, ValueError, KeyError), match="NOWHERE"):
        run("bra NOWHERE;")
    with pytest.raises(Fault, match="trap"):
        run("setp.eq.u32 %p0, %thread, 5; @%p0 trap;")
    assert not run("setp.eq.u32 %p0, %thread, 5000; @%p0 trap;")[0].problems


def test_branches():
    """Loops of different lengths, branches that converge again, and guarded returns."""
    body = """
        mov.u32 %r1, 0;
        mov.u32 %r2, 0;
    AGAIN:
        setp.ge.u32 %p0, %r1, %thread;
        @%p0 bra DONE;
        add.u32 %r2, %r2, %r1;
        add.u32 %r1, %r1, 1;
        bra.uni AGAIN;
    DONE:
        and.b32 %r3, %thread, 1;
        setp.eq.u32 %p1, %r3, 0;
        @%p1 bra EVEN;
        add.u32 %r2, %r2, 1000;
        bra END;
    EVEN:
        add.u32 %r2, %r2, 2000;
    END:
        shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;
        mad.wide.u32 %d0, %thread, 8, %d0;
        setp.eq.u32 %p2, %thread, 7;
        @%p2 ret;
        st.global.v2.u32 [%d0], {%r2, %r4};"""
    result, out = run(body)
    assert not result.problems
    value = [t * (t - 1) // 2 + (1000 if t % 2 else 2000) for t in range(64)]
    want = [[0, 0] if t == 7 else [value[t], value[t ^ 1]] for t in range(64)]
    np.testing.assert_array_equal(out[:128].reshape(64, 2), want)


@pytest.mark.parametrize("written, faults", [(4, 1), (8, 0)])
def test_local_memory_that_nobody_has_written(written, faults):
    """Local memory belongs to a thread, which must write what it reads."""
    body = f"""
        .local .align 8 .b8 mine[16];
        mov.u64 %d4, mine;
        st.local.b{8 * written} [%d4], {"%d0" if written == 8 else "%thread"};
        ld.local.b64 %d5, [%d4];"""
    result = Program(body).run(np.zeros(1, np.uint32))
    assert len(result.problems) == faults
