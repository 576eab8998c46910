"""Calls that the compile matrix covers.

A case is a call on meta tensors. The same functions plan it that dispatch a real call, so the compiled kernels are the
ones that would run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd.backends.triton.launch import HOST, Launch
from fused_kd.backends.triton.plans import uskd, zipf_ls
from fused_kd.backends.triton.plans.rows import plan_row_loss
from fused_kd.backends.triton.plans.scale import plan_scale
from fused_kd.core.catalogue import ROW_LOSSES
from fused_kd.core.options import HyperParameters, Options, outputs, pair_outputs
from fused_kd.reference import accumulation_dtype
from tools.compile_matrix.calls import Call, describe, empty, factors, logits, prob, targets
from tools.compile_matrix.staged import staged_cases
from tools.compile_matrix.topk import topk_cases


class Case(NamedTuple):
    """A call of a row loss.

    ``labels`` is the dtype of probability targets, None for class indices; ``layout`` is the student's
    (:func:`.calls.logits`); ``weighted`` says whether the rows have weights; ``padding`` is how many columns follow the
    classes.
    """

    student: torch.dtype
    teacher: torch.dtype
    classes: int
    temperature: float = 1.0
    labels: torch.dtype | None = None
    reduction: str = "mean"
    rows: int = 1024
    layout: str = ""
    loss: str = "nkd"
    ce_weight: float = 1.0
    smoothing: float = 0.0
    standardize: bool = False
    gradient: bool = True
    weighted: bool = False
    padding: int = 0

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.classes}", *([f"+{self.padding}"] if self.padding else [])]
        words += [describe((self.student, self.teacher))]
        words += [*([self.loss] if self.loss != "nkd" else []), *([] if self.ce_weight else ["no CE"])]
        words += [*(["smoothed"] if self.smoothing else []), *(["z-scores"] if self.standardize else [])]
        words += prob(self.labels, self.student)
        words += [f"T={self.temperature:g}", self.reduction, *([] if self.gradient else ["no gradient"])]
        return " ".join([*words, *(["weighted"] if self.weighted else []), *([self.layout] if self.layout else [])])

    @property
    def element_bytes(self) -> int:
        return max(self.student.itemsize, self.teacher.itemsize)

    def launches(self) -> list[Launch]:
        """All launches of the forward and the backward op."""
        student = logits(self.rows, self.classes + self.padding, self.student, self.layout)[:, : self.classes]
        teacher = empty(self.rows, self.classes + self.padding, dtype=self.teacher)[:, : self.classes]
        dtype = accumulation_dtype(student, teacher)
        made = outputs(student, self.gradient, 3, self.reduction, dtype, padding=self.padding)
        own = dict(zip(ROW_LOSSES[self.loss].own, (0.5, 1.0), strict=False))
        hyper = HyperParameters(
            **own, temperature=self.temperature, ce_weight=self.ce_weight, label_smoothing=self.smoothing
        )
        options = Options(
            hyper, -100, self.reduction, (self.gradient,), (1.0,), self.loss, self.standardize, padding=self.padding
        )
        target = targets(self.rows, self.classes, self.labels)
        column_factor = empty(dtype=torch.float64) if self.weighted and self.loss == "dist" else None
        plan = plan_row_loss(student, teacher, target, factors(self, 2), column_factor, made, options)
        loss, _, gradient, norm = made
        return [*plan, *([plan_scale(gradient, loss, norm, gradient)] if self.gradient else [])]


class RankedCase(NamedTuple):
    """A call of USKD; as :class:`Case`.

    ``gradient`` says which logits need one. With ``processes`` there are several, so the batch sums are an input.
    """

    student: torch.dtype
    weak: torch.dtype
    classes: int
    rank: str = "normalized"
    labels: torch.dtype | None = None
    reduction: str = "mean"
    rows: int = 1024
    layout: str = ""
    square: bool = True
    smoothing: float = 0.0
    gradient: tuple[bool, bool] = (True, True)
    weighted: bool = False
    processes: bool = False

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.classes}", describe((self.student, self.weak)), *prob(self.labels, self.student)]
        words += [self.rank] if self.rank != "normalized" else []
        words += [*([] if self.square else ["p"]), *(["smoothed"] if self.smoothing else []), self.reduction]
        words += [] if all(self.gradient) else [f"gradient {'s' * self.gradient[0]}{'w' * self.gradient[1] or 'none'}"]
        words += ["processes"] if self.processes else []
        return " ".join([*words, *(["weighted"] if self.weighted else []), *([self.layout] if self.layout else [])])

    @property
    def element_bytes(self) -> int:
        return max(self.student.itemsize, self.weak.itemsize)

    def launches(self) -> list[Launch]:
        """All kernel launches of the batch sums and the forward op; the backward op is NKD's."""
        student = logits(self.rows, self.classes, self.student, self.layout)
        weak = empty(self.rows, self.classes, dtype=self.weak)
        made = pair_outputs(student, weak, self.gradient, 4, self.reduction, accumulation_dtype(student, weak))
        target = targets(self.rows, self.classes, self.labels)
        sums = empty(3, dtype=torch.float64) if self.processes else None
        hyper = HyperParameters(1.0, 0.1, mu=0.005, ce_weight=1.0, label_smoothing=self.smoothing)
        options = Options(hyper, -100, self.reduction, self.gradient, (1.0, 1.0), rank=self.rank, square=self.square)
        plan = uskd.plan_uskd(student, weak, target, sums, factors(self, 3), made, options)
        if sums is not None:
            plan = [*uskd.plan_batch_sums(student, target, sums, self.square, -100), *plan]
        return [launch for launch in plan if launch.kernel not in HOST]


