"""The CUDA kernels' sources as a module that runs on the CPU (tests/support/cuda_core.py)."""

import cuda_core
import pytest

from fused_kd.backends.native import cuda

MOST_SHARED = 227 * 1024  # of a block, where the GPU has it


@pytest.fixture(scope="session")
def module(tmp_path_factory):
    return cuda_core.load(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture
def core(module, monkeypatch):
    """The module, called with CPU tensors."""
    monkeypatch.setattr(cuda, "_place", lambda device: (0, 0))
    yield module
    module.run_backwards(False)
    module.limit_shared(MOST_SHARED)
