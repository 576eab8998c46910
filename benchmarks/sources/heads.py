"""Measures memory and time of heads: each form in a process of its own, in turn, round after round."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.measure.machine import describe
from benchmarks.measure.timing import quantiles
from benchmarks.sources.call import in_process, observe
from benchmarks.sources.case import Case
from benchmarks.sources.errors import relative_errors
from benchmarks.sources.forms import OURS, PRODUCTS, PRODUCTS_WHOLE, ROW_KERNEL, UNFUSED, Form, chunk_rows, forms

BARS = {"peak_over_logits": 0.05, "over_parts": 1.05, "over_unfused": 1.0, "peak_bytes": 2e9}
MATRICES = 3  # of the size of the logits: both networks' and the gradient of the student's
MILLION = 1_000_000  # from this many classes on only fused_kd runs, and only its peak has a bar

Progress = Callable[[str, float], None]


class Effort(NamedTuple):
    rounds: int
    seconds: float  # of calls per process and round
    processes: bool = True  # False: in this process, for tests; the memory is then meaningless


def measure(case: Case, losses: list[str], effort: Effort, progress: Progress) -> dict[str, Any]:
    """Measure one case: an entry for each form, and fused_kd's ratios to others in the same round."""
    every = [form for form in forms(losses) if form.name == OURS or case.classes < MILLION]
    entries = {form.key: _entry(form, case, progress, at / len(every)) for at, form in enumerate(every)}
    rounds: list[dict[str, float]] = []
    for number in range(effort.rounds):
        rounds.append({})
        for at, form in enumerate(every):
            entry = entries[form.key]
            if entry["status"] != "ok":
                continue
            share = 0.1 + 0.9 * (number + at / len(every)) / effort.rounds
            progress(f"{form.key}, round {number + 1} of {effort.rounds}", share)
            try:
                found = _call(form, case, effort)
            except RuntimeError as error:
                entry |= {"status": "failed", "reason": str(error)[:300]}
                continue
            rounds[-1][form.key] = median(found["seconds"])
            entry["seconds"] = [*entry.get("seconds", []), *found["seconds"]]
            if "peak_bytes" in found:
                entry["gradient_bytes"] = found["gradient_bytes"]
                if effort.processes or case.device == "cuda":
                    entry["peak_bytes"] = max(entry.get("peak_bytes", 0), found["peak_bytes"])
    for entry in entries.values():
        if entry["status"] == "ok":
            entry["milliseconds"] = quantiles(entry.pop("seconds"))
    return {
        **vars(case),
        "name": case.name,
        "chunk_rows": chunk_rows(case),
        "logits_bytes": case.logits_bytes,
        "forms": [*entries.values()],
        "ratios": {loss: _ratios(loss, case, entries, rounds) for loss in losses},
    }


def _entry(form: Form, case: Case, progress: Progress, share: float) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": form.name, "loss": form.loss, "status": "ok", "reason": None}
    if reason := form.unavailable(case):
        return entry | {"status": "unavailable", "reason": reason}
    progress(f"{form.key}: errors", 0.1 * share)
    try:
        entry["relative_errors"] = relative_errors(form, case)
    except Exception as error:  # reported in the result
        return entry | {"status": "failed", "reason": describe(error)}
    return entry


def _call(form: Form, case: Case, effort: Effort) -> dict[str, Any]:
    if effort.processes:
        return in_process(form, case, effort.seconds, torch.get_num_threads())
    return observe(form, case, effort.seconds)


def _ratios(
    loss: str, case: Case, entries: dict[str, dict[str, Any]], rounds: list[dict[str, float]]
) -> dict[str, float]:
    """Ratios that have bars. A ratio of times is taken within a round; the median over the rounds counts."""
    ours = f"{OURS}:{loss}"
    found = {}
    if "peak_bytes" in entries[ours]:
        peak = entries[ours]["peak_bytes"]
        found = {"peak_bytes": peak, "peak_over_logits": peak / (MATRICES * case.logits_bytes)}
    compared = {
        "over_parts": (PRODUCTS, f"{ROW_KERNEL}:{loss}"),
        "over_whole_parts": (PRODUCTS_WHOLE, f"{ROW_KERNEL}:{loss}"),
        "over_unfused": (f"{UNFUSED}:{loss}",),
    }
    for name, others in compared.items():
        ratios = [
            each[ours] / sum(each[other] for other in others)
            for each in rounds
            if ours in each and all(other in each for other in others)
        ]
        if ratios:
            found[name] = median(ratios)
    return found


def missed(result: dict[str, Any]) -> list[str]:
    """Bars that a run exceeds. A case of a million classes has a bar for its peak alone."""
    found = []
    for case in result["cases"]:
        large = case["classes"] >= MILLION
        for loss, ratios in case["ratios"].items():
            for name, bar in BARS.items():
                if (name == "peak_bytes") == large and ratios.get(name, 0) > bar:
                    found.append(f"{loss} at {case['name']}: {name} {ratios[name]:.3g}, the bar is {bar:g}")
    return found
