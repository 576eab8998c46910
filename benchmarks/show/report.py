"""What is shown: tables for the terminal and for the README, both made from the result alone."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.forms.spec import BASELINE, COMPILED, OURS
from benchmarks.measure.ranking import SORT

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
LABELS = {
    "published": "published eager",
    "reference": "mask-free eager",
    "compile": "torch.compile",
    "cross_entropy": "F.cross_entropy",
    "liger": "Liger",
    "mdistiller": "mdistiller",
    "fused_kd": "fused_kd",
}


def significant(value: float, digits: int = 3) -> str:
    """Plain decimal notation with so many significant digits: 0.0662, 4.81, 78.3, 115."""
    if value == 0:
        return "0"
    if value >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if value >= 1e-4 else f"{value:.{digits - 1}e}"


def size(count: int) -> str:
    """Bytes in the unit that fits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * factor:  # or 999.9 kB would be shown as 1000 kB
            return f"{significant(count / factor)} {unit}"
    return f"{count} B"


def times(factor: float) -> str:
    return f"{significant(factor, 2)}×"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"


def label(provider: str) -> str:
    return LABELS.get(provider, provider)


def case_name(case: dict[str, Any]) -> str:
    return f"{case['rows']}×{case['classes']} {case['dtype']}"


def entry_of(case: dict[str, Any], provider: str) -> dict[str, Any] | None:
    """The entry of a provider that was measured, else None."""
    return next((entry for entry in case["providers"] if entry["name"] == provider and entry["status"] == "ok"), None)


def print_result(result: dict[str, Any], console: Console) -> None:
    """One table per case, a line for every provider that is not in it, and what a loss spends on ranking."""
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
    """What a first call and its backward pass took: with what is compiled then, if its caches had it not."""
    known = [entry for entry in case["providers"] if entry["status"] == "ok" and "setup_seconds" in entry]
    times = [f"{label(entry['name'])} {significant(entry['setup_seconds'], 2)} s" for entry in known]
    return f"first call, compilation included: {', '.join(times)}"


