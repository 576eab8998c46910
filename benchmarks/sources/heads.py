"""Memory and time of heads, each form in a process of its own, in turn, round after round."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.measure.machine import without_paths
from benchmarks.sources.call import in_process, observe
from benchmarks.sources.case import Case
from benchmarks.sources.errors import relative_errors
from benchmarks.sources.forms import OURS, PRODUCTS, PRODUCTS_WHOLE, ROW_KERNEL, UNFUSED, Form, chunk_rows, forms

BARS = {"peak_over_logits": 0.05, "over_parts": 1.05, "over_unfused": 1.0, "peak_bytes": 2e9}
MATRICES = 3  # of logits: both networks' and the gradient of the student's
MILLION = 1_000_000  # from so many classes on only fused_kd is run, and its peak is what counts

Progress = Callable[[str, float], None]


class Effort(NamedTuple):
    rounds: int
    seconds: float  # of calls in each process and round
    processes: bool = True  # False: in this process, for tests; the memory is then of no use


def measure(case: Case, losses: list[str], effort: Effort, progress: Progress) -> dict[str, Any]:
    """One case: an entry for each form, and the ratios of fused_kd's to others of the same round."""
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
            low, middle, high = np.quantile(np.array(entry.pop("seconds")) * 1e3, (0.2, 0.5, 0.8))
            entry["milliseconds"] = {"q20": float(low), "median": float(middle), "q80": float(high)}
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
    except Exception as error:  # whatever a form raises is a line of the report
        reason = f"{type(error).__name__}: {without_paths(str(error))}"
        return entry | {"status": "failed", "reason": reason[:300]}
    return entry


def _call(form: Form, case: Case, effort: Effort) -> dict[str, Any]:
    if effort.processes:
        return in_process(form, case, effort.seconds, torch.get_num_threads())
    return observe(form, case, effort.seconds)


def _ratios(
    loss: str, case: Case, entries: dict[str, dict[str, Any]], rounds: list[dict[str, float]]
) -> dict[str, float]:
    """What the bars are for. Ratios of times are those of one round, the median over the rounds."""
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
    """The bars that a run has not kept. What a case of a million classes has to keep is its peak alone."""
    found = []
    for case in result["cases"]:
        large = case["classes"] >= MILLION
        for loss, ratios in case["ratios"].items():
            for name, bar in BARS.items():
                if (name == "peak_bytes") == large and ratios.get(name, 0) > bar:
                    found.append(f"{loss} at {case['name']}: {name} {ratios[name]:.3g}, the bar is {bar:g}")
    return found
