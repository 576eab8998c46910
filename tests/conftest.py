"""Shared by the tests. Triton's kernels run under its interpreter, which must be said before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():  # with a GPU the kernels themselves are tested
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest

from fused_kd import backends, check

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
#: Every fused backend that runs here, with its device.
FUSED = [(name, device) for device in DEVICES for name in check.runnable(device, "nkd")]
ALL = [*FUSED, *(("reference", device) for device in DEVICES)]


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


@pytest.fixture
def native():
    """The native backend's module, restored afterwards."""
    reason = backends.unavailable("native", "cpu")
    if reason:
        pytest.skip(reason)
    from fused_kd.backends import native

    chosen, threads = native.instruction_set, torch.get_num_threads()
    yield native
    native.instruction_set = chosen
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quick_interpreter():
    """What makes Triton's interpreter slow here, replaced: it patches triton.language anew at each call of a helper
    inside a kernel, half of all its time, where once at the kernel itself is enough; and it does the reductions inside
    a sort element by element. Private to Triton, so done only where its parts are as known."""
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    patch = getattr(interpreter, "_patch_lang", None)
    is_builtin = getattr(language.core, "is_builtin", lambda member: False)

    def patch_once(function):
        modules = [value for value in function.__globals__.values() if value is language or value is language.core]
        return patch(function) if any(is_builtin(module.load) for module in modules) else None

    reductions = getattr(interpreter, "ReduceOps", None)
    xor = getattr(language.standard, "_xor_combine", None)
    reduce = getattr(reductions, "apply_impl", None)

    def reduce_quickly(self, values):
        if self.combine_fn is not xor:
            return reduce(self, values)
        result = np.bitwise_xor.reduce(values[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(result, values[0].dtype)

    with pytest.MonkeyPatch.context() as monkeypatch:
        if patch and is_builtin(language.load):
            monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        if reduce and xor is not None:
            monkeypatch.setattr(reductions, "apply_impl", reduce_quickly)
        yield
