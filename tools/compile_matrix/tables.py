"""Tables of a run's rows, in Markdown and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.show.report import lines
from tools.compile_matrix.rules import Gpu, Row, problems

COLUMNS = ("kernel", "call", "sm", "threads", "regs", "shared", "local", "load", "store", "tile", "code", "exp", "time")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text: bytes of shared memory, instructions on local memory, widest accesses in bytes, elements of a tile
    per thread, all instructions, instructions that compute an exponential, seconds."""
    return (
        *(row["kernel"], row["case"], str(row["capability"]), str(row["threads"] or "–"), str(row["registers"])),
        *(str(row["shared"]), str(row["local"] or "none"), _widest(row["loads"]), _widest(row["stores"])),
        *(str(row["elements"] or "–"), str(row["instructions"]), str(row["exponentials"])),
        f"{row['seconds']:.1f} s",
    )


def _widest(counts: dict[int, int]) -> str:
    return f"{max(counts)} B" if counts else "–"


def _markdown(columns: Sequence[str], words: int, rows: Sequence[Sequence[str]]) -> str:
    """A table with the first ``words`` columns aligned left, the others right."""
    align = ["---"] * words + ["---:"] * (len(columns) - words)
    return lines([columns, align, *([cell.replace("<", "&lt;") for cell in row] for row in rows)])


def markdown(rows: list[Row]) -> str:
    return _markdown(COLUMNS, 2, [cells(row) for row in rows])


def markdown_summary(rows: list[Row]) -> str:
    broken = sum(len(problems(row)) for row in rows)
    table = _markdown(SUMMARY, 1, summarise(rows))
    return f"{table}\n\n{len(rows)} kernels, of which {broken or 'none'} break a rule."


def print_table(rows: list[Row], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        text = column in ("kernel", "call")
        # Only the call's description may wrap: truncated figures are useless.
        width = {"kernel": 22, "call": 34}.get(column)
        table.add_column(column, justify="left" if text else "right", no_wrap=column != "call", width=width)
    for row in rows:
        table.add_row(*cells(row), style="red" if problems(row) else None)
    console.print(table)


SUMMARY = ("kernel", "sm", "configurations", "regs", "shared", "local", "narrowest load", "time", "slowest")


def summarise(rows: list[Row]) -> list[tuple[str, ...]]:
    """A line per kernel and GPU: range of registers, most shared memory, number of configurations that spill, narrowest
    of their widest loads, total seconds and seconds of the slowest."""
    groups: dict[tuple[str, Gpu], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["capability"]), []).append(row)
    lines: list[tuple[str, ...]] = []
    for (kernel, capability), group in sorted(groups.items(), key=lambda item: (item[0][0], str(item[0][1]).zfill(6))):
        registers = [row["registers"] for row in group]
        seconds = [row["seconds"] for row in group]
        spills = sum(bool(row["local"] or row["stack"] or row["spilled"]) for row in group)
        load = min((max(row["loads"]) for row in group if row["loads"]), default=0)
        lines.append((
            *(kernel, str(capability), str(len(group)), f"{min(registers)}–{max(registers)}"),
            *(str(max(row["shared"] for row in group)), f"{spills} spill" if spills else "none", f"{load} B"),
            *(f"{sum(seconds):.0f} s", f"{max(seconds):.1f} s"),
        ))  # fmt: skip
    return lines


def print_summary(rows: list[Row], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in SUMMARY:
        table.add_column(column, justify="left" if column == "kernel" else "right", no_wrap=True)
    for line in summarise(rows):
        table.add_row(*line)
    console.print(table)
