"""Shared by the tests of the benchmark: what it does beside the calls takes next to no time."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last, so that it cannot shadow an installed fused_kd


@pytest.fixture(scope="session", autouse=True)
def small_work():
    pytest.importorskip("numpy")
    from benchmarks.measure import caches, timing

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing.COPY_BYTES, "cpu", 2**20)
        patch.setattr(caches, "STREAMED_BYTES", 2**20)
        patch.setattr(caches, "TARGET", 1e-3)
        patch.setattr(caches, "COLD_BLOCK", 1e-3)
        yield
