"""Launches of Triton's kernels: what a plan lists, and how to run it. The first launch imports the kernels."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd.backends import cuda_devices
from fused_kd.backends.triton import layout


class Launch(NamedTuple):
    """One kernel launch: ``kernel`` names a Triton function of the kernels' modules, or one of ``HOST``."""

    kernel: str
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def planned(kernel: str, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """Return a launch without fused multiply-adds. A compiler fuses in some places and not in others. Then equal logits
    get different keys, probabilities differ from those in the moments, and the lanes of a reduction end with different
    sums, since each fuses its own product but gets its neighbour's rounded. This costs NKD 4 % more instructions. The
    option is always explicit, because Triton's default changes with its releases."""
    return Launch(kernel, programs, arguments, {**options, "enable_fp_fusion": False})


@lru_cache(maxsize=1)
def kernels() -> dict[str, Any]:
    """Return the kernels by name, from all modules that have any."""
    for name in ("on_chip", "looped", "columns", "reductions", "uskd", "uskd_streamed", "zipf_ls", "staged", "topk"):
        importlib.import_module(f"fused_kd.backends.triton.kernels.{name}")
    known: dict[str, Any] = importlib.import_module("fused_kd.backends.triton.kernels.rows").KERNELS
    return known


def _sort_rows(keys: Tensor, values: Tensor, order: Tensor) -> None:
    torch.sort(keys, dim=1, descending=True, stable=True, out=(values, order))


#: PyTorch functions that a plan may call between its launches.
HOST = {"sort_rows": _sort_rows}


@lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> layout.Gpu:
    """Return the GPU of a device. CPU tensors run under an interpreter, with the options of an NVIDIA GPU."""
    if device.type != "cuda" or not torch.version.hip:
        return layout.NVIDIA
    return layout.Gpu(torch.cuda.get_device_properties(device).warp_size, False)


def run(launches: list[Launch], device: torch.device) -> list[Any]:
    """Launch on the tensors' device, in its current stream. Return the compiled kernels, or None for ones without."""
    known, gpu = kernels(), gpu_of(device)
    with cuda_devices.current(device):
        return [
            HOST[kernel](*arguments)
            if kernel in HOST
            else known[kernel][(programs,)](*arguments, **layout.fitted(options, gpu))
            for kernel, programs, arguments, options in launches
        ]


@lru_cache(maxsize=1)
def acc_types() -> dict[torch.dtype, Any]:
    language = importlib.import_module("triton.language")
    return {torch.float32: language.float32, torch.float64: language.float64}
