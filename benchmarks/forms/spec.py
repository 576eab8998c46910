"""What a provider and a loss are to the benchmark: the entries that providers.py lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.forms.uskd import LabelSum, Swaps
from benchmarks.measure.cases import DEFAULT_SHAPES, Shapes

# (student_logits, teacher's, weak or dense logits, target) -> scalar
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

BASELINE, OURS, COMPILED = "published", "fused_kd", "compile"


@dataclass(frozen=True)
class Provider:
    name: str
    summary: str
    build: Callable[[], LossFunction]  # called once per case, so that a compiler starts afresh on each shape
    unavailable: Callable[[str], str | None] = lambda device: None  # device -> why it cannot run there
    same_loss: bool = True  # False: computes something else, so its values are not compared with the reference
    as_published: bool = False  # in the dtype of the logits and with 1 - p as written, which the comparison allows for
    log_softmax: bool = False  # PyTorch's: its backward pass adds up a row's labels, which the comparison allows for


@dataclass(frozen=True, eq=False)  # each is one of its kind, and so a key
class Loss:
    name: str
    title: str
    providers: tuple[Provider, ...]
    # (float64 student, float64 other logits, target, batch sums) -> sum over these rows, which may be a part of all.
    reference_sum: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    floor: Callable[[int], int]  # bytes per logit -> bytes per element that forward + backward must move at the least
    # The same arguments but the sums -> sum over these rows of the magnitudes of all that the loss adds up. A
    # divergence is a small difference of large terms; where this is None they all have one sign.
    magnitude: LossFunction | None = None
    trains_other: bool = False  # the gradient of the other logits is wanted as well: they are not a teacher's
    positions: int = 0  # where the other logits are dense, (rows, positions, classes), how many positions a row has
    # What couples the rows: (student, target) of a part of the batch -> sums that are added over the parts.
    batch_sums: Callable[[Tensor, Tensor], Tensor] | None = None
    whole_batch: bool = False  # what couples the rows is no sum, so that the reference must have all of them at once
    # PyTorch adds up a row in float32 one vector after the other; from so many classes on, rounding grows with them.
    long_row: int = 2**15
    # Of a loss that ranks: the keys, and what exchanged ranks of near-equal keys explain.
    rank_keys: LossFunction | None = None
    swaps: Callable[[Tensor, Tensor, Tensor, torch.dtype, bool], Swaps] | None = None
    # What that sum explains in the gradient of the other logits, where the labels are many small ones beside a large.
    label_sum: Callable[[Tensor, torch.dtype], LabelSum] | None = None
    shapes: Mapping[str, Shapes] = field(default_factory=lambda: DEFAULT_SHAPES)  # per device, unless others are given

    def provider(self, name: str) -> Provider:
        return next(provider for provider in self.providers if provider.name == name)
