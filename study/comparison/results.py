"""Results of a task from its records, and numbers as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from study.comparison import stages
from study.comparison.ablations import Ablation, Variant
from study.comparison.plan import METHODS, RATE_SEEDS, Spec, Task
from study.comparison.records import Record, Records

#: Records by method and seed.
BySeed = dict[str, dict[int, Record]]


@dataclass(frozen=True)
class View:
    """A task's records. ``rate`` is the learning rate that its methods share, None until it is found."""

    task: Task
    records: Records

    @cached_property
    def rate(self) -> float | None:
        return stages.best_rate(self.task, self.records).rate

    @cached_property
    def splits(self) -> list[str]:
        """Names of the test sets; the first one is used for comparisons."""
        return list(next(iter(self.records.runs[self.task.name].values()))["accuracy"])

    @property
    def teacher(self) -> Record | None:
        return self.records.teachers.get(self.task.teacher.name)

    def _of(
        self, method: str, rate: float | None, settings: tuple[str, ...] = (), longer: int = 1
    ) -> dict[int, Record]:
        """Runs by seed, without those that choose learning rates."""
        found = {}
        for record in self.records.runs[self.task.name].values():
            same = (record["method"], record["lr"], tuple(record["settings"]), record["longer"])
            if same == (method, rate, settings, longer) and record["seed"] not in RATE_SEEDS:
                found[record["seed"]] = record
        return found

    @cached_property
    def main(self) -> BySeed:
        """Runs at the rate that all methods share."""
        found = {method: self._of(method, self.rate) for method in self.task.methods}
        return {method: by_seed for method, by_seed in found.items() if by_seed}

    @cached_property
    def own_rates(self) -> dict[str, float]:
        """Each method's best rate of three, if it is found."""
        if self.rate is None:
            return {}
        found = {name: stages.own_rates(self.task, name, self.rate, self.records).rate for name in self.task.methods}
        return {name: rate for name, rate in found.items() if rate is not None}

    @cached_property
    def own(self) -> BySeed:
        """Runs at each method's own rate; none if only the baseline's is found."""
        found = {method: self._of(method, rate) for method, rate in self.own_rates.items()}
        found = {method: by_seed for method, by_seed in found.items() if by_seed}
        return found if set(found) - {"ce"} else {}

    def longer(self, factor: int, method: str = "ce") -> dict[int, Record]:
        """Runs of a method with ``factor`` times the epochs."""
        return self._of(method, self.rate, longer=factor)

    def variant(self, ablation: Ablation, variant: Variant) -> dict[int, Record]:
        return self._of(ablation.method, self.rate, variant.settings)

    def searched(self, method: str) -> dict[float, float]:
        """Accuracy in % by learning rate, from the runs that choose rates."""
        runs = self.records.runs[self.task.name].values()
        rates = sorted({record["lr"] for record in runs if record["seed"] in RATE_SEEDS and record["method"] == method})
        means = {
            rate: stages.mean_accuracy(self.records, [Spec(self.task.name, method, rate, seed) for seed in RATE_SEEDS])
            for rate in rates
        }
        return {rate: mean for rate, mean in means.items() if mean is not None}

    @property
    def seeds(self) -> list[int]:
        """Seeds that any method has at the shared rate."""
        return sorted({seed for by_seed in self.main.values() for seed in by_seed})

    def missing(self) -> list[str]:
        """Methods and seeds without a run at the shared rate."""
        return [
            f"{METHODS[name].title} with seed {seed}"
            for name in self.task.methods
            for seed in self.seeds
            if seed not in self.main.get(name, {})
        ]


def seeds_of(views: Sequence[View]) -> str:
    """Number of seeds at the shared rate, as text: "5 seeds", or "5 to 10 seeds"."""
    return count_seeds({len(view.seeds) for view in views})


def accuracies(runs: BySeed, split: str) -> dict[str, dict[int, float]]:
    """Accuracies in %, by method and seed."""
    return {method: of_seeds(by_seed, split) for method, by_seed in runs.items()}


def of_seeds(by_seed: dict[int, Record], split: str) -> dict[int, float]:
    """Accuracy in %, by seed."""
    return {seed: 100 * record["accuracy"][split] for seed, record in sorted(by_seed.items())}


def perplexities(by_seed: dict[int, Record], split: str) -> list[float]:
    return [math.exp(record["test_loss"][split]) for record in by_seed.values()]


def mean_and_deviation(values: Iterable[float], digits: int = 2) -> str:
    """Mean as text, with the sample's standard deviation if there are two values or more."""
    values = list(values)
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def signed(points: float) -> str:
    """A difference in points, with its sign."""
    return f"{points:+.2f}".replace("-", "−")


def count_seeds(numbers: Collection[int]) -> str:
    """Numbers of seeds as text."""
    fewest, most = min(numbers), max(numbers)
    return count(most, "seed") if fewest == most else f"{fewest} to {most} seeds"


def listed(names: Sequence[str]) -> str:
    """Join names: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
