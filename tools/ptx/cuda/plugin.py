"""Runs tests/backends/cuda on nvcc's code instead of the stand-ins for CUDA's headers:

    python -m pytest -p tools.ptx.cuda.plugin tests/backends/cuda -k ties

``--ptx-schedule``, ``--ptx-noise`` and ``--ptx-fuse`` are those of :class:`tools.ptx.Options`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from fused_kd.backends.native import cuda
from tools.ptx import pytest_options
from tools.ptx.cuda.build import ROOT, BuildError, build
from tools.ptx.cuda.driver import Library, Totals

LIBRARY = pytest.StashKey[Library]()


def pytest_addoption(parser: pytest.Parser) -> None:
    pytest_options.add(parser)


def pytest_sessionstart(session: pytest.Session) -> None:
    import cuda_core  # type: ignore[import-not-found]  # tests/support/cuda_core.py

    torch.set_num_threads(1)
    try:
        path = build(ROOT / "build" / "ptx-cuda")
    except BuildError as problem:
        raise pytest.UsageError(str(problem)) from None
    library = Library(path, pytest_options.read(session.config.option))
    session.config.stash[LIBRARY] = library
    stack = contextlib.ExitStack()
    session.config.add_cleanup(stack.close)
    stack.enter_context(library.patched(cuda))
    cuda_core.load = lambda folder: library.core


@pytest.fixture(autouse=True)
def healthy_context(request: pytest.FixtureRequest) -> Any:
    """Reset the context after each test, so that a fault affects one test only."""
    yield
    request.config.stash[LIBRARY].reset()


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    library = session.config.stash.get(LIBRARY, None)
    if output is not None and library is not None:  # a worker reports to the controlling process
        own = library.totals
        output["ptx"] = [own.launches, own.seconds, dict(own.kernels), dict(own.problems)]


_totals = Totals()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    _add(*getattr(node, "workeroutput", {}).get("ptx", (0, 0.0, {}, {})))


def _add(launches: int, seconds: float, kernels: dict[str, int], problems: dict[str, int]) -> None:
    _totals.launches += launches
    _totals.seconds += seconds
    _totals.kernels.update(kernels)
    _totals.problems.update(problems)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    library = config.stash.get(LIBRARY, None)
    if library is None:
        return
    own = library.totals
    _add(own.launches, own.seconds, own.kernels, own.problems)
    text = f"nvcc's PTX: {_totals.launches} launches of {len(_totals.kernels)} kernels in {_totals.seconds:.1f} s, "
    terminalreporter.write_line(text + f"{sum(_totals.problems.values())} problems")
    for problem, count in _totals.problems.items():
        terminalreporter.write_line(f"  {count} times: {problem}")
