"""The matrix compiles every Triton kernel, and a test compares it with the reference under the interpreter in every
dtype and regime. A new kernel without either fails here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

import fused_kd
from fused_kd import check
from fused_kd.backends import triton as backend
from fused_kd.backends.triton import launch, layout
from fused_kd.backends.triton.plans import common
from fused_kd.core.catalogue import LOSSES
from fused_kd.reference import accumulation_dtype
from tests.support import staged_cases, topk_cases

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(backend.unavailable("cpu") is not None, reason=str(backend.unavailable("cpu")))
HERE = [loss for loss in LOSSES if "triton" in LOSSES[loss].backends["cuda"]]


def clear_caches():
    for member in vars(layout).values():
        if hasattr(member, "cache_clear"):
            member.cache_clear()


@pytest.fixture
def as_long_rows(monkeypatch):
    """Make every row too long for on-chip kernels, with so few threads that a row is several tiles."""
    for name in ("ON_CHIP", "ON_CHIP_MORE", "ON_CHIP_WIDE", "RANKED"):
        monkeypatch.setattr(layout, name, ())
    monkeypatch.setattr(layout, "LOOPED_WARPS", 1)
    clear_caches()
    yield
    clear_caches()


@pytest.fixture
def launched(monkeypatch):
    """Return the names of the kernels that are launched."""
    names = set()

    class Recorded:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            names.add(self.name)
            return self.kernel[grid]

    recorded = {name: Recorded(name, kernel) for name, kernel in launch.kernels().items()}
    monkeypatch.setattr(launch, "kernels", lambda: recorded)
    return names


def compare(loss, dtype, rows=5, classes=70, soft=False):
    """Compare within the budget, for a mean and with an incoming gradient that scales without rounding."""
    case = check.Case(dtype, rows, classes, {**check.OPTIONS[loss][0], "ce_weight": 1.0}, soft=soft, loss=loss)
    two = torch.tensor(2.0, dtype=accumulation_dtype(torch.empty(0, dtype=dtype)))
    outcome = check.compare_inputs("triton", *case.inputs("cpu"), case.options, two, loss)
    assert outcome.passed, (case, outcome)


@interpreted
@pytest.mark.parametrize("loss", HERE)
@pytest.mark.parametrize("dtype", check.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_rows_that_are_walked(as_long_rows, loss, dtype):
    compare(loss, dtype)
    compare(loss, dtype, rows=3, soft=True)


@interpreted
def test_every_kernel_is_run(launched, monkeypatch):
    monkeypatch.setattr(common, "COUNT_ROWS", 4)
    monkeypatch.setattr(common, "CHUNK", 8)
    for regime in (("ON_CHIP", layout.ON_CHIP), ("ON_CHIP", ()), ("RANKED", ())):
        monkeypatch.setattr(layout, *regime)
        clear_caches()
        for loss in HERE:
            compare(loss, torch.float32, rows=20, classes=20)
    clear_caches()
    staged_cases.assert_same(backend, staged_cases.make("js", 20, (9,), standardize=True))
    topk_cases.assert_same(backend, topk_cases.make("kd", "bucket", 20, 3))
    assert launched == {*launch.kernels()}


def test_every_kernel_is_known():
    """Plans launch only functions that backends/triton/launch.py lists, and it lists all kernels."""
    written = set()
    for path in (Path(fused_kd.__file__).parent / "backends" / "triton" / "kernels").glob("*.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        for function in functions:
            if "kernel" in map(ast.unparse, function.decorator_list):
                written.add(function.name)
    assert written == {*launch.kernels()}


@pytest.mark.parametrize("full", (False, True))
def test_every_kernel_is_compiled(full):
    kernel_cases = pytest.importorskip("tools.compile_matrix.cases")
    jobs = kernel_cases.distinct(kernel_cases.CASES, full)
    assert {job.launch.kernel for job in jobs} == {*launch.kernels()}
    covered = {getattr(job.call, "loss", job.loss) for job in jobs}
    assert set(HERE) <= covered


def test_nothing_is_tuned_at_run_time():
    """The table gives a configuration from the call's shape and dtypes only."""
    folder = Path(fused_kd.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        code = re.sub(r'"""[\s\S]*?"""|#.*', "", path.read_text())
        assert not re.search(r"autotune|heuristics|do_bench", code), path.name
    source = (folder / "backends" / "triton" / "layout.py").read_text()
    imports = re.findall(r"^(?:from|import) (\S+)", source, re.MULTILINE)
    assert set(imports) == {"__future__", "functools", "typing"}, "no device, no clock, no environment"
    arguments = {"probabilities": False, "neighbours": True}
    for classes in (2, 100, 1000, 4097, 21841, 128256):
        for wide in (False, True):
            rows = {**arguments, "wide": wide, "unit_temperature": True, "vectors": True}
            answers = []
            for _ in range(2):
                clear_caches()
                answers.append(
                    (
                        layout.row_config(classes, 8 if wide else 2, **rows),
                        layout.uskd_config(classes, wide=wide, **arguments),
                        layout.scale_config(classes),
                    )
                )
            assert answers[0] == answers[1]
            hash(answers[0])  # plain numbers
