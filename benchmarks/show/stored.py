"""Loads results from JSON files of the current and the former schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.measure.caches import HOT
from benchmarks.measure.run import SCHEMA

FORMER = 2  # without a cold regime: all times are hot, stored in the entries themselves
OF_TIMES = ("calls", "milliseconds", "fused_kd_speedup", "share_of_copy_bandwidth")


def load(path: Path) -> dict[str, Any]:
    """Read a result; raise ValueError saying what is wrong with the file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"expected a JSON file, got {path}") from None
    if not isinstance(result, dict) or result.get("schema") not in (SCHEMA, FORMER):
        raise ValueError(f"expected a benchmark result of schema {FORMER} or {SCHEMA}, got {path}")
    return _upgraded(result) if result["schema"] == FORMER else result


def _upgraded(result: dict[str, Any]) -> dict[str, Any]:
    for case in (case for part in result["losses"] for case in part["cases"]):
        for entry in case["providers"]:
            if "milliseconds" in entry:
                entry["times"] = {HOT: {name: entry.pop(name) for name in OF_TIMES if name in entry}}
        ranking = case.get("ranking", {"entries": []})
        for entry in ranking["entries"]:
            if "milliseconds" in entry:
                entry["times"] = {
                    HOT: {"calls": entry.pop("calls"), "milliseconds": {"both": entry.pop("milliseconds")}}
                }
                if entry["name"] == "fused_kd":
                    shared = {name: ranking.pop(name) for name in ("speedup", "share_of_loss") if name in ranking}
                    entry["times"][HOT] |= shared
    own = {"schema": SCHEMA, "options": {**result["options"], "caches": [HOT]}, "other_work": None}
    return {**result, **own, "fixed_cost": [], "training_step": [], "bfloat16": []}
