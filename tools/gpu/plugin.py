"""``pytest -p tools.gpu.plugin``: tests that give Triton's kernels CPU tensors, for its interpreter, run them on a GPU.

Each launch takes the storages of its tensors there and back, as aligned as they are; all else is Triton's own. So the
small tiles, odd layouts and planned launches of tests/backends/triton meet the hardware. For a machine with one.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from tools import cpu_tensors

#: Storages begin at a multiple of this many bytes, or as far behind one as on the CPU.
ALIGNMENT = 512


class Carried:
    """Copies on a device of what CPU tensors lie in."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = device
        self.storages: dict[int, tuple[Tensor, Tensor]] = {}

    def there(self, value: Any) -> Any:
        """A tensor that begins at the copy of what ``value`` begins at; what is no CPU tensor as it is."""
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
    """From now on fused_kd's Triton backend takes CPU tensors, and a GPU computes."""
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
    # Before a conftest imports Triton; not for whoever imports this module. And for pytest-xdist's workers.
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["PYTEST_PLUGINS"] = "tools.gpu.plugin"
    install()
