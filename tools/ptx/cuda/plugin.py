"""tests/test_cuda_on_cpu.py on what nvcc made, in place of the stand-ins for CUDA's headers:

    python -m pytest -p tools.ptx.cuda.plugin tests/test_cuda_on_cpu.py -k ties

FUSED_KD_PTX names the folder of the build, made where it is not there (build/ptx-cuda by default);
FUSED_KD_PTX_OPTIONS the interpreter's options, as '{"fuse": true}'.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_kd.backends import native_cuda
from tools.ptx import Options
from tools.ptx.cuda.build import ROOT, BuildError, build
from tools.ptx.cuda.driver import Library

LIBRARY = pytest.StashKey[Library]()


def pytest_sessionstart(session: pytest.Session) -> None:
    import cuda_core  # type: ignore[import-not-found]  # tests/cuda_core.py

    torch.set_num_threads(1)
    try:
        path = build(Path(os.environ.get("FUSED_KD_PTX") or ROOT / "build" / "ptx-cuda"))
    except BuildError as problem:
        raise pytest.UsageError(str(problem)) from None
    options = os.environ.get("FUSED_KD_PTX_OPTIONS")
    library = Library(path, Options(**json.loads(options)) if options else None)
    session.config.stash[LIBRARY] = library
    stack = contextlib.ExitStack()
    session.config.add_cleanup(stack.close)
    stack.enter_context(library.patched(native_cuda))
    cuda_core.load = lambda folder: library.core


@pytest.fixture(autouse=True)
def healthy_context(request: pytest.FixtureRequest) -> Any:
    """A test that ruins the context ruins it for itself."""
    yield
    request.config.stash[LIBRARY].reset()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    library = config.stash.get(LIBRARY, None)
    if library is None:
        return
    totals = library.totals
    text = f"nvcc's PTX: {totals.launches} launches of {len(totals.kernels)} kernels in {totals.seconds:.1f} s, "
    terminalreporter.write_line(text + f"{sum(totals.problems.values())} problems")
    for problem, count in totals.problems.items():
        terminalreporter.write_line(f"  {count} times: {problem}")
