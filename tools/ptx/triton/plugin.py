"""``pytest -p tools.ptx.triton.plugin``: runs compiled PTX in tests that ask for Triton's interpreter.

Options: ``--sm`` chooses the GPU to compile for; ``--ptx-schedule``, ``--ptx-noise`` and ``--ptx-fuse`` are those of
:class:`tools.ptx.Options`.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tools.ptx import pytest_options

_NAME = "tools.ptx.triton.plugin"
# Set before any conftest imports Triton. PYTEST_PLUGINS makes pytest-xdist's workers load this module early enough.
os.environ["TRITON_INTERPRET"] = "0"
os.environ["PYTEST_PLUGINS"] = _NAME


def pytest_addoption(parser: pytest.Parser) -> None:
    group = pytest_options.add(parser)
    group.addoption("--sm", type=int, default=90, help="compute capability to compile for (default: %(default)s)")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    from tools.ptx.triton import driver

    given = early_config.known_args_namespace
    driver.install(given.sm, pytest_options.read(given))


def pytest_sessionfinish(session: pytest.Session) -> None:
    from tools.ptx.triton.driver import session as launched

    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # a worker reports to the controlling process
        output["ptx"] = [len(launched.launches), sum(each.seconds for each in launched.launches), len(launched.modules)]


_workers: Counter[str] = Counter()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    launches, seconds, binaries = getattr(node, "workeroutput", {}).get("ptx", (0, 0.0, 0))
    _workers.update({"launches": launches, "seconds": round(seconds), "binaries": binaries})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from tools.ptx.triton.driver import session as launched

    total = Counter(_workers)
    total["launches"] += len(launched.launches)
    total["seconds"] += round(sum(each.seconds for each in launched.launches))
    total["binaries"] += len(launched.modules)
    terminalreporter.write_line(
        f"compiled PTX: {total['launches']} launches of {total['binaries']} kernels, {total['seconds']} s in them"
    )
