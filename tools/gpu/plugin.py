"""``pytest -p tools.gpu.plugin``: runs tests on a GPU that give Triton's kernels CPU tensors for its interpreter.

Each launch copies the storages of its tensors to the GPU and back, with the same alignment; the rest is Triton's own
code. So the small tiles, odd layouts and planned launches of tests/backends/triton run on hardware.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from tools import cpu_tensors

#: Copies of storages keep their addresses modulo this many bytes.
ALIGNMENT = 512


class Carried:
    """Copies of CPU tensors' storages on a device."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = device
        self.storages: dict[int, tuple[Tensor, Tensor]] = {}

    def there(self, value: Any) -> Any:
        """The copy of a CPU tensor, starting at its first element; other values unchanged."""
        if not (isinstance(value, Tensor) and value.device.type == "cpu"):
            return value
        storage = value.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        if start not in self.storages:
            held = torch.empty(0, dtype=torch.uint8).set_(storage)
            room = torch.empty(size + 2 * ALIGNMENT, dtype=torch.uint8, device=self.device)
            begin = (start - room.data_ptr()) % ALIGNMENT
            copy = room[begin : begin + size]
            copy.copy_(held)
            self.storages[start] = held, room[begin:]
        return self.storages[start][1][value.data_ptr() - start :]

    def back(self) -> None:
        for held, copy in self.storages.values():
            held.copy_(copy[: held.numel()])


def install() -> None:
    """Make fused_kd's Triton backend accept CPU tensors and compute on a GPU."""
    from triton.runtime import driver

    original = driver.active.launcher_cls

    class Launcher(original):  # type: ignore[misc, valid-type]
        def __call__(self, *arguments: Any) -> None:
            carried = Carried()
            super().__call__(*map(carried.there, arguments))
            carried.back()

    driver.active.launcher_cls = Launcher
    cpu_tensors.admit()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    # Set before a conftest imports Triton, but not on import of this module. Pytest-xdist's workers inherit both.
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["PYTEST_PLUGINS"] = "tools.gpu.plugin"
    install()
