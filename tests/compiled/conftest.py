"""Tests of compiled GPU code on tools/ptx. They need a process in which Triton compiles, so ``make test`` runs them
separately: ``pytest -p tools.ptx.triton.plugin tests/compiled``."""

import sys

import pytest

if "tools.ptx.triton.plugin" not in sys.modules:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def gpu(request):
    """The session of compiled launches, for the compute capability in the test's parameter, or 90."""
    from tools.ptx import Options
    from tools.ptx.triton.driver import session

    capability, options = session.capability, session.options
    session.capability, session.options = getattr(request, "param", 90), Options()
    yield session
    session.capability, session.options = capability, options