class ZipfCase(NamedTuple):
    """A call of Zipf's label smoothing; as :class:`Case`. ``order``: the contiguous dimension of the dense logits."""

    student: torch.dtype
    dense: torch.dtype
    classes: int
    positions: int = 49
    order: str = "positions"
    labels: torch.dtype | None = None
    reduction: str = "mean"
    rows: int = 1024
    layout: str = ""
    smoothing: float = 0.0
    gradient: bool = True
    loss: str = "zipf_ls"
    weighted: bool = False

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.classes}", f"{self.positions} {self.order}", describe((self.student, self.dense))]
        words += [*prob(self.labels, self.student), *(["smoothed"] if self.smoothing else []), self.reduction]
        words += [] if self.gradient else ["forward"]
        return " ".join([*words, *(["weighted"] if self.weighted else []), *([self.layout] if self.layout else [])])

    @property
    def element_bytes(self) -> int:
        return max(self.student.itemsize, self.dense.itemsize)

    def launches(self) -> list[Launch]:
        """All launches of the forward op; the backward op is NKD's."""
        student = logits(self.rows, self.classes, self.student, self.layout)
        dense = empty(self.rows, self.positions, self.classes, dtype=self.dense)
        if self.order == "positions":  # like a feature map
            dense = empty(self.rows, self.classes, self.positions, dtype=self.dense).transpose(1, 2)
        elif self.order == "neither":
            dense = empty(self.rows, 2 * self.positions, 2 * self.classes, dtype=self.dense)[:, ::2, ::2]
        made = outputs(student, self.gradient, 2, self.reduction, accumulation_dtype(student))
        hyper = HyperParameters(beta=0.1, power=1.0, ce_weight=1.0, label_smoothing=self.smoothing)
        options = Options(hyper, -100, self.reduction, (self.gradient,), (1.0,))
        target = targets(self.rows, self.classes, self.labels)
        return zipf_ls.plan_zipf_ls(student, dense, target, factors(self, 2), made, options)


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = (BF16, FP16, FP32, FP64)
#: Other mixed dtypes differ from these two only by a conversion.
MIXED = ((BF16, FP32), (FP32, BF16))
#: One class count per row of the dispatch table: several rows per program, and one row per program.
REGIMES = (100, 1000, 2048, 4096, 8192, 21841, 128256)


