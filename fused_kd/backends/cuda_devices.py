"""Which CUDA devices there are. What can run on one need not on the next: a machine may have GPUs of several kinds."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def resolved(device: torch.device | str) -> torch.device:
    """As the tensors of such a device say it: a CUDA device without a number is the current one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def missing(device: torch.device) -> str | None:
    """Why there is no such CUDA device; None if there is."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        return f"no such device: {'there is 1' if count == 1 else f'there are {count}'} here, counted from 0"
    return None


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device: makes it this one, if it is a GPU. Switching takes microseconds, so only
    where it is another."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def named(device: torch.device) -> str:
    """The device and which GPU it is."""
    return f"{device} ({torch.cuda.get_device_name(device)})"
