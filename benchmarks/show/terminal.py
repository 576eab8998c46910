"""Prints a result on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.forms.spec import OURS
from benchmarks.show import extras
from benchmarks.show.report import (
    RANKING_COLUMNS,
    case_name,
    copy_share,
    describe_machine,
    kept,
    label,
    median,
    percent,
    ranking_rows,
    regimes_of,
    significant,
    size,
    table,
    times,
)


def print_result(result: dict[str, Any], console: Console) -> None:
    """Print a table per case, a line for every provider that is not in it, and the rankings."""
    for part in result["losses"]:
        for case in part["cases"]:
            console.print(_case_table(part["title"], case))
            console.print(_first_calls(case), style="dim", markup=False)
            _print_missing(case["providers"], console)
            console.print()
        ranked = [case for case in part["cases"] if "ranking" in case]
        if ranked:
            console.print(_ranking_table(ranked))
            for case in ranked:
                _print_missing(case["ranking"]["entries"], console)
            console.print()
    for rows in extras.tables(result):
        _print_rows(rows, console)
    for name in ("fixed_cost", "training_step", "bfloat16"):
        for case in result[name]:
            _print_missing(case["providers"], console)
    for warning in result["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    console.print(_legend(result), style="dim", markup=False)
    console.print(describe_machine(result), style="dim", markup=False)


def _print_missing(entries: list[dict[str, Any]], console: Console) -> None:
    for entry in entries:
        if entry["status"] != "ok":
            style = "yellow" if entry["status"] == "unavailable" else "bold red"
            console.print(f"{label(entry['name'])}: {entry['status']}: {entry['reason']}", style=style, markup=False)


def _first_calls(case: dict[str, Any]) -> str:
    """Time of the first call and its backward pass, with compilation unless the compiler's cache was warm."""
    known = [entry for entry in case["providers"] if entry["status"] == "ok" and "setup_seconds" in entry]
    times = [f"{label(entry['name'])} {significant(entry['setup_seconds'], 2)} s" for entry in known]
    return f"first call, compilation included: {', '.join(times)}"


def _print_rows(rows: extras.Rows, console: Console) -> None:
    found = table(rows.title, rows.header[0])
    for column in rows.header[1:]:
        found.add_column(column, justify="right")
    for row in rows.rows:
        found.add_row(*row, style="bold green" if row[0] == label(OURS) else None)
    console.print(found)
    console.print(rows.caption, style="dim", markup=False)
    console.print()


def _ranking_table(cases: list[dict[str, Any]]) -> Table:
    found = table("The ranking alone, on the same keys, milliseconds", "N×C")
    for column in RANKING_COLUMNS:
        found.add_column(column, justify="right", no_wrap=True)
    for row in ranking_rows(cases):
        found.add_row(*row)
    return found


def _case_table(loss: str, case: dict[str, Any]) -> Table:
    on_gpu, regimes = case["device"] != "cpu", regimes_of(case)
    found = table(f"{loss}, {case_name(case)} on {case['device']}, milliseconds", "provider")
    columns = []
    for regime in regimes:
        columns += [regime, "20–80 %", *(["host"] if on_gpu else []), "fused_kd\nfaster"]
    columns += ["kept", "peak\nmemory", "error", "copy\nspeed"]
    for column in columns:
        found.add_column(column, justify="right", no_wrap=True)
    for entry in case["providers"]:
        if entry["status"] != "ok":
            continue
        row, memory = [label(entry["name"])], entry["memory"]
        for regime in regimes:
            own = entry["times"][regime]
            both = own["milliseconds"]["both"]
            row += [significant(both["median"]), f"{significant(both['q20'], 2)}–{significant(both['q80'], 2)}"]
            row += [significant(median(entry, regime, "host"))] if on_gpu else []
            speedup = own.get("fused_kd_speedup")
            row.append(times(speedup) if speedup and entry["name"] != OURS else "")
        row += [size(kept(memory)), size(memory["peak_bytes"])]
        errors, share = entry.get("relative_errors"), copy_share(entry)
        row.append(f"{errors['gradient']:.0e}" if errors else "–")
        row.append(percent(share) if share is not None else "–")
        found.add_row(*row, style="bold green" if entry["name"] == OURS else None)
    return found


def _legend(result: dict[str, Any]) -> str:
    speeds = result["copy_bytes_per_second"]
    copies = ", ".join(f"{speed / 1e9:.3g} GB/s on {device}" for device, speed in speeds.items())
    return (
        "Medians over single calls, forward + backward. cold: after other eager work; hot: back to back. fused_kd "
        "faster: time of the provider / time of fused_kd. kept (for backward), peak memory: beyond the inputs. error: "
        "largest error of the gradient against float64, relative to its largest entry; – for another loss. copy speed: "
        "least bytes to move / time, hot if measured, as a share of this machine's copy "
        f"bandwidth ({copies}, read + written); more than 100 % means that the data stayed in the caches."
    )
