"""One run: verifies every provider against float64, times those that passed, and returns the result as plain data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import machine, measure
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.providers import OURS, Loss, LossFunction, Provider

SCHEMA = 1
QUANTILES = (0.2, 0.5, 0.8)
UNSTEADY = 2.0  # 80 % quantile over 20 % quantile from which a median is not to be trusted

Progress = Callable[[str, float], None]  # what is being done, share of the whole run that is done


@dataclass(frozen=True)
class Options:
    seconds: float  # of timing per case
    min_rounds: int
    seed: int = 0
    quick: bool = False


def run(
    loss: Loss, cases: Sequence[Case], providers: Sequence[Provider], options: Options, progress: Progress
) -> dict[str, Any]:
    """Measures all cases; the result is what the JSON file holds."""
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "loss": loss.name,
        "title": loss.title,
        "date": machine.now(),
        "options": asdict(options),
        "machine": machine.machine(),
        "software": machine.software(),
    }
    # Measured before every case, and the best one counts: other work on the machine slows a copy, and a bandwidth
    # that is too low would flatter every kernel.
    bandwidth: dict[str, float] = {}
    result["copy_bytes_per_second"] = bandwidth
    result["cases"] = []
    for number, case in enumerate(cases):

        def case_progress(text: str, share: float, number: int = number, case: Case = case) -> None:
            progress(f"{case.name}: {text}", (number + share) / len(cases))

        case_progress("copy bandwidth", 0.0)
        bandwidth[case.device] = max(measure.copy_bandwidth(case.device), bandwidth.get(case.device, 0.0))
        result["cases"].append(_run_case(loss, case, providers, options, case_progress))
    for measured in result["cases"]:
        _add_ratios(measured, bandwidth[measured["device"]])
    result["warnings"] = _warnings(result)
    progress("done", 1.0)
    return result


def failures(result: dict[str, Any]) -> list[str]:
    """What makes the run as a whole a failure: wrong values anywhere, or fused_kd itself not measured."""
    found = []
    for case in result["cases"]:
        for entry in case["providers"]:
            if entry["status"] == "wrong" or (entry["name"] == OURS and entry["status"] != "ok"):
                found.append(f"{case['rows']}×{case['classes']} {case['dtype']}: {entry['name']}: {entry['reason']}")
    return found


def _run_case(
    loss: Loss, case: Case, providers: Sequence[Provider], options: Options, progress: Progress
) -> dict[str, Any]:
    torch._dynamo.reset()  # or the recompile limit would silently turn the later cases into eager ones
    progress("inputs", 0.0)
    inputs = make_inputs(case, options.seed)
    entries: dict[str, dict[str, Any]] = {}
    functions: dict[str, LossFunction] = {}
    for number, provider in enumerate(providers):
        progress(f"verifying {provider.name}", 0.5 * number / len(providers))
        entry, function = _prepare(loss, case, provider, inputs)
        entries[provider.name] = entry
        if function is not None:
            functions[provider.name] = function
        if case.device == "cuda":
            torch.cuda.empty_cache()
    if functions:
        samples = measure.time_providers(
            functions,
            inputs,
            options.seconds,
            options.min_rounds,
            lambda share: progress("timing", 0.5 + 0.5 * share),
        )
        for name, sample in samples.items():
            entries[name]["calls"] = len(sample.both)
            entries[name]["milliseconds"] = {part: _quantiles(getattr(sample, part)) for part in asdict(sample)}
    return {
        "rows": case.rows,
        "classes": case.classes,
        "dtype": case.dtype,
        "device": case.device,
        "inputs": inputs.source,
        "logits_bytes": case.tensor_bytes,
        "floor_bytes": loss.floor(case.itemsize) * case.rows * case.classes,
        "providers": list(entries.values()),
    }


def _add_ratios(case: dict[str, Any], bandwidth: float) -> None:
    medians = {
        entry["name"]: entry["milliseconds"]["both"]["median"] for entry in case["providers"] if entry["status"] == "ok"
    }
    for entry in case["providers"]:
        if entry["status"] != "ok":
            continue
        median = medians[entry["name"]]
        if OURS in medians:
            entry["fused_kd_speedup"] = median / medians[OURS]
        if entry["same_loss"]:
            entry["share_of_copy_bandwidth"] = case["floor_bytes"] / (median / 1e3) / bandwidth


def _warnings(result: dict[str, Any]) -> list[str]:
    """What makes the figures doubtful. On a busy machine every barrier between threads waits for a time slice."""
    found = []
    about = result["machine"]
    load, spare = about["load_average_before"], (about["cores"] or 1) - about["threads"]
    if load is not None and load > spare + 0.5:
        found.append(f"other work was on the machine: its load average was {load:.1f} when the run began")
    for case in result["cases"]:
        for entry in case["providers"]:
            both = entry["milliseconds"]["both"] if entry["status"] == "ok" else {"q20": 1.0, "q80": 1.0}
            if both["q80"] > UNSTEADY * both["q20"]:
                where = f"{case['rows']}×{case['classes']} {case['dtype']}"
                found.append(f"{entry['name']} at {where} was unsteady: {both['q20']:.3g} to {both['q80']:.3g} ms")
    return found


def _prepare(loss: Loss, case: Case, provider: Provider, inputs: Inputs) -> tuple[dict[str, Any], LossFunction | None]:
    """Builds, runs and verifies one provider; returns its entry, and its function if it may be timed."""
    entry: dict[str, Any] = {"name": provider.name, "summary": provider.summary, "same_loss": provider.same_loss}
    reason = provider.unavailable(case.device)
    if reason:
        return entry | {"status": "unavailable", "reason": reason}, None
    try:
        start = time.perf_counter()
        function = provider.build()
        measure.run_once(function, inputs)
        entry["setup_seconds"] = round(time.perf_counter() - start, 2)
        if provider.same_loss:
            errors = measure.errors(loss, function, inputs)
            entry["relative_errors"] = asdict(errors)
            tolerance = measure.TOLERANCE[case.dtype]
            if not errors.within(tolerance):
                reason = f"off from float64 by {errors.loss:.1e} (loss), {errors.gradient:.1e} (gradient)"
                return entry | {"status": "wrong", "reason": f"{reason}, allowed {tolerance:.0e}"}, None
        entry["memory"] = asdict(measure.memory(function, inputs))
    except Exception as error:  # whatever a provider raises is a line of the report, not the end of the run
        reason = f"{type(error).__name__}: {machine.without_paths(str(error))}"
        return entry | {"status": "failed", "reason": reason[:300]}, None
    finally:
        inputs.student_logits.grad = None
    return entry | {"status": "ok", "reason": None}, function


def _quantiles(seconds: Iterable[float]) -> dict[str, float]:
    low, median, high = np.quantile(np.array(list(seconds)) * 1e3, QUANTILES)
    return {"q20": float(low), "median": float(median), "q80": float(high)}
