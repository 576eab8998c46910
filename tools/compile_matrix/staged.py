"""Stages of row losses, for the compile matrix: see :mod:`fused_kd.backends.staged`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fused_kd.backends import staged
from fused_kd.backends.triton.launch import Launch
from fused_kd.backends.triton.plans.staged import fields, plan_stage
from fused_kd.core.catalogue import ROW_LOSSES
from fused_kd.core.options import HyperParameters, Options
from fused_kd.core.rows import Piece, StageResults
from fused_kd.reference import accumulation_dtype
from tools.compile_matrix.calls import describe, empty, factors, logits, prob

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


class StagedCase(NamedTuple):
    """All stages of one of 8 pieces, with ``classes`` columns; else as :class:`.cases.Case`."""

    student: torch.dtype
    classes: int
    loss: str = "nkd"
    temperature: float = 1.0
    labels: torch.dtype | None = None
    rows: int = 1024
    layout: str = ""
    smoothing: float = 0.0
    standardize: bool = False
    weighted: bool = False

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.classes} of 8", describe((self.student,)), self.loss]
        words += [*(["smoothed"] if self.smoothing else []), *(["z-scores"] if self.standardize else [])]
        words += [*prob(self.labels, self.student), f"T={self.temperature:g}"]
        return " ".join([*words, *(["weighted"] if self.weighted else []), *([self.layout] if self.layout else [])])

    @property
    def element_bytes(self) -> int:
        return self.student.itemsize

    def launches(self) -> list[Launch]:
        """The launches of all stages."""
        student = logits(self.rows, self.classes, self.student, self.layout)
        teacher = None if self.loss == "tf_kd" else empty(self.rows, self.classes, dtype=self.student)
        labels = None if self.labels is None else empty(self.rows, self.classes, dtype=self.labels)
        target = empty(self.rows, dtype=torch.int64)
        piece = Piece(student, teacher, labels, target, self.classes, 8 * self.classes)
        own = dict(zip(ROW_LOSSES[self.loss].own, (0.5, 0.0), strict=False))  # for DIST gamma=0: rows alone
        hyper = HyperParameters(**own, temperature=self.temperature, ce_weight=1.0, label_smoothing=self.smoothing)
        options = Options(hyper, -100, "none", (True,), (1.0,), self.loss, self.standardize)
        acc = accumulation_dtype(student, teacher if teacher is not None else student)
        earlier, launches = StageResults(), []
        for stage in staged.stages_of(options):
            out = empty(fields().get(stage, 3), self.rows, dtype=acc)
            gradient = empty(*student.shape, dtype=self.student)
            launches.append(plan_stage(stage, piece, earlier, options, factors(self, 2), out, gradient))
            if stage in fields():
                earlier = earlier._replace(**{stage: empty(8, *out.shape, dtype=acc)})
        return launches


def staged_cases(full: bool) -> Iterator[StagedCase]:
    """Every loss, in each dtype and with the options that change its kernels."""
    if not full:
        yield StagedCase(BF16, 16032)
        yield StagedCase(FP32, 4001, "js", 2.0, standardize=True)
        return
    for loss, dtype, soft in itertools.product(ROW_LOSSES, (BF16, FP32, FP64), (False, True)):
        case = StagedCase(dtype, 16032, loss, 4.0, dtype if soft else None)
        yield from (case, case._replace(temperature=1.0), case._replace(classes=4001), case._replace(layout="strided"))
        yield case._replace(weighted=True, smoothing=0.1, standardize=loss != "tf_kd")
