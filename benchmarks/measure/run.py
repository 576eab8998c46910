"""One run: verifies every provider against float64, times those that passed, and returns the result as plain data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.forms.spec import OURS, Loss, LossFunction, Provider
from benchmarks.measure import agreement, caches, machine, ranking, timing
from benchmarks.measure.cases import Case, make_inputs

SCHEMA = 3
COPIES = 8  # times at the most that the copy bandwidth is measured; it takes a second
NOT_RUN = ("failed", "unavailable")
UNSTEADY = 2.0  # 80 % quantile over 20 % quantile from which a median is not to be trusted

Progress = Callable[[str, float], None]  # what is being done, share of the whole run that is done
TimeCalls = Callable[..., dict[str, dict[str, dict[str, Any]]]]  # caches.time_calls, but of the calls and progress


@dataclass(frozen=True)
class Options:
    seconds: float  # of timing per case and regime
    min_rounds: int
    seed: int = 0
    quick: bool = False
    caches: tuple[str, ...] = caches.REGIMES


class Work(NamedTuple):
    """What is to be measured of a loss."""

    loss: Loss
    providers: Sequence[Provider]
    cases: Sequence[Case]


def run(plan: Sequence[Work], options: Options, progress: Progress) -> dict[str, Any]:
    """Measures the providers of each loss in its cases; the result is what the JSON file holds."""
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "date": machine.now(),
        "options": asdict(options),
        "machine": machine.machine(),
        "software": machine.software(),
    }
    devices = {case.device for work in plan for case in work.cases}
    assert len(devices) <= 1, "the other work runs on one device"
    other_work = None
    if caches.COLD in options.caches and devices:
        progress("other work", 0.0)
        other_work = caches.OtherWork(*devices)
    result["other_work"] = other_work.about() if other_work else None
    timed = partial(
        caches.time_calls,
        regimes=options.caches,
        other_work=other_work,
        seconds=options.seconds,
        min_rounds=options.min_rounds,
    )
    # Measured before every case, or of many before some, and the best one counts: other work on the machine slows a
    # copy, and a bandwidth that is too low would flatter every kernel.
    bandwidth: dict[str, float] = {}
    result["copy_bytes_per_second"] = bandwidth
    parts: list[dict[str, Any]] = [
        {"loss": work.loss.name, "title": work.loss.title, "cases": []} for work in plan
    ]  # fmt: skip
    result["losses"] = parts
    steps = [(work, part, case) for work, part in zip(plan, parts, strict=True) for case in work.cases]
    for number, (work, part, case) in enumerate(steps):

        def step_progress(
            text: str, share: float, step: str = f"{work.loss.name} {case.name}", number: int = number
        ) -> None:
            progress(f"{step}: {text}", (number + share) / len(steps))

        if number % math.ceil(len(steps) / COPIES) == 0:
            step_progress("copy bandwidth", 0.0)
            bandwidth[case.device] = max(timing.copy_bandwidth(case.device), bandwidth.get(case.device, 0.0))
        part["cases"].append(_run_case(work.loss, case, work.providers, options.seed, timed, step_progress))
    for part in parts:
        for measured in part["cases"]:
            _add_ratios(measured, bandwidth[measured["device"]])
    result["warnings"] = _warnings(result)
    progress("done", 1.0)
    return result


def failures(result: dict[str, Any]) -> list[str]:
    """What makes the run as a whole a failure: wrong values anywhere, or fused_kd itself not measured."""
    found = []
    for where, case in _all_cases(result):
        bad = [(entry["name"], entry) for entry in case["providers"] if entry["status"] == "wrong"]
        bad += [(OURS, entry) for entry in case["providers"] if entry["name"] == OURS and entry["status"] in NOT_RUN]
        rankings = [(f"ranking by {entry['name']}", entry) for entry in _rankings(case)]
        bad += [(name, entry) for name, entry in rankings if entry["status"] in ("wrong", "failed")]
        found += [f"{where}: {name}: {entry['reason']}" for name, entry in bad]
    return found


def _rankings(case: dict[str, Any]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = case.get("ranking", {"entries": []})["entries"]
    return entries


def _all_cases(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every case, and how to name it; with several losses the loss is part of the name."""
    several = len(result["losses"]) > 1
    return [
        (f"{part['loss'] + ' ' if several else ''}{case['rows']}×{case['classes']} {case['dtype']}", case)
        for part in result["losses"]
        for case in part["cases"]
    ]


