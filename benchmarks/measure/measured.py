"""Measures one case: verifies every provider against float64 and times those that pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.forms.spec import Loss, LossFunction, Provider
from benchmarks.measure import agreement, machine, ranking, timing
from benchmarks.measure.cases import Case, make_inputs

Progress = Callable[[str, float], None]  # current step, completed share of the run
TimeCalls = Callable[..., dict[str, dict[str, dict[str, Any]]]]  # caches.time_calls, all but calls and progress bound


def measure(
    loss: Loss, case: Case, providers: Sequence[Provider], seed: int, time_calls: TimeCalls, progress: Progress
) -> dict[str, Any]:
    torch._dynamo.reset()  # else the recompile limit would silently make later cases eager
    progress("inputs", 0.0)
    inputs = make_inputs(case, seed, loss.trains_other, loss.positions)
    judge = agreement.Judge(loss, inputs)
    entries: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[timing.Samples], None]] = {}
    timed = timing.timer(case.device)
    for number, provider in enumerate(providers):
        progress(f"verifying {provider.name}", 0.5 * number / len(providers))
        entry, function = prepare(judge, case, provider)
        entries[provider.name] = entry
        if function is not None:
            calls[provider.name] = partial(timed, function, inputs)
        if case.device == "cuda":
            torch.cuda.empty_cache()
    del judge
    bench = ranking.Bench(loss, inputs) if loss.rank_keys is not None else None
    # In the same rounds, so that the ranking's share does not compare two moments of the machine.
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


def prepare(judge: agreement.Judge, case: Case, provider: Provider) -> tuple[dict[str, Any], LossFunction | None]:
    """Build, run and verify one provider; return its entry, and its function if it may be timed."""
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
    except Exception as error:  # reported in the result; the run goes on
        return entry | {"status": "failed", "reason": machine.describe(error)}, None
    finally:
        inputs.drop_gradients()
    return entry | {"status": "ok", "reason": None}, function
