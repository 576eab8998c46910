"""The exchange between processes with sharded classes: which process has which classes, and the results per row.

All processes must call the same collectives. A process that has seen its span before must not skip a collective that
another process waits for. So the spans travel with the first numbers of every call. On the CPU they are always checked,
for free. On a GPU reading them stalls, so they are checked only until they were right once.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, distributed

from fused_kd.core.rows import Span

#: Spans that passed the check, by group.
_covered: weakref.WeakKeyDictionary[Any, set[tuple[int, int, int]]] = weakref.WeakKeyDictionary()
_DIGIT = 1 << 12  # two such digits hold a class number, each exact in float32


def group_of(span: Span) -> Any:
    resolve: Any = torch._C._distributed_c10d._resolve_process_group  # PyTorch's own group ops take names too
    return resolve(span.group)


def gathered(own: Tensor, group: Any) -> Tensor:
    """Gather a tensor from all processes of a group, (processes, ...), the same on all."""
    # The older name is deprecated where the new one exists.
    into: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    processes = distributed.get_world_size(group)
    results = own.new_empty(processes * own.numel())  # flat, as Gloo requires
    into(results, own.reshape(-1), group)
    return results.view(processes, *own.shape)


def check_cover(spans: list[list[int]]) -> list[int]:
    """Raise unless the spans (first class, width, number of classes) of all processes cover each class once. All
    processes see the same spans, so all raise. Return the ranks in the order of their classes."""
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
            "student_logits: expected shards that together have each class exactly once, with the same num_classes on "
            f"every process of the group, got: {given}"
        )
    return order


def rows_of_chunks(span: Span, columns: int) -> int:
    """Return the number of columns that decides the rows of a chunk: the same on every process, or one process would
    make more exchanges than another."""
    return -(-span.num_classes // distributed.get_world_size(group_of(span))) if span.group else columns


@lru_cache(maxsize=256)
def _digits(own: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a span in digits. It is cached, since a copy from the host stalls a GPU."""
    return torch.tensor([digit for number in own for digit in divmod(number, _DIGIT)], dtype=dtype, device=device)


class Exchange:
    """Stacks the results of all processes, for one call of a loss. This process has ``width`` classes."""

    def __init__(self, span: Span, width: int) -> None:
        self.group = group_of(span)
        self.own = (span.first_class, width, span.num_classes)
        self.sent_span = False

    def __call__(self, own: list[Tensor]) -> Tensor:
        (result,) = own
        return gathered(result, self.group) if self.sent_span else self._with_span(result)

    def _with_span(self, result: Tensor) -> Tensor:
        self.sent_span = True
        header = _digits(self.own, result.dtype, result.device)
        received = gathered(torch.cat([header, result.reshape(-1)]), self.group)
        covered = _covered.setdefault(self.group, set())
        if received.device.type == "cpu" or self.own not in covered:
            spans = received[:, : len(header)].reshape(len(received), -1, 2).tolist()
            check_cover([[int(high) * _DIGIT + int(low) for high, low in span] for span in spans])
            covered.add(self.own)
        return received[:, len(header) :].reshape(len(received), *result.shape).contiguous()
