"""The model of what bounds a kernel (tools/ptx/model.py), and the launches that tools/ptx/host.py measures."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tools.ptx import model

CALL = model.Call("nkd", 4096, 21841)


def kernel(**given):
    fields = {"launches": 1, "blocks": 4096, "threads": 256, "registers": 64, "shared": 32, "counts": {}}
    return model.Kernel("rows_looped", CALL, 90, **{**fields, **given})


@pytest.mark.parametrize(
    ("given", "blocks"),
    [
        ({}, 4),  # 8 warps of 2048 registers: 4 such blocks have all of 65536
        ({"registers": 41}, 5),  # 48 as they are given out
        ({"registers": 32, "threads": 64}, 32),  # no more blocks than that
        ({"registers": 32, "threads": 512}, 4),  # 64 warps
        ({"registers": 255, "threads": 32}, 8),
        ({"registers": 32, "threads": 128, "shared": 100 << 10}, 2),
    ],
)
def test_blocks_of_a_multiprocessor(given, blocks):
    found = kernel(**given)
    assert found.resident == blocks
    assert found.occupancy == blocks * found.threads / 32 / 64


def test_what_bounds():
    """An H200 issues 528 instructions a clock, and moves 4.8e12 bytes a second."""
    counts = {"float instructions": 528e6, "special instructions": 33e6, "load bytes of memory": 4.8e6}
    bounds = kernel(counts=counts).bounds()
    assert bounds["instructions"] == pytest.approx(561 / 528 * 1e6 / 1.98e9)  # the special ones are issued too
    assert bounds["special functions"] == pytest.approx(0.5e6 / 1.98e9)
    assert bounds["memory"] == pytest.approx(1e-6)
    assert kernel(counts=counts).bound == ("instructions", pytest.approx(561 / 528 / 0.5))
    assert kernel(counts=counts, blocks=1).bounds()["instructions"] == pytest.approx(132 * bounds["instructions"])
    assert kernel().bound == ("launch", float("inf"))


def test_what_the_cache_does_not_hold_comes_again():
    sectors = {"load sectors": 1e8, "load bytes of memory": 1.6e9}
    fits, not_so = kernel(counts=sectors, blocks=1 << 20), kernel(counts=sectors, blocks=4096)
    assert fits.bounds()["memory"] == pytest.approx(1.6e9 / 4.8e12)
    assert not_so.bounds()["memory"] == pytest.approx(3.2e9 / 4.8e12)


def test_few_rows_tell_of_many(gpu):
    """Counts of all rows against the line through counts at two smaller numbers of rows."""
    call = model.Call("nkd", 96, 5000)
    wanted = model._run(call, 96, 90)
    model.run(call, 80)  # leaves nothing behind
    found = {each.name: each for each in model.run(call, 90)}
    assert call.run == 32
    assert list(found) == list(wanted) == ["rows_looped", "reduce_parts", "scale_rows"]
    looped, all_of_it = found["rows_looped"], wanted["rows_looped"]
    assert looped.blocks == all_of_it.blocks == 96
    assert looped.registers == all_of_it.registers <= 64
    assert looped.instructions == pytest.approx(all_of_it.instructions, rel=0.02)
    assert looped.counts["load sectors"] == pytest.approx(all_of_it.counts["load sectors"], rel=0.02)
    assert found["reduce_parts"].blocks == 1
    rows = model.rows_of(call, [90], {("rows_looped", call): 1e-3})
    assert rows[0][:3] == ["nkd: rows_looped", "96×5000", "1"]
    assert rows[0][-1] == f"{max(looped.bounds().values()) / 1e-3:.0%}"
    assert gpu.capability == 90
    # As many are run in the place of 4096, but beyond 2048 a kernel counts the rows.
    assert next(iter(model.run(model.Call("nkd", 4096, 5000), 90))).name == "count_chunks"


def test_measured_calls_are_calls():
    known = model.measured()
    wanted = {call for loss in ("nkd", "uskd", "zipf_ls") for call in model.calls([loss])}
    assert {call for _, call in known if call.loss in ("nkd", "uskd", "zipf_ls")} <= wanted


HOST = """
from tools.ptx import host
host.install()
import triton
print(*host.measure("nkd", 5, 100, repeats=31))  # a median that a busy machine moves little
names = []
def note(metadata):
    names.append(metadata.get()["name"])
triton.knobs.runtime.launch_enter_hook.add(note)
host.measure("nkd", 5, 100, repeats=1)
print(*names[:3])
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_launches_reach_the_driver():
    """Through Triton's own launcher, also for calls with a stored plan; and a profiler sees them."""
    done = subprocess.run([sys.executable, "-c", HOST], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures, names = done.stdout.splitlines()
    launches, forward, both = map(float, figures.split())
    assert launches == 3
    assert 0 < forward < both
    assert names.split() == ["rows_on_chip", "reduce_parts", "scale_rows"]
