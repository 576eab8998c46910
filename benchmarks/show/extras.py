"""Tables of the extra measurements, for the terminal and the page: caption, header and rows of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.forms.spec import OURS
from benchmarks.measure.extras import BFLOAT16, FLOAT32, NO_LOSS
from benchmarks.show.report import entry_of, label, median, percent, regimes_of, significant, times


class Rows(NamedTuple):
    title: str
    caption: str
    header: list[str]
    rows: list[list[str]]  # the first cell of each row is a name


def tables(result: dict[str, Any]) -> Iterator[Rows]:
    """Tables of the extra measurements in the result."""
    if result["fixed_cost"]:
        yield _fixed_cost(result["fixed_cost"][0])
    if result["bfloat16"]:
        yield _bfloat16(result["bfloat16"])
    for case in result["training_step"]:
        yield _training_step(case)


def _fixed_cost(case: dict[str, Any]) -> Rows:
    regimes = regimes_of(case)
    rows = []
    for name in (OURS, "cross_entropy"):
        entry = entry_of(case, name)
        cells = [significant(1e3 * median(entry, regime)) if entry else "–" for regime in regimes]
        rows.append([label(name), *cells])
    ours, other = entry_of(case, OURS), entry_of(case, "cross_entropy")
    if ours and other:
        rows.append(["ratio", *(significant(median(ours, regime) / median(other, regime), 2) for regime in regimes)])
    caption = (
        f"Microseconds of NKD, forward + backward, with {case['rows']} row of {case['classes']} classes, so almost "
        "without arithmetic."
    )
    return Rows("The fixed cost of a call", caption, ["", *regimes], rows)


def _bfloat16(cases: list[dict[str, Any]]) -> Rows:
    regimes = next((found for case in cases if (found := regimes_of(case))), [])
    header = ["loss"]
    for regime in regimes:
        header += [f"{regime}: {FLOAT32}", BFLOAT16, "ratio"]
    rows = []
    for case in cases:
        by_dtype = {entry["dtype"]: entry for entry in case["providers"] if entry["status"] == "ok"}
        row = [case["title"].removesuffix(" loss")]
        for regime in regimes:
            taken = [median(by_dtype[name], regime) if name in by_dtype else None for name in (FLOAT32, BFLOAT16)]
            row += [significant(value) if value else "–" for value in taken]
            row.append(significant(taken[1] / taken[0], 2) if taken[0] and taken[1] else "–")
        rows.append(row)
    size = f"{cases[0]['rows']}×{cases[0]['classes']}"
    caption = f"fused_kd at {size}, forward + backward: milliseconds in each dtype, taken in turn, and their ratio."
    return Rows("bfloat16 against float32", caption, header, rows)


def _training_step(case: dict[str, Any]) -> Rows:
    rows = []
    regimes = regimes_of(case)
    for entry in case["providers"]:
        if entry["status"] != "ok":
            continue
        (regime,) = entry["times"]
        whole = median(entry, regime)
        name = "no loss" if entry["name"] == NO_LOSS else label(entry["name"])
        row = [name, significant(whole), "–", "–", ""]
        if entry["name"] != NO_LOSS:
            own, ours = median(entry, regime, "loss"), entry_of(case, OURS)
            row[2:4] = [significant(own), percent(own / whole)]
            if ours and entry is not ours:
                row[4] = times(own / median(ours, regime, "loss"))
        rows.append(row)
    title = f"A training step with {case['classes']} classes"
    caption = (
        f"NKD after a linear layer: batch {case['rows']}, {case['features']} features, "
        f"{case['classes']} classes, {case['dtype']}, {regimes[0] if regimes else 'not timed'}. Milliseconds of the "
        "whole step (the layer forward, the loss forward and backward, the layer backward), and of the loss, "
        "timed within the step. Without a loss the layer gets a precomputed gradient."
    )
    return Rows(title, caption, ["", "step, ms", "loss, ms", "share of step", "loss over fused_kd's"], rows)
