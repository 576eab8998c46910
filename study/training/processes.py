"""This process among all of the run, and its device: a single process, or torchrun's processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar, cast

import torch
from torch import Tensor, distributed

from study.training.errors import RunError

T = TypeVar("T")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Processes:
    """Process ``rank`` of ``world``, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the first process, which writes the files."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            distributed.barrier()

    def first_then_others(self, make: Callable[[], T]) -> T:
        """Call ``make`` in the first process, then in the others, which find the files that the first one wrote."""
        if not self.first:
            self.wait()
        made = make()
        if self.first:
            self.wait()
        return made

    def of_first(self, make: Callable[[], T]) -> T:
        """Call ``make`` in the first process only, as it alone writes files; return its value in all processes."""
        made: list[T | None] = [make() if self.first else None]
        if self.world > 1:
            distributed.broadcast_object_list(made, src=0)
        return cast("T", made[0])

    def summed(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def share(self, total: int) -> tuple[int, int]:
        """Begin and end of this process's part of ``total`` rows."""
        return total * self.rank // self.world, total * (self.rank + 1) // self.world


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join torchrun's processes, by nccl on GPUs and gloo elsewhere, or run as a single process.

    Raises:
        RunError: There is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch sees no CUDA device here")
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local >= torch.cuda.device_count():
        raise RunError(f"--device: {local + 1} processes on this machine, but {torch.cuda.device_count()} CUDA devices")
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    if "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1, place)
        return
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), place)
    finally:
        distributed.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Exit the program; one of several processes skips the interpreter's shutdown.

    DistributedDataParallel keeps the group and so gloo's threads. A thread that releases a Python tensor during the
    interpreter's shutdown aborts the process.
    """
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
