"""The runs of each stage of the study, given the records so far: a choice of rates waits for its runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from study.comparison.ablations import ABLATIONS
from study.comparison.plan import ABLATION_SEEDS, RATE_SEEDS, SEEDS, Spec, Task
from study.comparison.records import Records


@dataclass
class Wanted:
    """Runs that a search for a learning rate needs so far; ``rate`` is the rate once it is chosen."""

    specs: list[Spec]
    rate: float | None = None


def mean_accuracy(records: Records, specs: Sequence[Spec]) -> float | None:
    """Mean accuracy on the first test set, in %; None if a run is missing."""
    found = [records.of(spec) for spec in specs]
    values = [100 * next(iter(record["accuracy"].values())) for record in found if record is not None]
    return statistics.fmean(values) if len(values) == len(found) else None


def _by_rate(
    task: Task, method: str, rates: Sequence[float], records: Records
) -> tuple[list[Spec], dict[float, float]]:
    """The runs that compare these learning rates, and the mean accuracy of each rate with complete runs."""
    by_rate = {rate: [Spec(task.name, method, rate, seed) for seed in RATE_SEEDS] for rate in rates}
    means = {rate: mean_accuracy(records, own) for rate, own in by_rate.items()}
    known = {rate: mean for rate, mean in means.items() if mean is not None}
    return [spec for own in by_rate.values() for spec in own], known


def best_rate(task: Task, records: Records) -> Wanted:
    """Search the baseline's learning rate: extend the rates by factors of two until both neighbours of the best are
    worse or equal."""
    rates = list(task.rates)
    while True:
        specs, known = _by_rate(task, "ce", rates, records)
        if len(known) < len(rates):
            return Wanted(specs)
        # Ties go to a rate with both neighbours, else a search with equal accuracies would never end.
        best = max(known, key=lambda rate: (known[rate], rate not in (rates[0], rates[-1])))
        if best == rates[0]:
            rates.insert(0, best / 2)
        elif best == rates[-1]:
            rates.append(best * 2)
        else:
            return Wanted(specs, best)


def own_rates(task: Task, method: str, rate: float, records: Records) -> Wanted:
    """Choose a method's learning rate: half the baseline's, the same, or twice that."""
    rates = (rate / 2, rate, rate * 2)
    specs, known = _by_rate(task, method, rates, records)
    return Wanted(specs, max(known, key=lambda own: known[own]) if len(known) == len(rates) else None)


def _main(task: Task, rate: float, records: Records, seeds: Sequence[int]) -> list[Spec]:
    return [Spec(task.name, method, rate, seed) for seed in seeds for method in task.methods]


def _longer(task: Task, rate: float, records: Records, seeds: Sequence[int]) -> list[Spec]:
    return [
        Spec(task.name, method, rate, seed, longer=length.factor)
        for length in task.lengths
        for method in length.methods
        for seed in seeds[: length.seeds]
    ]


def _own(task: Task, rate: float, records: Records, seeds: Sequence[int]) -> list[Spec]:
    specs = []
    for method in task.methods:
        found = own_rates(task, method, rate, records)
        specs += found.specs
        if found.rate is not None:
            specs += [Spec(task.name, method, found.rate, seed) for seed in seeds[: len(SEEDS)]]
    return specs


def _ablations(task: Task, rate: float, records: Records, seeds: Sequence[int]) -> list[Spec]:
    return [
        Spec(task.name, ablation.method, rate, seed, variant.settings)
        for seed in seeds[:ABLATION_SEEDS]
        for ablation in ABLATIONS
        if task.name in ablation.tasks
        for variant in ablation.variants
    ]


_AFTER_RATES: dict[str, Callable[[Task, float, Records, Sequence[int]], list[Spec]]] = {
    "main": _main, "longer": _longer, "own": _own, "ablations": _ablations,
}  # fmt: skip
STAGES = ("rates", *_AFTER_RATES)


def wanted(task: Task, stage: str, records: Records, seeds: Sequence[int]) -> list[Spec]:
    """The runs of a stage that are known so far; first the runs that choose its learning rate."""
    found = best_rate(task, records)
    if stage == "rates" or found.rate is None:
        return found.specs
    return _AFTER_RATES[stage](task, found.rate, records, seeds)
