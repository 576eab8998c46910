"""Every instruction that the compilers emit for the kernels has a test: instructions.txt against the tables."""

from __future__ import annotations

import ptx_corpus
import pytest
import test_ptx_memory
import test_ptx_opcodes
import test_ptx_warps

#: Control flow, which every kernel of these tests has, in test_ptx_faults.py above all.
CONTROL = {"bra", "bra.uni", "ret"}
ROWS = test_ptx_opcodes.ROWS
TESTED = {row.name for row in ROWS} | test_ptx_memory.names() | test_ptx_warps.COVERED | CONTROL


def has_form(name: str, marks: list[str]) -> bool:
    """Whether a row with this name unpacks or packs a vector, has two destinations, or has a guard."""
    texts = [row.text().split(f"{name} ", 1)[-1] for row in ROWS if row.name == name and f"{name} " in row.text()]
    guarded = any("@" in row.text() for row in ROWS if row.name == name)
    tests = {
        "->": any(text.startswith("{{{") for text in texts),
        "<-": any(text.startswith("{d}, {{{") for text in texts),
        "|": any("|" in text for text in texts) or name.startswith("shfl"),
        "?": guarded,
    }
    return all(tests[mark] for mark in marks if mark != "{}")


@pytest.mark.parametrize("entry", ptx_corpus.entries())
def test_has_a_test(entry):
    name, *marks = entry.split()
    assert name in TESTED
    assert has_form(name, marks)


def test_forms_of_a_text():
    text = """
    .visible .entry k(.param .u64 p) .reqntid 128 {
        .reg .b32 %r<4>;
        .loc 1 20 3
    $L1: // a comment: add.f64
        @%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];
        { mov.b64 {%r2, %r3}, %rd2; }
        @!%p2 add.s32 %r1, %r2, %r3;
        mov.b32 %r1, {%rs1, %rs2};
        shfl.sync.idx.b32 %r1|%p1, %r2, 0, 31, -1;
        ld.shared::cta.b32 %r1, [%r2];
        @%p1 bra $L1;
        ret;
    }"""
    assert list(ptx_corpus.forms(text)) == [
        "ld.global.b32",
        "mov.b64 -> {}",
        "add.s32 ?",
        "mov.b32 <- {}",
        "shfl.sync.idx.b32 |",
        "ld.shared::cta.b32",
        "bra",
        "ret",
    ]
