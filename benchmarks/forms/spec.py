"""Provider and Loss: the entries that providers.py lists."""

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
    same_loss: bool = True  # False: another loss, so its values are not compared with the reference
    # Computes in the dtype of the logits and 1 - p as written; the comparison allows for both.
    as_published: bool = False
    # Uses PyTorch's log_softmax, with a backward pass that sums a row's labels; the comparison allows for it.
    log_softmax: bool = False


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Loss:
    name: str
    title: str
    providers: tuple[Provider, ...]
    # (float64 student, float64 other logits, target, batch sums) -> sum over these rows, part of the batch or all.
    reference_sum: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    floor: Callable[[int], int]  # bytes per logit -> least bytes per element that forward + backward move
    # Arguments without the batch sums -> sum over these rows of the magnitudes of the loss's terms. A divergence is a
    # small difference of large terms; None means that all terms have one sign.
    magnitude: LossFunction | None = None
    trains_other: bool = False  # the other logits need a gradient too: they are not a teacher's
    positions: int = 0  # positions per row of dense other logits (rows, positions, classes), else 0
    # For coupled rows: (student, target) of a part of the batch -> sums that are added over the parts.
    batch_sums: Callable[[Tensor, Tensor], Tensor] | None = None
    whole_batch: bool = False  # more than sums couples the rows, so the reference needs all of them at once
    # PyTorch adds up a row in float32 one vector after the other; from this many classes on, rounding grows with them.
    long_row: int = 2**15
    # For losses that rank: the keys, and the deviations that exchanged ranks of near-equal keys explain.
    rank_keys: LossFunction | None = None
    swaps: Callable[[Tensor, Tensor, Tensor, torch.dtype, bool], Swaps] | None = None
    # The rounding of a label sum in the gradient of the other logits, for many small labels beside a large one.
    label_sum: Callable[[Tensor, torch.dtype], LabelSum] | None = None
    shapes: Mapping[str, Shapes] = field(default_factory=lambda: DEFAULT_SHAPES)  # default shapes per device

    def provider(self, name: str) -> Provider:
        return next(provider for provider in self.providers if provider.name == name)
