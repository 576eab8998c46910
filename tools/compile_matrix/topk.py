"""Row losses with a top-k teacher, for the compile matrix: see :mod:`fused_kd.backends.topk`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fused_kd.backends.triton.launch import Launch
from fused_kd.backends.triton.plans.topk import Rows, plan_topk, words_of
from fused_kd.core.catalogue import ROW_LOSSES
from fused_kd.core.options import HyperParameters, Options, in_order
from fused_kd.core.rows import TOPK_FIELDS
from fused_kd.reference import accumulation_dtype
from tools.compile_matrix.calls import describe, empty, factors, logits

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


class TopKCase(NamedTuple):
    """All four kernels, at a temperature that is not 1; else as :class:`.cases.Case`."""

    loss: str
    rest: str
    student: torch.dtype
    classes: int
    kept: int = 64
    rows: int = 1024
    ce: bool = True
    layout: str = ""
    weighted: bool = False
    probabilities: bool = False

    def __str__(self) -> str:
        said = [describe((self.student,)), f"k={self.kept}", self.loss, self.rest, "ce" if self.ce else "", self.layout]
        said += ["weights" if self.weighted else "", "probs" if self.probabilities else ""]
        return " ".join([f"{self.rows}x{self.classes}", *filter(None, said)])

    @property
    def element_bytes(self) -> int:
        return self.student.itemsize

    def launches(self) -> list[Launch]:
        rows, classes, kept = self.rows, self.classes, self.kept
        student = logits(rows, classes, self.student, self.layout)
        given = Rows(
            student,
            empty(rows, kept, dtype=torch.float32),
            empty(rows, kept, dtype=torch.int64),
            empty(rows, dtype=torch.int64),
            logits(rows, classes, self.student, "") if self.probabilities else None,
            factors(self, 2),
            empty(rows, words_of(classes), dtype=torch.int32),
            empty(rows, dtype=torch.int32),
            empty(TOPK_FIELDS + kept, rows, dtype=torch.float64),
            0,
            classes,
        )
        dtype = accumulation_dtype(student)
        made = empty(rows, dtype=dtype), empty(3, rows, dtype=dtype), empty(rows, classes, dtype=self.student)
        own = dict.fromkeys(ROW_LOSSES[self.loss].own, 0.5)
        hyper = in_order(own | {"temperature": 2.0, "ce_weight": float(self.ce), "label_smoothing": 0.1})
        options = Options(HyperParameters._make(hyper), -100, "none", (True,), (1.0,), self.loss)
        return plan_topk(given, self.rest, options, made)


def topk_cases(full: bool) -> Iterator[TopKCase]:
    most = TopKCase("nkd", "uniform", BF16, 128256)
    if not full:
        yield most
        return
    # What the walks need: the exponentials at T alone, those at 1 too, and a constant.
    walks = (("kd", "bucket", False), ("nkd", "bucket", False), ("kd", "uniform", False), ("nkd", "uniform", True))
    for dtype, (loss, rest, ce) in itertools.product((BF16, FP32, FP64), walks):
        case = TopKCase(loss, rest, dtype, 128256, ce=ce)
        yield from (case, case._replace(classes=4001), case._replace(layout="strided"))
    for loss, rest in ((name, rest) for name, row_loss in ROW_LOSSES.items() for rest in row_loss.rests):
        yield TopKCase(loss, rest, BF16, 4001, weighted=True)
        yield TopKCase(loss, rest, BF16, 4001, probabilities=True)
    yield from (most._replace(kept=kept) for kept in (8, 512, 4096))
