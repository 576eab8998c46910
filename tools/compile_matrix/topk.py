"""Row losses with a top-k teacher, for the compile matrix: see :mod:`fused_kd.backends.topk`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fused_kd.backends.triton.launch import Launch
from fused_kd.backends.triton.plans.topk import LINEAR, SHARP, plan_rest, words_of
from fused_kd.reference import accumulation_dtype
from tools.compile_matrix.calls import describe, empty, logits

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


class TopKCase(NamedTuple):
    """A call of both kernels; else as :class:`.cases.Case`."""

    student: torch.dtype
    classes: int
    need: int = 0
    rows: int = 1024
    layout: str = ""
    weighted: bool = False  # the kernels see no weights

    def __str__(self) -> str:
        needs = [name for name, bit in (("sharp", SHARP), ("linear", LINEAR)) if self.need & bit]
        return " ".join([f"{self.rows}x{self.classes}", describe((self.student,)), *needs, self.layout]).strip()

    @property
    def element_bytes(self) -> int:
        return self.student.itemsize

    def launches(self) -> list[Launch]:
        student = logits(self.rows, self.classes, self.student, self.layout)
        marks = empty(self.rows, words_of(self.classes), dtype=torch.int32)
        shared = (student, marks, empty(self.rows, dtype=torch.int32), self.need, 2.0)
        numbers = empty(4, self.rows, dtype=accumulation_dtype(student))
        gradient = empty(*student.shape, dtype=self.student)
        return [
            plan_rest("rest_statistics", *shared, numbers),
            plan_rest("rest_gradient", *shared, numbers, gradient),
        ]


def topk_cases(full: bool) -> Iterator[TopKCase]:
    if not full:
        yield TopKCase(BF16, 128256, SHARP | LINEAR)
        return
    for dtype, need in itertools.product((BF16, FP32, FP64), range(4)):
        case = TopKCase(dtype, 128256, need)
        yield from (case, case._replace(classes=4001), case._replace(layout="strided"))
