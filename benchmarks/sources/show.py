"""Prints the result of a source on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.show.report import describe_machine, percent, significant, size, table, times
from benchmarks.sources import heads, topk
from benchmarks.sources.errors import WHAT
from benchmarks.sources.forms import OURS, PRODUCTS, PRODUCTS_WHOLE, ROW_KERNEL

LABELS = {
    OURS: "fused_kd, Head",
    "unfused": "F.linear, dense loss",
    PRODUCTS: "products, in chunks",
    PRODUCTS_WHOLE: "products, in one piece",
    ROW_KERNEL: "row kernel, a chunk × chunks",
    "linear_cross_entropy": "F.linear_cross_entropy",
    "liger": "Liger",
    "cut_cross_entropy": "cut_cross_entropy",
}
LEGENDS = {
    "head": "Medians, forward + backward, each form in a process of its own. peak: beyond the inputs and their "
    "gradients, resident memory on a CPU. error: largest error against float64, relative to the largest entry, of the "
    "loss / the hidden states' gradient / the weight's, on a smaller case; × eager: over the error of the eager form "
    "with logits in the same dtype. Ratios of times are taken within a round. 3 N×C: both networks' logits and a "
    "gradient. products, in chunks: with fused_kd's chunks and dtype; in one piece: in the dtype of the inputs.",
    "topk": "Medians, forward + backward, in turn. error: of the loss / the gradient against float64. peak: beyond "
    "the inputs and the gradient, from PyTorch's allocator. of dense: time over the dense loss's.",
    "shard": "Medians, forward + backward. shared: the slower process. alone: one process with as many columns, in "
    "turn with the others. bytes: per row, that a process sends to the others.",
}


def print_result(result: dict[str, Any], console: Console) -> None:
    for case in result["cases"]:
        for made in TABLES[result["source"]](case):
            console.print(made)
        for (status, reason), names in _missing(case).items():
            style = "yellow" if status == "unavailable" else "bold red"
            console.print(f"{'; '.join(names)}: {status}: {reason}", style=style, markup=False)
        console.print()
    for words in (*result["missed"], *result["warnings"]):
        console.print(f"warning: {words}", style="yellow", markup=False)
    console.print(LEGENDS[result["source"]], style="dim", markup=False)
    console.print(describe_machine(result), style="dim", markup=False)


def _missing(case: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """Forms without figures, grouped by status and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in case.get("forms", [case]):
        if entry["status"] != "ok":
            name = " ".join(filter(None, (_label(entry), entry.get("rest"))))
            found.setdefault((entry["status"], entry["reason"]), []).append(name)
    return found


def _label(entry: dict[str, Any]) -> str:
    if "name" not in entry:
        return str(entry["loss"])
    loss = entry.get("loss")
    return f"{LABELS.get(entry['name'], entry['name'])}{f', {loss}' if loss else ''}"


def _columns(found: Table, *names: str) -> Table:
    for name in names:
        found.add_column(name, justify="right", no_wrap=True)
    return found


def _spread(milliseconds: dict[str, float]) -> list[str]:
    return [
        significant(milliseconds["median"]),
        f"{significant(milliseconds['q20'])}–{significant(milliseconds['q80'])}",
    ]


def _head_tables(case: dict[str, Any]) -> list[Table]:
    title = f"Head, {case['name']} on {case['device']}, chunks of {case['chunk_rows']} rows, milliseconds"
    found = _columns(table(title, "form"), "both", "20–80 %", "peak", "error", "× eager")
    for entry in case["forms"]:
        if entry["status"] != "ok" or "milliseconds" not in entry:
            continue
        row = [_label(entry), *_spread(entry["milliseconds"])]
        row.append(size(entry["peak_bytes"]) if "peak_bytes" in entry else "–")
        errors = entry["relative_errors"]
        row.append("/".join(f"{errors[name]:.0e}" for name in WHAT) if errors else "–")
        row.append("/".join(significant(errors["over_eager"][name], 2) for name in WHAT) if errors else "–")
        found.add_row(*row, style="bold green" if entry["name"] == OURS else None)
    bars = heads.BARS
    ratios = _columns(
        table("fused_kd over", "loss"),
        f"3 N×C\n≤ {percent(bars['peak_over_logits'])}",
        f"products +\nrow kernel\n≤ {bars['over_parts']}",
        "in one\npiece",
        f"unfused\n< {bars['over_unfused']:g}",
        "peak",
    )
    for loss, own in case["ratios"].items():
        cells = [percent(own["peak_over_logits"]) if "peak_over_logits" in own else "–"]
        compared = ("over_parts", "over_whole_parts", "over_unfused")
        cells += [significant(own[name]) if name in own else "–" for name in compared]
        cells.append(size(own["peak_bytes"]) if "peak_bytes" in own else "–")
        ratios.add_row(loss, *cells)
    return [found, ratios]


def _topk_tables(case: dict[str, Any]) -> list[Table]:
    stored = case["teacher_bytes"]
    title = (
        f"TopK, {case['name']} on {case['device']}, milliseconds; teacher: {size(stored['kept'])} of "
        f"{size(stored[topk.DENSE])}"
    )
    found = _columns(table(title, "loss, rest"), "both", "20–80 %", f"of dense\n≤ {topk.BAR}", "peak", "error")
    for entry in case["forms"]:
        if entry["status"] != "ok":
            continue
        dense, errors = entry["rest"] == topk.DENSE, entry["relative_errors"]
        found.add_row(
            f"{entry['loss']}, {entry['rest']}",
            *_spread(entry["milliseconds"]),
            significant(entry["over_dense"]) if "over_dense" in entry and not dense else "",
            size(entry["peak_bytes"]),
            f"{errors['loss']:.0e}/{errors['gradient']:.0e}",
            style=None if dense else "bold green",
        )
    return [found]


def _shard_tables(case: dict[str, Any]) -> list[Table]:
    if case["status"] != "ok":
        return []
    names = ("shared", "20–80 %", "alone", "20–80 %", "ratio", "bytes", "error")
    title = f"ClassShard, NKD on {case['device']}, {case['processes']} processes, milliseconds"
    found = _columns(table(title, "N×C"), *names)
    errors, ms = case["relative_errors"], case["milliseconds"]
    found.add_row(
        f"{case['rows']}×{case['classes']} {case['dtype']}",
        *_spread(ms["shared"]),
        *_spread(ms["alone"]),
        times(case["over_alone"]),
        significant(case["given_bytes_per_row"]),
        f"{errors['loss']:.0e}/{errors['gradient']:.0e}",
    )
    return [found]


TABLES = {"head": _head_tables, "topk": _topk_tables, "shard": _shard_tables}
