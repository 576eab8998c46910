"""Triton kernels for CUDA tensors (with ROCm, those of an AMD GPU). Tests also run CPU tensors under Triton's
interpreter.

``plans`` has the launches of each op, which the table in ``layout`` decides. ``launch`` launches them, ``replay``
repeats those of an earlier, similar call, and ``kernels`` has what Triton compiles. Importing this module imports
neither Triton nor these modules; the first call does.
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from typing import Any

import torch

from fused_kd.backends import cuda_devices

#: The oldest NVIDIA GPUs that Triton compiles for: the major number of the compute capability.
OLDEST = 7
#: The module in ``plans`` for each function of this backend.
OPS = {
    "row_loss": "rows",
    "uskd": "uskd",
    "uskd_batch_sums": "uskd",
    "zipf_ls": "zipf_ls",
    "scale_gradient": "scale",
    "row_stage": "staged",
    "topk_loss": "topk",
}


def __getattr__(name: str) -> Any:
    if name in OPS:
        module = importlib.import_module(f"fused_kd.backends.triton.plans.{OPS[name]}")
        globals()[name] = getattr(module, name)  # the import system would take two microseconds of each call
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@lru_cache(maxsize=1)
def _import_failure() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return "triton is not installed: pip install triton" if missing else f"triton cannot be imported: {error}"
    return None


def unavailable(device: torch.device | str) -> str | None:
    kind = torch.device(device).type
    if kind not in ("cuda", "cpu"):
        return f"Triton kernels run CUDA tensors, not {kind} tensors"
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels run CUDA tensors; CPU tensors only under its interpreter (TRITON_INTERPRET=1), for tests"
    failure = _import_failure()
    if failure is not None or kind == "cpu":
        return failure
    device = cuda_devices.resolved(device)
    return cuda_devices.missing(device) or _too_old(device) or _driver_failure()


def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major >= OLDEST or torch.version.hip:
        return None
    return f"Triton needs compute capability {OLDEST}.0, and {cuda_devices.named(device)} has {major}.{minor}"


@lru_cache(maxsize=1)
def _driver_failure() -> str | None:
    """Return why Triton cannot build its small library, which needs a C compiler and the CUDA driver's library."""
    try:
        importlib.import_module("triton.runtime").driver.active.utils  # noqa: B018 - the attribute builds it
    except Exception as error:
        return f"Triton cannot reach the GPU: {error}"
    return None
