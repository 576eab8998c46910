"""Shared by the tests. Triton's kernels run under its interpreter, which must be said before Triton is imported."""

import importlib.util
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core as it is
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # with a GPU the kernels themselves are tested
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter
import pytest

from fused_kd import backends, check

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
#: Every fused backend that runs here, with its device.
FUSED = [(name, device) for device in DEVICES for name in check.runnable(device, "nkd")]
ALL = [*FUSED, *(("reference", device) for device in DEVICES)]


def pytest_configure():
    """Without the C++ core most tests would be skipped, and the rest say little about fused_kd."""
    reason = backends.unavailable("native", "cpu")
    if reason:
        raise pytest.UsageError(f"there is nothing to test: {reason}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests of CUDA tensors have the mark of what needs a GPU, by which tools/gpu/check.py finds them."""
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params.values()
        if any("cuda" in (value if isinstance(value, tuple) else (value,)) for value in params or ()):
            item.add_marker("gpu")


def _ids(pairs):
    return ["-".join(pair) for pair in pairs]


@pytest.fixture(params=FUSED, ids=_ids(FUSED))
def fused(request):
    """(backend, device) of a fused backend."""
    return request.param


@pytest.fixture(params=ALL, ids=_ids(ALL))
def backend(request):
    """(backend, device) of any backend, the reference included."""
    return request.param


@pytest.fixture(autouse=True)
def seed():
    """Random inputs are a test's own, whichever tests the process has run before."""
    torch.manual_seed(0)


@pytest.fixture
def exact_products(monkeypatch):
    """A head's products as on a CPU without bfloat16 instructions."""
    from fused_kd.backends import heads

    monkeypatch.setattr(heads, "multiplies_bfloat16", lambda: False)


@pytest.fixture
def native():
    """The native backend's module, restored afterwards."""
    from fused_kd.backends import native

    chosen, threads = native.instruction_set, torch.get_num_threads()
    yield native
    native.instruction_set = chosen
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def build():
    """setup.py as a module."""
    pytest.importorskip("setuptools")
    specification = importlib.util.spec_from_file_location("fused_kd_setup", Path(__file__).parent.parent / "setup.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    with pytest.MonkeyPatch.context() as monkeypatch:
        interpreter.quicken(monkeypatch)
        yield
