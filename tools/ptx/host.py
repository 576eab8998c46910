"""Host time of a call of the Triton backend: ``python -m tools.ptx host``.

Everything runs as on a GPU, Triton's own launcher in C included, except CUDA's driver: libcuda.c replaces it and does
nothing. So nothing is computed, and the driver's own time is missing. Needs a C compiler.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

_SOURCE = Path(__file__).with_name("libcuda.c")
_library: Any = None
#: Calls that are timed beside those of plain tensors: with row weights, and with a teacher's 64 kept classes.
KINDS = ("weight", "topk")


class Taken(NamedTuple):
    """Median microseconds of forward, and of forward and backward (``both``), with the launches of both."""

    launches: int
    forward: float
    both: float


def install() -> None:
    """Make calls on CPU tensors launch kernels on the stand-in driver; call it before any use of Triton."""
    global _library
    folder = tempfile.mkdtemp()
    path = Path(folder) / "libcuda.so.1"
    command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", str(_SOURCE)]
    subprocess.run([*command, "-o", str(path)], check=True)
    _library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # Triton's launcher finds it by its name
    os.environ["TRITON_LIBCUDA_PATH"] = folder

    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver as active

    from tools.ptx.triton import driver

    driver.install()

    class Driver(driver.Driver):
        launcher_cls = nvidia.CudaLauncher

        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()

        def get_current_device(self) -> int:
            return 0

    active.set_active(Driver())


def measure(loss: str, rows: int, classes: int, repeats: int = 300, kind: str = "") -> Taken:
    """Time calls in bfloat16 with reduction="mean", on one thread. ``kind`` is one of :data:`KINDS`, or "" for a call
    of plain tensors."""
    import fused_kd
    from fused_kd import autograd, check, repeated
    from fused_kd.core import checks
    from fused_kd.core.catalogue import LOSSES
    from fused_kd.losses import _topk

    torch.set_num_threads(1)
    student, other, target = check.Case(torch.bfloat16, rows, classes, {}, loss=loss).inputs("cpu")
    others: list[Any] = [] if loss == "tf_kd" else [other.requires_grad_() if loss == "uskd" else other]
    student.requires_grad_()
    options = {"weight": torch.rand(rows)} if kind == "weight" else {}
    if kind == "topk":
        others = [fused_kd.TopK(*other.float().log_softmax(1).topk(64), rest="bucket")]
    function = getattr(fused_kd, LOSSES[loss].function)

    def forward() -> Any:
        return function(student, *others, target, backend="triton", **options)

    def both() -> None:
        forward().backward()
        student.grad = other.grad = None

    with (
        warnings.catch_warnings(),
        mock.patch.object(autograd, "_is_one", _unknown),
        mock.patch.object(_topk, "readable", _unknown),
        mock.patch.object(checks, "readable", _unknown),
        mock.patch.object(repeated, "on_gpu", _known),
    ):
        warnings.simplefilter("ignore")
        for _ in range(20):
            both()
        before = _library.launches()
        both()
        launches = _library.launches() - before
        return Taken(launches, _median(forward, repeats), _median(both, repeats))


def _unknown(_tensor: torch.Tensor) -> bool:
    """Replaces ``_is_one`` and ``readable``, with their answer for a tensor on a GPU. A mock would take longer than a
    launch."""
    return False


def _known(_logits: Any) -> bool:
    """Replaces ``on_gpu`` in the same way."""
    return True


def _median(call: Any, repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(taken)
