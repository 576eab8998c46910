"""Shared by tables and plots: names, numbers as text, the machine; all from the result alone."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.forms.spec import OURS
from benchmarks.measure.caches import HOT
from benchmarks.measure.ranking import SORT

LABELS = {
    "published": "published eager",
    "reference": "mask-free eager",
    "compile": "torch.compile",
    "cross_entropy": "F.cross_entropy",
    "liger": "Liger",
    "speculators": "speculators",
    "quack": "QuACK",
    "mdistiller": "mdistiller",
    "fused_kd": "fused_kd",
}

UNSTEADY_SHOWN = 3  # at most this many unsteady times


def significant(value: float, digits: int = 3) -> str:
    """Decimal notation with this many significant digits: 0.0662, 4.81, 78.3, 115."""
    if value == 0:
        return "0"
    if value >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if value >= 1e-4 else f"{value:.{digits - 1}e}"


def size(count: int) -> str:
    """Bytes in the unit that fits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * factor:  # else 999.9 kB would be shown as 1000 kB
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
    """A provider's entry if it was measured, else None."""
    return next((entry for entry in case["providers"] if entry["name"] == provider and entry["status"] == "ok"), None)


def regimes_of(case: dict[str, Any]) -> list[str]:
    """Cold, hot or both, in display order."""
    return list(dict.fromkeys(regime for entry in case["providers"] for regime in entry.get("times", {})))


def median(entry: dict[str, Any], regime: str, part: str = "both") -> float:
    """Median in milliseconds."""
    return float(entry["times"][regime]["milliseconds"][part]["median"])


def table(title: str, first_column: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    made.show_edge = False  # 100 columns must be enough
    made.add_column(first_column, no_wrap=True)
    return made


RANKING_COLUMNS = ("caches", "stable torch.sort", "fused_kd", "faster", "of fused_kd's forward + backward")


def ranking_rows(cases: list[dict[str, Any]]) -> list[list[str]]:
    """A row per case and regime: its name and a cell for each of RANKING_COLUMNS."""
    rows = []
    for case in cases:
        measured = {entry["name"]: entry for entry in case["ranking"]["entries"] if entry["status"] == "ok"}
        for regime in regimes_of(case):
            own = measured[OURS]["times"][regime] if OURS in measured else {}
            rows.append(
                [
                    case_name(case),
                    regime,
                    *(
                        significant(median(measured[name], regime)) if name in measured else "–"
                        for name in (SORT, OURS)
                    ),
                    times(own["speedup"]) if "speedup" in own else "–",
                    percent(own["share_of_loss"]) if "share_of_loss" in own else "–",
                ]
            )
    return rows


def copy_share(entry: dict[str, Any]) -> float | None:
    """Share of the copy bandwidth, hot if that was measured."""
    found = entry["times"].get(HOT) or next(iter(entry["times"].values()))
    share: float | None = found.get("share_of_copy_bandwidth")
    return share


def kept(memory: dict[str, int]) -> int:
    """Bytes kept for backward beyond the inputs: saved by autograd, or still allocated if that is more."""
    return max(memory["saved_bytes"], memory["held_bytes"])


def save(result: dict[str, Any], what: str, folder: Path) -> Path:
    """Write a result; the file name says what, on which device, when and at which commit."""
    moment = result["date"][:19].replace(":", "").replace("-", "")
    commit = (result["software"]["git_commit"] or "uncommitted")[:10]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{what}-{'+'.join(devices(result))}-{moment}-{commit}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def devices(result: dict[str, Any]) -> list[str]:
    parts = result.get("losses", [result])
    return sorted({case["device"] for part in parts for case in part["cases"]})


def threads(result: dict[str, Any]) -> str:
    number = result["machine"]["threads"]
    return f"{number} thread{'' if number == 1 else 's'}"


def describe_machine(result: dict[str, Any]) -> str:
    machine, software = result["machine"], result["software"]
    parts = [f"{machine['cpu']} ({machine['cpu_capability']}), {threads(result)}, {machine['cores']} cores"]
    if "cuda" in devices(result) and machine["gpu"]:
        parts.insert(0, f"{machine['gpu']['name']} (driver {machine['gpu']['driver']}, CUDA {machine['gpu']['cuda']})")
    parts.append(f"torch {software['torch']}, Python {software['python']}, {software['compiler'] or 'no C++ compiler'}")
    commit = (software["git_commit"] or "no commit")[:10] + (" with local changes" if software["git_dirty"] else "")
    parts.append(f"fused_kd {software['fused_kd']} at {commit}, {result['date'][:10]}")
    return "; ".join(parts) + (". Quick run." if result["options"]["quick"] else ".")


def provenance(result: dict[str, Any]) -> list[str]:
    """The machine, and reasons to doubt the figures."""
    unsteady = [warning for warning in result["warnings"] if "was unsteady" in warning]
    shown = [warning for warning in result["warnings"] if warning not in unsteady[UNSTEADY_SHOWN:]]
    if len(unsteady) > UNSTEADY_SHOWN:
        shown.append(f"so were {len(unsteady) - UNSTEADY_SHOWN} other times, which the result lists")
    doubts = ["Caveat: " + "; ".join(shown) + "."] if shown else []
    took = (result["other_work"] or {}).get("milliseconds") if "other_work" in result else None
    before = f" Before a cold call other work ran for {took['median']:.1f} ms." if took else ""
    return [f"Measured on {describe_machine(result)}{before}", *doubts]


def note(result: dict[str, Any], width: int) -> str:
    """:func:`provenance` for the foot of a plot, in lines of ``width`` characters."""
    return "\n".join(line for text in provenance(result) for line in textwrap.wrap(text, width))


def lines(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def replace_block(path: Path, begin: str, end: str, block: str) -> bool:
    """Replace the text between the markers; return whether the file changed."""
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one line {begin} and after it one line {end} in {path.name}")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    updated = f"{before}{begin}\n{block}\n{end}{after}"
    path.write_text(updated, encoding="utf-8")
    return updated != text
