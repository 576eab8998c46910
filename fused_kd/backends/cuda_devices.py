"""The CUDA devices of this machine, which may be GPUs of several kinds."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def resolved(device: torch.device | str) -> torch.device:
    """Return a device as its tensors have it: a CUDA device without an index is the current one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def missing(device: torch.device) -> str | None:
    """Return why a CUDA device does not exist, or None if it does."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        return f"no such device: {'there is 1' if count == 1 else f'there are {count}'} here, counted from 0"
    return None


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current device, to which launches go. Switching takes microseconds, so it is skipped if not
    needed."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def named(device: torch.device) -> str:
    """Return the device and the name of its GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})"
