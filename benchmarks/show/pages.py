"""Markdown blocks: a small table for the README, and all details for a page of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.forms.providers import HEADLINE
from benchmarks.forms.spec import BASELINE, COMPILED, OURS
from benchmarks.show import extras, overview, report
from benchmarks.show.report import case_name, entry_of, label, lines, median, percent, regimes_of, significant, times

HEADLINE_MARKS = ("<!-- benchmark:begin -->", "<!-- benchmark:end -->")
DETAILS_MARKS = ("<!-- benchmark-details:begin -->", "<!-- benchmark-details:end -->")
SMALL = ("cross_entropy", COMPILED, BASELINE)  # providers of the README's table, beside fused_kd
SHAPES = ((256, 1000), (128, 21841), (32, 128256))  # cases of that table, if the result has them


def table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table with the first ``texts`` columns aligned left, the others right."""
    return lines([header, [*["---"] * texts, *["---:"] * (len(header) - texts)], *rows])


def headline(result: dict[str, Any]) -> str:
    """The README's block: fused_kd's times of NKD and USKD, cold and hot, and the others' as multiples of them."""
    chosen = _headline_parts(result)
    rows_of = [(part, case) for part in chosen for case in _shown(part["cases"])]
    dtypes = list(dict.fromkeys(case["dtype"] for _, case in rows_of))
    regimes = regimes_of(rows_of[0][1]) if rows_of else []
    header = ["loss", "N×C"]
    for regime in regimes:
        header += [f"{regime}: **fused_kd**", *(label(name) for name in SMALL)]
    rows = []
    for part, case in rows_of:
        row = [overview.title(part), case_name(case) if len(dtypes) > 1 else f"{case['rows']}×{case['classes']}"]
        for regime in regimes:
            row += small_cells(case, regime)
        rows.append(row)
    for case in result["fixed_cost"]:
        row = [f"{overview.title(chosen[0])}, the fixed cost", f"{case['rows']}×{case['classes']}"]
        rows.append([*row, *(cell for regime in regimes for cell in small_cells(case, regime))])
    text = (
        "Forward + backward through the public function: milliseconds of fused_kd, and the time of the others as a "
        "multiple of it, so above 1× they are slower. Cold: after other eager work, as in a training step; hot: calls "
        f"back to back. {label('cross_entropy')} of the student's logits alone is a yardstick: it computes less."
    )
    if len(dtypes) == 1:
        text += f" {dtypes[0]}, {report.threads(result)}."
    return "\n\n".join([text, table(header, rows, 2), *report.provenance(result)])


def small_cells(case: dict[str, Any], regime: str) -> list[str]:
    """fused_kd's milliseconds, and the times of SMALL as multiples."""
    ours = entry_of(case, OURS)
    cells = [f"**{significant(median(ours, regime))}**" if ours else "–"]
    for name in SMALL:
        entry = entry_of(case, name)
        cells.append(times(median(entry, regime) / median(ours, regime)) if entry and ours else "–")
    return cells


def _headline_parts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of NKD and USKD, or all if the result has neither."""
    found = [part for part in result["losses"] if part["loss"] in HEADLINE]
    return found or result["losses"]


def _shown(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [case for case in cases if (case["rows"], case["classes"]) in SHAPES] or cases


def details(result: dict[str, Any]) -> str:
    """All times of NKD and USKD, ranking and memory, then the machine."""
    parts = _headline_parts(result)
    paragraphs = [
        "Forward + backward through the public function: median milliseconds, and in brackets the time as a multiple "
        "of fused_kd's. F.cross_entropy of the student's logits alone is a yardstick: it computes less. Cold: after "
        "other eager work; hot: calls back to back.",
    ]
    for part in parts:
        paragraphs += [f"**{part['title']}**", _speed_table(part)]
        ranked = [case for case in part["cases"] if "ranking" in case]
        if ranked:
            paragraphs += [
                f"The ranking of the {part['title']} alone, in milliseconds, on the same float32 keys for both, and "
                "its share of fused_kd's time above:",
                table(["N×C", *report.RANKING_COLUMNS], report.ranking_rows(ranked), 2),
            ]
    paragraphs.append(
        "Memory beyond the inputs (the gradients are part of the peak); the largest error of fused_kd's gradients "
        "against float64, relative to the largest entry; and the minimum bytes to be moved, per second, as a share of "
        "the copy bandwidth measured in the same run, hot. More than 100 % means that the data stayed in caches."
    )
    for part in parts:
        paragraphs += [f"**{part['title']}**", _space_table(part)]
    if len(result["losses"]) > len(parts):
        paragraphs += ["**All losses**", overview.markdown(result)]
    for rows in extras.tables(result):
        paragraphs += [f"**{rows.title}**", rows.caption, table(rows.header, rows.rows)]
    paragraphs += report.provenance(result)
    absent = list(dict.fromkeys(phrase for part in parts for phrase in _absent(part)))
    if absent:
        paragraphs.append("Not measured: " + "; ".join(absent) + ".")
    return "\n\n".join(paragraphs)


def _speed_table(part: dict[str, Any]) -> str:
    others = [name for name in _measured(part) if name != OURS]
    header = ["N×C", "caches", *(label(name) for name in others), f"**{label(OURS)}**"]
    rows = [
        [case_name(case), regime, *(_speed_cell(case, name, regime) for name in [*others, OURS])]
        for case in part["cases"]
        for regime in regimes_of(case)
    ]
    return table(header, rows, 2)


def _speed_cell(case: dict[str, Any], name: str, regime: str) -> str:
    entry = entry_of(case, name)
    if entry is None:
        return "–"
    shown, own = significant(median(entry, regime)), entry["times"][regime]
    if name == OURS:
        return f"**{shown}**"
    return f"{shown} ({times(own['fused_kd_speedup'])})" if "fused_kd_speedup" in own else shown


def _space_table(part: dict[str, Any]) -> str:
    measured = _measured(part)
    compared = [name for name in (BASELINE, COMPILED, OURS) if name in measured]
    header = ["N×C", *(f"kept for backward, {label(name)}" for name in compared)]
    header += [*(f"peak, {label(name)}" for name in compared), "gradient error", "of copy bandwidth"]
    rows = []
    for case in part["cases"]:
        entries = {name: entry_of(case, name) for name in compared}
        row = [case_name(case)]
        row += [report.size(report.kept(entry["memory"])) if entry else "–" for entry in entries.values()]
        row += [report.size(entry["memory"]["peak_bytes"]) if entry else "–" for entry in entries.values()]
        ours = entry_of(case, OURS)
        share = report.copy_share(ours) if ours else None
        row.append(f"{ours['relative_errors']['gradient']:.0e}" if ours else "–")
        row.append(percent(share) if share is not None else "–")
        rows.append(row)
    return table(header, rows)


def _measured(part: dict[str, Any]) -> list[str]:
    names: dict[str, None] = {}
    for case in part["cases"]:
        names.update({entry["name"]: None for entry in case["providers"] if entry["status"] == "ok"})
    return list(names)


def _absent(part: dict[str, Any]) -> list[str]:
    """One phrase per provider and reason, with its cases unless it applies to all."""
    cases: dict[tuple[str, str], list[str]] = {}
    for case in part["cases"]:
        for entry in case["providers"]:
            if entry["status"] != "ok":
                cases.setdefault((label(entry["name"]), entry["reason"]), []).append(case_name(case))
    return [
        f"{name} ({reason}{'' if len(where) == len(part['cases']) else ', ' + ', '.join(where)})"
        for (name, reason), where in cases.items()
    ]
