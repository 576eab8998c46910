"""One run: verifies every provider against float64, times those that pass, and returns the result as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

from benchmarks.forms.spec import OURS, Loss, Provider
from benchmarks.measure import caches, extras, machine, measured, ranking, timing
from benchmarks.measure.cases import Case
from benchmarks.measure.measured import Progress

SCHEMA = 3
EXTRAS = ("fixed_cost", "training_step", "bfloat16")  # functions of extras.py
FIRST = "nkd"  # the loss for the fixed cost and the training step
COPIES = 8  # copy bandwidths measured per run, at most; each takes a second
NOT_RUN = ("failed", "unavailable")
UNSTEADY = 2.0  # above this ratio of the 80 % to the 20 % quantile a median is not trusted


@dataclass(frozen=True)
class Options:
    seconds: float  # of timing per case and regime
    min_rounds: int
    seed: int = 0
    quick: bool = False
    caches: tuple[str, ...] = caches.REGIMES
    extras: tuple[str, ...] = ()  # names from EXTRAS


class Work(NamedTuple):
    """Measurements of one loss to make."""

    loss: Loss
    providers: Sequence[Provider]
    cases: Sequence[Case]


def run(plan: Sequence[Work], options: Options, progress: Progress) -> dict[str, Any]:
    """Measure the providers of each loss in its cases; return the content of the JSON file."""
    devices = {case.device for work in plan for case in work.cases}
    assert len(devices) == 1, "the other work runs on one device"
    (device,) = devices
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "date": machine.now(),
        "options": asdict(options),
        "machine": machine.machine(),
        "software": machine.software(),
        "other_work": None,
    }
    other_work = None
    if caches.COLD in options.caches:
        progress("other work", 0.0)
        other_work = caches.OtherWork(device)
    timed = partial(
        caches.time_calls,
        regimes=options.caches,
        other_work=other_work,
        seconds=options.seconds,
        min_rounds=options.min_rounds,
    )
    # Measured before every case, or before some of many. The best one counts: other work on the machine slows a copy,
    # and a bandwidth that is too low would flatter every kernel.
    bandwidth: dict[str, float] = {}
    result["copy_bytes_per_second"] = bandwidth
    parts: list[dict[str, Any]] = [
        {"loss": work.loss.name, "title": work.loss.title, "cases": []} for work in plan
    ]  # fmt: skip
    result |= {"losses": parts, **{name: [] for name in EXTRAS}}
    steps = list(_steps(plan, parts, result, device, options, timed))
    for number, (name, found, measure) in enumerate(steps):

        def step_progress(text: str, share: float, name: str = name, number: int = number) -> None:
            progress(f"{name}: {text}", (number + share) / len(steps))

        if number % math.ceil(len(steps) / COPIES) == 0:
            step_progress("copy bandwidth", 0.0)
            bandwidth[device] = max(timing.copy_bandwidth(device), bandwidth.get(device, 0.0))
        found.append(measure(progress=step_progress))
    for case in (case for part in [*parts, {"cases": result["fixed_cost"]}] for case in part["cases"]):
        _add_ratios(case, bandwidth[device])
    result["other_work"] = other_work.about() if other_work else None
    result["warnings"] = _warnings(result)
    progress("done", 1.0)
    return result


def _steps(
    plan: Sequence[Work],
    parts: list[dict[str, Any]],
    result: dict[str, Any],
    device: str,
    options: Options,
    timed: Callable[..., Any],
) -> Iterator[tuple[str, list[Any], Callable[..., dict[str, Any]]]]:
    """Steps of the run: a name, the list for the result, and the function that measures."""
    shared: dict[str, Any] = {"seed": options.seed, "time_calls": timed}
    for work, part in zip(plan, parts, strict=True):
        for case in work.cases:
            call = partial(measured.measure, work.loss, case, work.providers, **shared)
            yield f"{work.loss.name} {case.name}", part["cases"], call
    first = next((work for work in plan if work.loss.name == FIRST), None)
    if first and "fixed_cost" in options.extras:
        call = partial(extras.fixed_cost, first.loss, first.providers, device, **shared)
        yield "fixed cost", result["fixed_cost"], call
    if first and "training_step" in options.extras:
        # One regime: a step's own products empty the caches anyway.
        once = {**shared, "time_calls": partial(timed, regimes=options.caches[:1])}
        for classes in extras.STEP_CLASSES:
            call = partial(extras.training_step, first.loss, first.providers, classes, device, **once)
            yield f"training step, {classes} classes", result["training_step"], call
    if "bfloat16" in options.extras:
        for work in plan:
            call = partial(extras.bfloat16, work.loss, device, **shared)
            yield f"{work.loss.name} bfloat16", result["bfloat16"], call


def failures(result: dict[str, Any]) -> list[str]:
    """Reasons why the whole run failed: wrong values anywhere, or fused_kd itself not measured."""
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
    """Every case with its name; with several losses the loss is part of the name."""
    several = len(result["losses"]) > 1
    found = [(part["loss"] if several else "", case) for part in result["losses"] for case in part["cases"]]
    found += [(name, case) for name in ("fixed_cost", "training_step") for case in result[name]]
    found += [(case["loss"], case) for case in result["bfloat16"]]
    return [
        (f"{name.replace('_', ' ')} {case['rows']}×{case['classes']} {case.get('dtype', '')}".strip(), case)
        for name, case in found
    ]


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
    """A warning if the machine did other work when the run began."""
    load, spare = about["load_average_before"], (about["cores"] or 1) - about["threads"]
    if load is not None and load > spare + 0.5:
        return [f"other work was on the machine: its load average was {load:.1f} when the run began"]
    return []


def _warnings(result: dict[str, Any]) -> list[str]:
    """Reasons to doubt the figures. On a busy machine every barrier between threads waits for a time slice."""
    found = busy(result["machine"]) + caches.doubts(result["other_work"])
    for where, case in _all_cases(result):
        timed = [(f"{entry['name']} {entry.get('dtype', '')}".strip(), entry) for entry in case["providers"]]
        timed += [(f"ranking by {entry['name']}", entry) for entry in _rankings(case)]
        for name, entry in timed:
            for regime, own in entry.get("times", {}).items():
                both = own["milliseconds"]["both"]
                if both["q80"] > UNSTEADY * both["q20"]:
                    spread = f"{both['q20']:.3g} to {both['q80']:.3g} ms"
                    found.append(f"{name} at {where}, {regime}, was unsteady: {spread}")
    return found