def _run_case(
    loss: Loss, case: Case, providers: Sequence[Provider], seed: int, time_calls: TimeCalls, progress: Progress
) -> dict[str, Any]:
    torch._dynamo.reset()  # or the recompile limit would silently turn the later cases into eager ones
    progress("inputs", 0.0)
    inputs = make_inputs(case, seed, loss.trains_other, loss.positions)
    judge = agreement.Judge(loss, inputs)
    entries: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[timing.Samples], None]] = {}
    timed = timing.timer(case.device)
    for number, provider in enumerate(providers):
        progress(f"verifying {provider.name}", 0.5 * number / len(providers))
        entry, function = _prepare(judge, case, provider)
        entries[provider.name] = entry
        if function is not None:
            calls[provider.name] = partial(timed, function, inputs)
        if case.device == "cuda":
            torch.cuda.empty_cache()
    del judge
    bench = ranking.Bench(loss, inputs) if loss.rank_keys is not None else None
    # In the same rounds, so that the share of the ranking is not one of two moments of the machine.
    rankings = {f"ranking: {name}": call for name, call in bench.calls().items()} if bench else {}
    times = time_calls(calls | rankings, progress=lambda share: progress("timing", 0.5 + 0.5 * share)) if calls else {}
    for name in calls:
        entries[name]["times"] = times[name]
    result = {
        "rows": case.rows,
        "classes": case.classes,
        "dtype": case.dtype,
        "device": case.device,
        "inputs": inputs.source,
        "dense_positions": loss.positions or None,
        "logits_bytes": case.tensor_bytes,
        "floor_bytes": loss.floor(case.itemsize) * case.rows * case.classes,
        "providers": list(entries.values()),
    }
    if bench and calls:
        for name, entry in bench.entries.items():
            if entry["status"] == "ok":
                entry["times"] = times[f"ranking: {name}"]
        result["ranking"] = {"keys": str(bench.keys.dtype).removeprefix("torch."), "entries": [*bench.entries.values()]}
    return result


def _add_ratios(case: dict[str, Any], bandwidth: float) -> None:
    measured = [entry for entry in case["providers"] if entry["status"] == "ok"]
    ours: dict[str, Any] = next((entry["times"] for entry in measured if entry["name"] == OURS), {})
    for entry in measured:
        for regime, own in entry["times"].items():
            median = own["milliseconds"]["both"]["median"]
            if ours:
                own["fused_kd_speedup"] = median / ours[regime]["milliseconds"]["both"]["median"]
            if entry["same_loss"]:
                own["share_of_copy_bandwidth"] = case["floor_bytes"] / (median / 1e3) / bandwidth
    if "ranking" in case:
        ranking.add_ratios(case)


def busy(about: dict[str, Any]) -> list[str]:
    """Whether other work was on the machine when a run began."""
    load, spare = about["load_average_before"], (about["cores"] or 1) - about["threads"]
    if load is not None and load > spare + 0.5:
        return [f"other work was on the machine: its load average was {load:.1f} when the run began"]
    return []


def _warnings(result: dict[str, Any]) -> list[str]:
    """What makes the figures doubtful. On a busy machine every barrier between threads waits for a time slice."""
    found = busy(result["machine"]) + caches.doubts(result["other_work"])
    for where, case in _all_cases(result):
        timed = [(entry["name"], entry) for entry in case["providers"]]
        timed += [(f"ranking by {entry['name']}", entry) for entry in _rankings(case)]
        for name, entry in timed:
            for regime, own in entry.get("times", {}).items():
                both = own["milliseconds"]["both"]
                if both["q80"] > UNSTEADY * both["q20"]:
                    spread = f"{both['q20']:.3g} to {both['q80']:.3g} ms"
                    found.append(f"{name} at {where}, {regime}, was unsteady: {spread}")
    return found


def _prepare(judge: agreement.Judge, case: Case, provider: Provider) -> tuple[dict[str, Any], LossFunction | None]:
    """Builds, runs and verifies one provider; returns its entry, and its function if it may be timed."""
    entry: dict[str, Any] = {"name": provider.name, "summary": provider.summary, "same_loss": provider.same_loss}
    inputs, reason = judge.inputs, provider.unavailable(case.device)
    if reason:
        return entry | {"status": "unavailable", "reason": machine.without_paths(reason)}, None
    try:
        start = time.perf_counter()
        function = provider.build()
        agreement.run_once(function, inputs)
        entry["setup_seconds"] = round(time.perf_counter() - start, 2)
        if provider.same_loss:
            errors = judge.errors(provider, function)
            entry["relative_errors"] = asdict(errors)
            tolerance = agreement.tolerance(judge.loss, case, provider)
            if not errors.within(tolerance):
                reason = f"off from float64 by {errors.loss_beyond_rounding:.1e} (loss), {errors.beyond_rounding:.1e}"
                return entry | {"status": "wrong", "reason": f"{reason} (gradient), allowed {tolerance:.0e}"}, None
        entry["memory"] = asdict(timing.memory(function, inputs))
    except Exception as error:  # whatever a provider raises is a line of the report, not the end of the run
        reason = f"{type(error).__name__}: {machine.without_paths(str(error))}"
        return entry | {"status": "failed", "reason": reason[:300]}, None
    finally:
        inputs.drop_gradients()
    return entry | {"status": "ok", "reason": None}, function
