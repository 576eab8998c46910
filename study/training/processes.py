"""Which process this is, of how many, and its device: one process, or those that torchrun starts."""

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
    """This process's number ``rank`` of ``world``, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """This is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            distributed.barrier()

    def first_then_others(self, make: Callable[[], T]) -> T:
        """What ``make`` returns; the others call it once the first process is done, and find what that wrote."""
        if not self.first:
            self.wait()
        made = make()
        if self.first:
            self.wait()
        return made

    def of_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process, in all of them: of what only that one writes."""
        made: list[T | None] = [make() if self.first else None]
        if self.world > 1:
            distributed.broadcast_object_list(made, src=0)
        return cast("T", made[0])

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def share(self, total: int) -> tuple[int, int]:
        """Begin and end of this process's part of ``total`` rows."""
        return total * self.rank // self.world, total * (self.rank + 1) // self.world


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join torchrun's processes, by nccl on GPUs and gloo elsewhere, or be the only one.

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
    """End the program; one process of several at once, without the interpreter's own clearing up.

    DistributedDataParallel keeps the group and so gloo's threads, and one of them that lets go of a tensor of Python's
    while the interpreter is ending aborts the process.
    """
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
