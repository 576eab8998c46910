"""Cases of heads: sizes, and their hidden states and weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measure.cases import DTYPES
from fused_kd.backends.heads import multiplies_bfloat16

SPREAD = 2.0  # standard deviation of the non-target logits


@dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    width: int  # of the student's hidden states
    teacher_width: int
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    chunk_rows: int | None = None  # of fused_kd's heads; None: its own choice

    @property
    def name(self) -> str:
        return f"{self.rows}×{self.classes}, {self.width} wide, {self.dtype}"

    @property
    def logits_bytes(self) -> int:
        """Size of one matrix of logits."""
        return self.rows * self.classes * DTYPES[self.dtype].itemsize

    @property
    def accumulating(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def made(self) -> torch.dtype:
        """The dtype of the logits that fused_kd makes of a head."""
        rounded = self.device == "cpu" and self.dtype == "bfloat16" and multiplies_bfloat16()
        return torch.bfloat16 if rounded else self.accumulating


class Inputs(NamedTuple):
    hidden: Tensor  # (rows, width), a leaf that requires grad
    weight: Tensor  # (classes, width), a leaf that requires grad
    teacher_hidden: Tensor
    teacher_weight: Tensor
    target: Tensor

    def trained(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    def drop_gradients(self) -> None:
        for leaf in self.trained():
            leaf.grad = None

    def first(self, rows: int) -> Inputs:
        """The same weights with the first rows only."""
        hidden = self.hidden.detach()[:rows].requires_grad_()
        return self._replace(
            hidden=hidden, teacher_hidden=self.teacher_hidden[:rows], target=self.target[:rows]
        )  # fmt: skip

    def double(self) -> Inputs:
        """The same values in float64."""
        hidden, weight = (leaf.detach().double().requires_grad_() for leaf in self.trained())
        return Inputs(hidden, weight, self.teacher_hidden.double(), self.teacher_weight.double(), self.target)


def make_inputs(case: Case) -> Inputs:
    """Seeded inputs: both networks' logits have a Gaussian bulk, with the target raised by log(classes)."""
    generator = torch.Generator(case.device).manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device)

    target = torch.randint(case.classes, (case.rows,), generator=generator, device=case.device)
    made = []
    for width in (case.width, case.teacher_width):
        weight = normal(case.classes, width).mul_(SPREAD / math.sqrt(width))
        hidden = normal(case.rows, width).add_(weight[target], alpha=math.log(case.classes) / SPREAD**2)
        made += [each.to(DTYPES[case.dtype]) for each in (hidden, weight)]
    return Inputs(made[0].requires_grad_(), made[1].requires_grad_(), made[2], made[3], target)
