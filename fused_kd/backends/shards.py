"""What processes that share the classes of rows tell each other: whose classes are whose, and of each row what each has
found of its own.

Each process has one way through the collectives, whatever the others have: one that met its own classes before, beside
one that did not, must not skip what that one waits for. So whose classes are whose goes along with the first numbers of
every call. It is read on the CPU, where that is free, and on a GPU, where that stalls, only until it was right once.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, distributed

from fused_kd.core.source_rows import Span

__all__ = ["Exchange", "check_cover", "gathered", "group_of", "rows_of_chunks"]

#: What was right once, by group.
_covered: weakref.WeakKeyDictionary[Any, set[tuple[int, int, int]]] = weakref.WeakKeyDictionary()
_DIGIT = 1 << 12  # a float32 has the classes exactly in two of these


def group_of(span: Span) -> Any:
    resolve: Any = torch._C._distributed_c10d._resolve_process_group  # PyTorch's own ops of groups take names, too
    return resolve(span.group)


def gathered(own: Tensor, group: Any) -> Tensor:
    """What each process of a group has, (processes, ...), the same on all."""
    # The older name is deprecated where there is the new one.
    into: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    processes = distributed.get_world_size(group)
    found = own.new_empty(processes * own.numel())  # flat, as Gloo wants it
    into(found, own.reshape(-1), group)
    return found.view(processes, *own.shape)


def check_cover(spans: list[list[int]]) -> list[int]:
    """Raise unless the (first class, width, number of classes) of all processes are every class once. All of them see
    the same numbers, so all raise. Returns the processes in the order of their classes."""
    order = sorted(range(len(spans)), key=lambda rank: spans[rank][:2])
    total, end = spans[0][2], 0
    fits = all(span[2] == total for span in spans)
    for rank in order:
        first, width, _ = spans[rank]
        fits &= first == end or width == 0
        end += width
    if not fits or end != total:
        given = "; ".join(
            f"rank {rank} has {width} of {total}, from {first} on" for rank, (first, width, total) in enumerate(spans)
        )
        raise ValueError(
            "student_logits: expected shards that are together each of the classes once, of as many on every process "
            f"of the group, got: {given}"
        )
    return order


def rows_of_chunks(span: Span, columns: int) -> int:
    """The columns by which the rows of a chunk are counted: the same on every process, or one would make more exchanges
    than another."""
    return -(-span.num_classes // distributed.get_world_size(group_of(span))) if span.group else columns


@lru_cache(maxsize=256)
def _head(own: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept, since a copy from the host stalls a GPU."""
    return torch.tensor([digit for number in own for digit in divmod(number, _DIGIT)], dtype=dtype, device=device)


class Exchange:
    """Stacks what each process has found, for a call that has ``width`` classes."""

    def __init__(self, span: Span, width: int) -> None:
        self.group = group_of(span)
        self.own = (span.first_class, width, span.num_classes)
        self.told = False

    def __call__(self, own: list[Tensor]) -> Tensor:
        (each,) = own
        return gathered(each, self.group) if self.told else self._tell(each)

    def _tell(self, each: Tensor) -> Tensor:
        self.told = True
        head = _head(self.own, each.dtype, each.device)
        found = gathered(torch.cat([head, each.reshape(-1)]), self.group)
        covered = _covered.setdefault(self.group, set())
        if found.device.type == "cpu" or self.own not in covered:
            told = found[:, : len(head)].reshape(len(found), -1, 2).tolist()
            check_cover([[int(high) * _DIGIT + int(low) for high, low in each] for each in told])
            covered.add(self.own)
        return found[:, len(head) :].reshape(len(found), *each.shape).contiguous()