def table(title: str, first_column: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    made.show_edge = False  # 100 columns must be enough
    made.add_column(first_column, no_wrap=True)
    return made


def _ranking_table(cases: list[dict[str, Any]]) -> Table:
    found = table("The ranking alone, of the same keys, milliseconds", "N×C")
    for column in RANKING_COLUMNS:
        found.add_column(column, justify="right", no_wrap=True)
    for case in cases:
        found.add_row(case_name(case), *_ranking_cells(case))
    return found


RANKING_COLUMNS = ("stable torch.sort", "fused_kd", "faster", "of fused_kd's forward + backward")


def _ranking_cells(case: dict[str, Any]) -> list[str]:
    ranking = case["ranking"]
    medians = {e["name"]: e["milliseconds"]["median"] for e in ranking["entries"] if e["status"] == "ok"}
    return [
        *(significant(medians[name]) if name in medians else "–" for name in (SORT, OURS)),
        times(ranking["speedup"]) if "speedup" in ranking else "–",
        percent(ranking["share_of_loss"]) if "share_of_loss" in ranking else "–",
    ]


def _case_table(loss: str, case: dict[str, Any]) -> Table:
    on_gpu = case["device"] != "cpu"
    found = table(f"{loss}, {case_name(case)} on {case['device']}, milliseconds", "provider")
    columns = ["forward", "backward", "both", "20–80 %"]
    columns += ["host"] if on_gpu else []
    columns += ["fused_kd\nfaster", "kept", "peak\nmemory", "error", "copy\nspeed"]
    for column in columns:
        found.add_column(column, justify="right", no_wrap=True)
    for entry in case["providers"]:
        if entry["status"] != "ok":
            continue
        ms, memory = entry["milliseconds"], entry["memory"]
        row = [label(entry["name"]), *(significant(ms[part]["median"]) for part in ("forward", "backward", "both"))]
        row.append(f"{significant(ms['both']['q20'])}–{significant(ms['both']['q80'])}")
        row += [significant(ms["host"]["median"])] if on_gpu else []
        speedup = entry.get("fused_kd_speedup")
        row.append(times(speedup) if speedup and entry["name"] != OURS else "")
        row += [size(kept(memory)), size(memory["peak_bytes"])]
        errors, share = entry.get("relative_errors"), entry.get("share_of_copy_bandwidth")
        row.append(f"{errors['gradient']:.0e}" if errors else "–")
        row.append(percent(share) if share is not None else "–")
        found.add_row(*row, style="bold green" if entry["name"] == OURS else None)
    return found


def kept(memory: dict[str, int]) -> int:
    """Bytes kept for backward beyond the inputs: those autograd saves, or those that stay allocated if more."""
    return max(memory["saved_bytes"], memory["held_bytes"])


def _legend(result: dict[str, Any]) -> str:
    speeds = result["copy_bytes_per_second"]
    copies = ", ".join(f"{speed / 1e9:.3g} GB/s on {device}" for device, speed in speeds.items())
    return (
        "Medians over single calls. both: forward + backward. fused_kd faster: time of the provider / time of "
        "fused_kd. kept (for backward), peak memory: beyond the inputs. error: largest of the gradient against float64 "
        "relative to its largest entry; – where another loss is computed. copy speed: bytes that must be moved at the "
        f"least / time, as a share of this machine's copy bandwidth ({copies}, read + written); more than 100 % means "
        "that the data stayed in the caches."
    )


def save(result: dict[str, Any], what: str, folder: Path) -> Path:
    """Writes a result under a name that says what, on what, when and at which commit."""
    moment = result["date"][:19].replace(":", "").replace("-", "")
    commit = (result["software"]["git_commit"] or "uncommitted")[:10]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{what}-{'+'.join(devices(result))}-{moment}-{commit}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def devices(result: dict[str, Any]) -> list[str]:
    parts = result.get("losses", [result])
    return sorted({case["device"] for part in parts for case in part["cases"]})


def describe_machine(result: dict[str, Any]) -> str:
    machine, software = result["machine"], result["software"]
    parts = [f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads, {machine['cores']} cores"]
    if "cuda" in devices(result) and machine["gpu"]:
        parts.insert(0, f"{machine['gpu']['name']} (driver {machine['gpu']['driver']}, CUDA {machine['gpu']['cuda']})")
    parts.append(f"torch {software['torch']}, Python {software['python']}, {software['compiler'] or 'no C++ compiler'}")
    commit = (software["git_commit"] or "no commit")[:10] + (" with local changes" if software["git_dirty"] else "")
    parts.append(f"fused_kd {software['fused_kd']} at {commit}, {result['date'][:10]}")
    return "; ".join(parts) + (". Quick run." if result["options"]["quick"] else ".")


def markdown(result: dict[str, Any]) -> str:
    """The README's block: speed of each loss, memory and accuracy of each, then what it was measured on."""
    parts = result["losses"]
    paragraphs = [
        "Forward + backward through the public function: median milliseconds, and in brackets the time as a multiple "
        "of fused_kd's. F.cross_entropy of the student's logits alone is a yardstick: it computes less.",
    ]
    for part in parts:
        paragraphs += [f"**{part['title']}**", _speed_table(part)]
        ranked = [case for case in part["cases"] if "ranking" in case]
        if ranked:
            paragraphs += [
                f"The ranking of the {part['title']} alone, in milliseconds, on the same float32 keys for both, and "
                "its share of fused_kd's time above:",
                _ranking_markdown(ranked),
            ]
    paragraphs.append(
        "Memory beyond the inputs (the gradients are part of the peak); the largest error of fused_kd's gradients "
        "against float64, relative to the largest entry; and the minimum bytes to be moved, per second, as a share of "
        "the copy bandwidth measured in the same run. More than 100 % means that the data stayed in caches."
    )
    for part in parts:
        paragraphs += [f"**{part['title']}**", _space_table(part)]
    paragraphs += provenance(result)
    absent = list(dict.fromkeys(phrase for part in parts for phrase in _absent(part)))
    if absent:
        paragraphs.append("Not measured: " + "; ".join(absent) + ".")
    return "\n\n".join(paragraphs)


def provenance(result: dict[str, Any]) -> list[str]:
    """What it was measured on, and what makes it doubtful."""
    doubts = ["Caveat: " + "; ".join(result["warnings"]) + "."] if result["warnings"] else []
    return [f"Measured on {describe_machine(result)}", *doubts]


def note(result: dict[str, Any], width: int) -> str:
    """:func:`provenance` for the foot of a picture, in lines of ``width`` characters."""
    return "\n".join(line for text in provenance(result) for line in textwrap.wrap(text, width))


def _speed_table(part: dict[str, Any]) -> str:
    names = _measured(part)
    others = [name for name in names if name != OURS]
    header = ["N×C", *(f"**{label(OURS)}**" if name == OURS else label(name) for name in [*others, OURS])]
    rows = [header, ["---", *("---:" for _ in header[1:])]]
    rows += [[case_name(case), *(_speed_cell(case, name) for name in [*others, OURS])] for case in part["cases"]]
    return lines(rows)


def _ranking_markdown(cases: list[dict[str, Any]]) -> str:
    rows = [["N×C", *RANKING_COLUMNS], ["---", *("---:" for _ in RANKING_COLUMNS)]]
    return lines(rows + [[case_name(case), *_ranking_cells(case)] for case in cases])


def _space_table(part: dict[str, Any]) -> str:
    measured = _measured(part)
    compared = [name for name in (BASELINE, COMPILED, OURS) if name in measured]
    header = ["N×C", *(f"kept for backward, {label(name)}" for name in compared)]
    header += [*(f"peak, {label(name)}" for name in compared), "gradient error", "of copy bandwidth"]
    rows = [header, ["---", *("---:" for _ in header[1:])]]
    for case in part["cases"]:
        entries = {name: entry_of(case, name) for name in compared}
        row = [case_name(case)]
        row += [size(kept(entry["memory"])) if entry else "–" for entry in entries.values()]
        row += [size(entry["memory"]["peak_bytes"]) if entry else "–" for entry in entries.values()]
        ours = entry_of(case, OURS)
        row.append(f"{ours['relative_errors']['gradient']:.0e}" if ours else "–")
        row.append(percent(ours["share_of_copy_bandwidth"]) if ours else "–")
        rows.append(row)
    return lines(rows)


def lines(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _speed_cell(case: dict[str, Any], name: str) -> str:
    entry = entry_of(case, name)
    if entry is None:
        return "–"
    median = significant(entry["milliseconds"]["both"]["median"])
    if name == OURS:
        return f"**{median}**"
    return f"{median} ({times(entry['fused_kd_speedup'])})" if "fused_kd_speedup" in entry else median


def _measured(part: dict[str, Any]) -> list[str]:
    names: dict[str, None] = {}
    for case in part["cases"]:
        names.update({entry["name"]: None for entry in case["providers"] if entry["status"] == "ok"})
    return list(names)


def _absent(part: dict[str, Any]) -> list[str]:
    """One phrase per provider and reason, with the cases it concerns unless these are all."""
    cases: dict[tuple[str, str], list[str]] = {}
    for case in part["cases"]:
        for entry in case["providers"]:
            if entry["status"] != "ok":
                cases.setdefault((label(entry["name"]), entry["reason"]), []).append(case_name(case))
    return [
        f"{name} ({reason}{'' if len(where) == len(part['cases']) else ', ' + ', '.join(where)})"
        for (name, reason), where in cases.items()
    ]


def replace_block(path: Path, begin: str, end: str, block: str) -> bool:
    """Replaces what stands between the markers; returns whether the file changed."""
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one line {begin} and after it one line {end} in {path.name}")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    updated = f"{before}{begin}\n{block}\n{end}{after}"
    path.write_text(updated, encoding="utf-8")
    return updated != text