def cases(full: bool) -> Iterator[Case]:
    """Calls of NKD: a selection that reaches every row of the dispatch table, or with ``full`` every configuration."""
    if not full:
        yield from (Case(BF16, BF16, classes) for classes in REGIMES)
        yield from (Case(FP32, FP32, classes) for classes in (1000, 8192, 21841))
        yield from (Case(BF16, BF16, classes, 3.0, BF16, "none") for classes in (1000, 4096, 21841))
        yield from (Case(FP64, FP64, classes, 3.0, FP64) for classes in (2048, 128256))
        yield Case(BF16, FP32, 21841, 3.0)
        yield from (Case(dtype, dtype, 1000, rows=40000) for dtype in (FP16, BF16))
        yield Case(BF16, BF16, 21841, 1.0, BF16)
        yield Case(BF16, BF16, 21841, 3.0, BF16, layout="strided")
        yield Case(FP16, FP16, 4096, 3.0, rows=40000)
        return
    for student, teacher in (*((dtype, dtype) for dtype in DTYPES), *MIXED):
        for classes, temperature, labels in itertools.product((10, 256, *REGIMES), (1.0, 3.0), (None, student)):
            case = Case(student, teacher, classes, temperature, labels)
            yield from (case, case._replace(reduction="none"))
            if student == teacher:
                yield from (case._replace(rows=40000), case._replace(reduction="sum"), case._replace(gradient=False))
        for classes, temperature in itertools.product((1000, 21841), (1.0, 3.0)):
            case = Case(student, teacher, classes, temperature)
            for changed in (case, case._replace(labels=FP32)):
                yield from (changed._replace(classes=1001), changed._replace(layout="strided"))
                yield from (changed._replace(layout="offset"), changed)


def row_cases(full: bool) -> Iterator[Case]:
    """Calls of the other row losses, and of the options that they share with NKD."""
    losses = [loss for loss in ROW_LOSSES if loss != "nkd"]
    if not full:
        yield from (Case(BF16, BF16, classes, 4.0, loss=loss) for loss in losses for classes in (1000, 21841))
        yield Case(BF16, BF16, 21841, 4.0, loss="dist", rows=8192)
        yield from (Case(BF16, BF16, classes, 2.0, BF16, standardize=True) for classes in (1000, 21841))
        yield Case(FP32, FP32, 8192, 2.0, loss="wsld", smoothing=0.1, standardize=True)
        yield Case(BF16, BF16, 4096, labels=BF16, loss="wsld", smoothing=0.1)
        yield Case(BF16, BF16, 4096, loss="js", smoothing=0.1, standardize=True)
        weighted = Case(BF16, BF16, 1000, reduction="sum", weighted=True)
        yield from (weighted, weighted._replace(classes=21841, temperature=3.0, labels=BF16))
        yield weighted._replace(student=FP64, teacher=FP64, classes=2048, loss="dkd")
        yield from (Case(BF16, BF16, 2048, loss=loss, ce_weight=0.0) for loss in ("kd", "js"))
        return
    for loss in (*losses, "nkd"):
        for temperature, (ce_weight, smoothing), standardize in itertools.product(
            (1.0, 4.0), ((0.0, 0.0), (1.0, 0.0), (1.0, 0.1)), (False, True)
        ):
            if loss == "tf_kd" and standardize:
                continue  # without a teacher there are no z-scores
            given = Case(
                BF16, BF16, 1000, temperature, loss=loss,
                ce_weight=ce_weight, smoothing=smoothing, standardize=standardize,
            )  # fmt: skip
            for dtype, classes, soft in itertools.product(DTYPES, REGIMES, (False, True)):
                labels = dtype if soft else None
                yield given._replace(student=dtype, teacher=dtype, classes=classes, labels=labels)
        for standardize in (False, True) if loss != "tf_kd" else (False,):
            case = Case(BF16, BF16, 1000, 4.0, loss=loss, smoothing=0.1, standardize=standardize)
            for classes in (1000, 21841):
                case = case._replace(classes=classes)
                yield from (case._replace(rows=40000), case._replace(reduction="none"), case._replace(reduction="sum"))
                yield from (case._replace(layout=layout) for layout in ("strided", "offset"))
                yield from (case._replace(gradient=False), case._replace(labels=FP32), case._replace(teacher=FP32))
                yield case._replace(padding=24)
            yield case._replace(classes=1001)
            if loss == "dist":  # the layout of its column kernels depends on the number of rows too
                for rows, dtype, labels in itertools.product((1024, 40000), DTYPES, (None, FP32)):
                    yield case._replace(
                        rows=rows, student=dtype, teacher=FP64 if dtype == FP64 else FP32, labels=labels
                    )
        for dtype, classes, soft in itertools.product(DTYPES, REGIMES, (False, True)):
            case = Case(dtype, dtype, classes, 4.0, dtype if soft else None, "sum", loss=loss, weighted=True)
            yield case
            if loss != "tf_kd":
                yield case._replace(reduction="none", smoothing=0.1, standardize=True)


