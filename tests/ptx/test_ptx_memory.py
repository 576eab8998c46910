"""Loads, stores and atomics of every width in every space."""

from __future__ import annotations

import itertools

import numpy as np
import ptx_corpus
import pytest
from ptx_programs import HEAD, Program, pack_parameters

from tools.ptx import Memory, Module, Options, Unsupported, launch

TYPES = [sign + bits for bits in ("8", "16", "32", "64") for sign in "bus"] + ["f32", "f64"]
SPACES = ("global", "shared", "local")
MATRIX = [
    (space, count, kind)
    for space, count, kind in itertools.product(SPACES, (1, 2, 4, 8), TYPES)
    if count * int(kind[1:]) <= (256 if space == "global" else 128) and (count < 8 or kind[1:] in ("32",))
]
THREADS = 64


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def names() -> set[str]:
    """The loads and stores that this file tests."""
    out = {f"ld.param.{kind}" for kind in TYPES} | {"cvta.to.global.u64"}
    for space, count, kind in MATRIX:
        out |= {f"{op}.{space}.{f'v{count}.' if count > 1 else ''}{kind}" for op in ("ld", "st")}
    return out


def instruction(op: str, space: str, count: int, kind: str, address: str) -> str:
    registers = [f"%x{k}" for k in range(count)]
    value = registers[0] if count == 1 else "{" + ", ".join(registers) + "}"
    name = f"{op}{'.' + space if space else ''}{f'.v{count}' if count > 1 else ''}.{kind}"
    return f"{name} {value}, [{address}];" if op == "ld" else f"{name} [{address}], {value};"


@pytest.mark.parametrize("space,count,kind", MATRIX)
def test_copy(space, count, kind, rng):
    """Each thread moves its own bytes: within global memory, through shared memory, through local memory."""
    size = count * int(kind[1:]) // 8
    registers = f".reg .b{max(int(kind[1:]), 16)} %x<8>;"
    ask = lambda op, where, address: instruction(op, where, count, kind, address)  # noqa: E731
    through = {
        "global": "",
        "shared": f"""
            mov.u32 %r1, buffer;
            mad.lo.u32 %r2, %thread, {size}, %r1;
            {ask("st", "shared", "%r2")}
            bar.sync 0;
            xor.b32 %r3, %thread, 63;
            mad.lo.u32 %r2, %r3, {size}, %r1;
            {ask("ld", "shared", "%r2")}""",
        "local": f"""
            mov.u64 %d4, kept;
            {ask("st", "local", f"%d4+{size}")}
            {" ".join(f"mov.b{max(int(kind[1:]), 16)} %x{k}, 0;" for k in range(count))}
            {ask("ld", "local", f"%d4+{size}")}""",
    }[space]
    body = f"""
        {registers}
        .local .align 16 .b8 kept[64];
        cvta.to.global.u64 %d0, %d0;
        cvta.to.global.u64 %d1, %d1;
        mad.wide.u32 %d2, %thread, {size}, %d0;
        mad.wide.u32 %d3, %thread, {size}, %d1;
        {ask("ld", "global", "%d2")}
        {through}
        {ask("st", "global", "%d3")}"""
    program = Program(body, 2, f".shared .align 16 .b8 buffer[{THREADS * size}];")
    given, taken = rng.integers(0, 256, THREADS * size, np.uint8), np.zeros(THREADS * size, np.uint8)
    result = program.run(given, taken, threads=THREADS)
    assert not result.problems
    want = given.reshape(THREADS, size)
    np.testing.assert_array_equal(taken.reshape(THREADS, size), want[::-1] if space == "shared" else want)


@pytest.mark.parametrize("kind", ["b8", "u8", "s8", "b16", "u16", "s16", "u32", "s32"])
@pytest.mark.parametrize("wide", [32, 64])
def test_wider_registers(kind, wide, rng):
    """A load extends by the sign of its type; a store takes the low bits."""
    if int(kind[1:]) >= wide:
        return
    size = int(kind[1:]) // 8
    body = f"""
        .reg .b{wide} %x;
        mad.wide.u32 %d3, %thread, {size}, %d0;
        ld.global.{kind} %x, [%d3];
        mad.wide.u32 %d3, %thread, {wide // 8}, %d1;
        st.global.b{wide} [%d3], %x;
        mad.wide.u32 %d3, %thread, {size}, %d2;
        st.global.{kind} [%d3], %x;"""
    given = rng.integers(0, 256, 32 * size, np.uint8)
    taken, back = np.zeros(32, f"u{wide // 8}"), np.zeros(32 * size, np.uint8)
    assert not Program(body, 3).run(given, taken, back).problems
    want = given.view(f"{'i' if kind[0] == 's' else 'u'}{size}").astype(f"i{wide // 8}").view(f"u{wide // 8}")
    np.testing.assert_array_equal(taken, want)
    np.testing.assert_array_equal(back, given)


