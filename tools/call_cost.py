"""Where a short call spends its time, hot and cold: python -m tools.call_cost [--update docs/kernels.md].

Measures NKD at 1x10 and 256x1000, forward and backward: medians in microseconds. A cold call follows the benchmark's
other work (:class:`benchmarks.measure.caches.OtherWork`). The times include the clock reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure.caches import OtherWork
from benchmarks.show import pages
from benchmarks.show.report import replace_block
from fused_kd import direct, nkd_loss

BEGIN, END = "<!-- call-cost:begin -->", "<!-- call-cost:end -->"
SIZES = ((1, 10), (256, 1000))
STAGES = (
    "before the core",
    "in the core",
    "autograd's node",
    "engine, to our backward",
    "our backward",
    "engine, after it",
)
Marks = dict[str, float]


def staged(marks: Marks, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function to record its start and end in ``marks``."""

    def call(*given: Any) -> Any:
        marks[f"{name} start"] = perf_counter()
        result = function(*given)
        marks[f"{name} end"] = perf_counter()
        return result

    return call


def stages_of_direct(rows: int, classes: int, repeats: int, work: Callable[[], None] | None) -> list[float]:
    """Median microseconds of each of STAGES."""
    student = torch.randn(rows, classes, requires_grad=True)
    teacher, target = torch.randn(rows, classes), torch.randint(classes, (rows,))
    marks: Marks = {}
    core, backward = direct._loss, direct._Loss.backward
    direct._loss = staged(marks, "core", core)
    setattr(direct._Loss, "backward", staticmethod(staged(marks, "backward", backward)))  # noqa: B010
    found = []
    try:
        for _ in range(repeats):
            student.grad = None
            if work:
                work()
            start = perf_counter()
            loss = nkd_loss(student, teacher, target)
            forward = perf_counter()
            loss.backward()  # type: ignore[no-untyped-call]
            end = perf_counter()
            times = (
                start, marks["core start"], marks["core end"], forward, marks["backward start"],
                marks["backward end"], end,
            )  # fmt: skip
            found.append([1e6 * (b - a) for a, b in pairwise(times)])
    finally:
        direct._loss = core
        setattr(direct._Loss, "backward", staticmethod(backward))  # noqa: B010
    return [median(column) for column in zip(*found[repeats // 10 :], strict=True)]


def whole(call: Callable[[], Any], leaf: torch.Tensor, repeats: int, work: Callable[[], None] | None) -> float:
    found = []
    for _ in range(repeats):
        leaf.grad = None
        if work:
            work()
        start = perf_counter()
        call().backward()
        found.append(1e6 * (perf_counter() - start))
    return median(found[repeats // 10 :])


def table(hot: int, cold: int) -> str:
    other = OtherWork("cpu")
    head = ["µs", *(f"{rows}×{classes} {regime}" for rows, classes in SIZES for regime in ("hot", "cold"))]
    columns: list[list[float]] = []
    for rows, classes in SIZES:
        student = torch.randn(rows, classes, requires_grad=True)
        teacher, target = torch.randn(rows, classes), torch.randint(classes, (rows,))
        for repeats, work in ((hot, None), (cold, other)):
            stages = stages_of_direct(rows, classes, repeats, work)
            ours = whole(lambda: nkd_loss(student, teacher, target), student, repeats, work)  # noqa: B023
            core, direct._loss = direct._loss, None
            by_ops = whole(lambda: nkd_loss(student, teacher, target), student, repeats, work)  # noqa: B023
            direct._loss = core
            plain = whole(lambda: F.cross_entropy(student, target), student, repeats, work)  # noqa: B023
            columns.append([*stages, ours, by_ops, plain])
    names = [*STAGES, "**the whole call**", "an unusual call, through the ops", "F.cross_entropy"]
    rows_of = [[name, *(f"{column[place]:.1f}" for column in columns)] for place, name in enumerate(names)]
    about = f"{torch.get_num_threads()} threads, torch {torch.__version__}; `python -m tools.call_cost`."
    return f"{pages.table(head, rows_of)}\n\n{about}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", type=Path, help="write the table into this page, between its markers")
    parser.add_argument("--hot", type=int, default=2000, help="number of calls back to back, default %(default)s")
    parser.add_argument("--cold", type=int, default=100, help="number of calls after other work, default %(default)s")
    given = parser.parse_args()
    text = table(given.hot, given.cold)
    if given.update:
        replace_block(given.update, BEGIN, END, text)
    print(text)


if __name__ == "__main__":
    main()