def ranked_cases(full: bool) -> Iterator[RankedCase]:
    """Calls of USKD."""
    if not full:
        yield from (RankedCase(BF16, BF16, classes) for classes in (100, 1000, 21841))
        yield RankedCase(FP16, FP32, 4096, "cls_kd", FP16)
        yield RankedCase(FP32, FP32, 21841, "sum", FP32, "none")
        yield RankedCase(FP64, FP64, 2048, "cls_kd", FP64)
        yield from (RankedCase(BF16, BF16, classes, reduction="sum", weighted=True) for classes in (1000, 21841))
        return
    for student, weak in (*((dtype, dtype) for dtype in DTYPES), *MIXED):
        for classes, labels in itertools.product((10, 100, 1000, 2048, 4096, 21841), (None, student)):
            yield RankedCase(student, weak, classes, "normalized", labels)
            yield RankedCase(student, weak, classes, "cls_kd", labels, "none", smoothing=0.1)
    for dtype, classes, soft in itertools.product((BF16, FP16, FP64), (1000, 21841), (False, True)):
        case = RankedCase(dtype, dtype, classes, "normalized", dtype if soft else None)
        yield from (case._replace(rows=40000), case._replace(reduction="sum"), case._replace(classes=1001))
        yield from (case._replace(layout=layout) for layout in ("strided", "offset"))
        yield from (case._replace(rank=rank) for rank in ("weak", "final", "sum"))
        yield from (case._replace(gradient=wanted) for wanted in ((True, False), (False, True), (False, False)))
        yield from (case._replace(square=False), case._replace(labels=FP32), case._replace(processes=True))
    for dtype, classes, soft in itertools.product(DTYPES, (100, 1000, 2048, 4096, 21841), (False, True)):
        case = RankedCase(dtype, dtype, classes, labels=dtype if soft else None, reduction="sum", weighted=True)
        yield from (case, case._replace(reduction="none", smoothing=0.1))


def zipf_cases(full: bool) -> Iterator[ZipfCase]:
    """Calls of Zipf's label smoothing."""
    if not full:
        yield from (ZipfCase(BF16, BF16, classes) for classes in (100, 1000, 21841))
        yield ZipfCase(FP32, FP32, 1000, 196, labels=FP32, smoothing=0.1)
        yield from (ZipfCase(BF16, BF16, 1000, order=order) for order in ("classes", "neither"))
        yield ZipfCase(FP64, FP64, 100, labels=FP64)
        yield ZipfCase(BF16, BF16, 1000, reduction="sum", weighted=True)
        return
    for dtype, classes, soft in itertools.product(DTYPES, (10, 100, 1000, 1001, 4096, 21841), (False, True)):
        case = ZipfCase(dtype, dtype, classes, labels=dtype if soft else None)
        yield from (case, case._replace(smoothing=0.1, reduction="none"), case._replace(layout="strided"))
        yield case._replace(reduction="sum", weighted=True)
    for dtype, classes, order in itertools.product(DTYPES, (10, 1000, 21841), ("positions", "classes", "neither")):
        case = ZipfCase(dtype, dtype, classes, order=order)
        yield from (case._replace(positions=positions) for positions in (1, 4, 49, 64, 196, 3136))
        yield from (case._replace(dense=FP32), case._replace(rows=40000), case._replace(reduction="sum"))
        yield from (case._replace(gradient=False), case._replace(layout="offset"), case._replace(labels=FP32))


#: Groups of Triton kernels and their calls: all (True) or a selection (False).
CASES: dict[str, Callable[[bool], Iterator[Call]]] = {
    "nkd": cases,
    "rows": row_cases,
    "uskd": ranked_cases,
    "zipf_ls": zipf_cases,
    "staged": staged_cases,
    "topk": topk_cases,
}


class Job(NamedTuple):
    """A kernel to compile: the ``number``-th launch of a call in the group ``loss`` of CASES."""

    loss: str
    call: Call
    number: int
    launch: Launch


def distinct(losses: Iterable[str], full: bool) -> list[Job]:
    """Kernels that differ for the compiler. Calls mostly share count and reduction kernels, and hyper-parameters are
    arguments."""
    found: dict[tuple[Any, ...], Job] = {}
    for loss in losses:
        for call in CASES[loss](full):
            for number, launch in enumerate(call.launches()):
                tensors = [(a.dtype, a.data_ptr() % 16) for a in launch.arguments if isinstance(a, Tensor)]
                key = (launch.kernel, str(launch.options), *tensors)
                found.setdefault(key, Job(loss, call, number, launch))
    return list(found.values())