def test_parameters():
    """Each type at its offset, and a structure's members."""
    kinds = ["u64", "u8", "b8", "s16", "u16", "b16", "s32", "u32", "b32", "f32", "f64", "b64", "s64", "s8"]
    lines = [
        f".reg .b{max(int(k[1:]), 16)} %x{n}; ld.param.{k} %x{n}, [p{n}]; st.global.{k} [%d0+{8 * n}], %x{n};"
        for n, k in enumerate(kinds)
    ]
    at = 8 * len(kinds)
    more = f"""
        ld.param.u64 %d1, [s+8]; st.global.u64 [%d0+{at}], %d1;
        ld.param.u32 %r1, [s+4]; st.global.u32 [%d0+{at + 8}], %r1;
        ld.param.v2.u32 {{%r2, %r3}}, [s]; st.global.u32 [%d0+{at + 12}], %r3;"""
    parameters = ", ".join(f".param .{k} p{n}" for n, k in enumerate(kinds))
    text = f"""{HEAD}.visible .entry k({parameters}, .param .align 8 .b8 s[24])
        {{ .reg .b64 %d<4>; .reg .b32 %r<4>; ld.param.u64 %d0, [p0]; {" ".join(lines)} {more} ret; }}"""
    module, memory, out = Module(text), Memory(), np.zeros(at + 16, np.uint8)
    function = module.functions["k"]
    assert [offset for _, offset, _ in function.params] == [0, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    assert function.param_bytes == 88
    values = [
        memory.add(out),
        *(0x0102030405060708 + 0x11 * n & (1 << int(k[1:])) - 1 for n, k in enumerate(kinds[1:])),
    ]
    structure = bytes(range(100, 124))
    data = pack_parameters(function, [*values, structure])
    assert not launch(module, "k", memory, (1, 1, 1), (1, 1, 1), 0, data, Options()).problems
    for n, (kind, value) in enumerate(zip(kinds, values, strict=True)):
        assert int.from_bytes(out[8 * n : 8 * n + int(kind[1:]) // 8].tobytes(), "little") == value, kind
    assert out[at : at + 16].tobytes() == structure[8:16] + structure[4:8] + structure[4:8]


def test_generic_addresses():
    """A generic address of shared or local memory works in a plain load."""
    body = """
        .local .align 8 .b8 mine[16];
        .reg .b64 %g<8>;
        mov.u64 %g0, buffer;
        cvta.shared.u64 %g0, %g0;
        mad.wide.u32 %g0, %thread, 4, %g0;
        mad.lo.u32 %r0, %thread, 3, 7;
        st.u32 [%g0], %r0;
        mov.u64 %g1, mine;
        cvta.local.u64 %g1, %g1;
        st.u32 [%g1+4], %r0;
        bar.sync 0;
        ld.u32 %r1, [%g0];
        ld.u32 %r2, [%g1+4];
        cvta.to.shared.u64 %g2, %g0;
        ld.shared.u32 %r3, [%g2];
        mad.wide.u32 %d0, %thread, 16, %d0;
        st.v2.u32 [%d0], {%r1, %r2};
        st.u32 [%d0+8], %r3;"""
    out = np.zeros((32, 4), np.uint32)
    assert not Program(body, 1, ".shared .align 16 .b8 buffer[128];").run(out).problems
    np.testing.assert_array_equal(out[:, :3], np.repeat(3 * np.arange(32)[:, None] + 7, 3, 1))


def test_dynamic_shared_memory():
    """It follows the static shared memory, and has the launch's size."""
    body = """
        mad.lo.u32 %r0, %thread, 4, 0;
        mov.u32 %r1, fixed;
        add.u32 %r1, %r1, %r0;
        mov.u32 %r2, rest;
        add.u32 %r2, %r2, %r0;
        st.shared.u32 [%r1], %thread;
        st.shared.u32 [%r2+128], %r0;
        ld.shared.u32 %r3, [%r1];
        ld.shared.u32 %r4, [%r2+128];
        add.u32 %r3, %r3, %r4;
        mad.wide.u32 %d0, %thread, 4, %d0;
        st.global.u32 [%d0], %r3;"""
    declared = ".shared .align 16 .b8 fixed[128];\n.extern .shared .align 16 .b8 rest[];"
    out = np.zeros(32, np.uint32)
    assert not Program(body, 1, declared).run(out, shared=256).problems
    np.testing.assert_array_equal(out, 5 * np.arange(32))


def test_constants_of_a_module():
    declared = ".global .align 4 .b8 table[8] = {1, 0, 0, 0, 255, 1, 0, 0};\n.global .align 4 .u32 words[2] = {7, 9};"
    body = """
        ld.global.u32 %r0, [table+4];
        mov.u64 %d1, words;
        ld.global.u32 %r1, [%d1+4];
        add.u32 %r0, %r0, %r1;
        st.global.u32 [%d0], %r0;"""
    out = np.zeros(4, np.uint32)
    assert not Program(body, 1, declared).run(out, threads=1).problems
    assert out[0] == 511 + 9


def test_guarded_accesses():
    """Threads with the guard off access nothing, whatever their address, and keep the register."""
    body = """
        setp.lt.u32 %p0, %thread, 8;
        mov.b32 %r0, 77;
        mad.wide.u32 %d2, %thread, 4096, 0;
        @%p0 mad.wide.u32 %d2, %thread, 4, %d0;
        @%p0 ld.global.b32 { %r0 }, [ %d2 + 0 ];
        @!%p0 add.s32 %r0, %r0, 1;
        mad.wide.u32 %d3, %thread, 4, %d1;
        st.global.b32 [ %d3 + 0 ], { %r0 };"""
    given, out = np.arange(100, 108, dtype=np.uint32), np.zeros(32, np.uint32)
    assert not Program(body, 2).run(given, out).problems
    np.testing.assert_array_equal(out, [*given, *[78] * 24])


ATOMICS = {
    "add.u32": lambda x, y: x + y & 0xFFFFFFFF,
    "add.u64": lambda x, y: x + y & (1 << 64) - 1,
    "min.u32": min,
    "max.u32": max,
    "and.b32": lambda x, y: x & y,
    "or.b32": lambda x, y: x | y,
    "xor.b32": lambda x, y: x ^ y,
    "exch.b32": lambda x, y: y,
    "inc.u32": lambda x, y: 0 if x >= y else x + 1,
    "dec.u32": lambda x, y: y if x == 0 or x > y else x - 1,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name", [*ATOMICS, "cas.b32"])
def test_atomics(space, name, rng):
    """All threads on one cell: each sees a value that some order of them gives."""
    kind = name.split(".")[1]
    full = f"atom.{space}.{name}"
    r, wide = ("%d4", 8) if kind.endswith("64") else ("%r4", 4)
    read = "%d5" if wide == 8 else "%r5"
    second = f", {r}" if name == "cas.b32" else ""
    value = "0" if name == "cas.b32" else r
    body = f"""
        mad.wide.u32 %d2, %thread, {wide}, %d0;
        ld.global.b{8 * wide} {r}, [%d2];
        mov.u64 %d3, cell;
        setp.eq.u32 %p0, %thread, 0;
        mov.u32 %r0, 0;
        @%p0 st.shared.u32 [cell], %r0;
        @%p0 st.shared.u32 [cell+4], %r0;
        bar.sync 0;
        {full} {read}, [{"%d3" if space == "shared" else "%d1"}], {value}{second};
        bar.sync 0;
        mad.wide.u32 %d2, %thread, {wide}, %d0;
        st.global.b{8 * wide} [%d2], {read};
        @!%p0 bra END;
        ld.shared.b{8 * wide} {read}, [cell];
        {f"st.global.b{8 * wide} [%d1], {read};" if space == "shared" else ""}
    END:"""
    given = rng.integers(1, 1 << 20, 64, f"u{wide}")
    seen, cell = given.copy(), np.zeros(2, f"u{wide}")
    try:
        result = Program(body, 2, ".shared .align 16 .b8 cell[16];").run(seen, cell, threads=64)
    except Unsupported:
        if full in {entry.split()[0] for entry in ptx_corpus.entries()}:
            raise
        return
    assert not result.problems
    if name == "cas.b32":
        assert sorted(seen) == sorted([0] + [cell[0]] * 63) and cell[0] in given
        return
    # One order that explains what was seen: the lanes in turn, which is what an interpreter does.
    state, wants = 0, []
    for y in map(int, given):
        wants.append(state)
        state = ATOMICS[name](state, y)
    assert cell[0] == state
    np.testing.assert_array_equal(seen, np.array(wants, seen.dtype))
