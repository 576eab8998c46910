"""What the records say of a task, and how the page words numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from study.comparison import stages
from study.comparison.ablations import Ablation, Variant
from study.comparison.plan import LONGER, METHODS, RATE_SEEDS, Spec, Task
from study.comparison.records import Record, Records

#: By method and seed.
BySeed = dict[str, dict[int, Record]]


@dataclass(frozen=True)
class View:
    """One task's records. ``rate`` is the learning rate that its methods share, None until it has been found."""

    task: Task
    records: Records

    @cached_property
    def rate(self) -> float | None:
        return stages.best_rate(self.task, self.records).rate

    @cached_property
    def splits(self) -> list[str]:
        """Test sets by name, the first one the one that counts."""
        return list(next(iter(self.records.runs[self.task.name].values()))["accuracy"])

    @property
    def teacher(self) -> Record | None:
        return self.records.teachers.get(self.task.teacher.name)

    def _of(
        self, method: str, rate: float | None, settings: tuple[str, ...] = (), longer: int = 1
    ) -> dict[int, Record]:
        """By seed, those that rates are chosen by left out."""
        found = {}
        for record in self.records.runs[self.task.name].values():
            same = (record["method"], record["lr"], tuple(record["settings"]), record["longer"])
            if same == (method, rate, settings, longer) and record["seed"] not in RATE_SEEDS:
                found[record["seed"]] = record
        return found

    @cached_property
    def main(self) -> BySeed:
        """The runs at the rate that all methods share."""
        found = {method: self._of(method, self.rate) for method in self.task.methods}
        return {method: by_seed for method, by_seed in found.items() if by_seed}

    @cached_property
    def own_rates(self) -> dict[str, float]:
        """Each method's best rate of three, where it has been found."""
        if self.rate is None:
            return {}
        found = {name: stages.own_rates(self.task, name, self.rate, self.records).rate for name in self.task.methods}
        return {name: rate for name, rate in found.items() if rate is not None}

    @cached_property
    def own(self) -> BySeed:
        """The runs at each method's own rate; none where only the baseline's has been found."""
        found = {method: self._of(method, rate) for method, rate in self.own_rates.items()}
        found = {method: by_seed for method, by_seed in found.items() if by_seed}
        return found if set(found) - {"ce"} else {}

    @cached_property
    def longer(self) -> dict[int, Record]:
        """The baseline, trained :data:`LONGER` times as long."""
        return self._of("ce", self.rate, longer=LONGER)

    def variant(self, ablation: Ablation, variant: Variant) -> dict[int, Record]:
        return self._of(ablation.method, self.rate, variant.settings)

    def searched(self, method: str) -> dict[float, float]:
        """Accuracy in % by learning rate, of the runs that rates are chosen by."""
        runs = self.records.runs[self.task.name].values()
        rates = sorted({record["lr"] for record in runs if record["seed"] in RATE_SEEDS and record["method"] == method})
        means = {
            rate: stages.mean_accuracy(self.records, [Spec(self.task.name, method, rate, seed) for seed in RATE_SEEDS])
            for rate in rates
        }
        return {rate: mean for rate, mean in means.items() if mean is not None}

    @property
    def seeds(self) -> list[int]:
        """Those that any method has at the shared rate."""
        return sorted({seed for by_seed in self.main.values() for seed in by_seed})

    def missing(self) -> list[str]:
        """Methods and seeds that have no run at the shared rate."""
        return [
            f"{METHODS[name].title} with seed {seed}"
            for name in self.task.methods
            for seed in self.seeds
            if seed not in self.main.get(name, {})
        ]


def seeds_of(views: Sequence[View]) -> str:
    """How many seeds the tasks have at the shared rate, as text: "5 seeds", or "5 to 10 seeds"."""
    return count_seeds({len(view.seeds) for view in views})


def accuracies(runs: BySeed, split: str) -> dict[str, dict[int, float]]:
    """In %, by method and seed."""
    return {method: of_seeds(by_seed, split) for method, by_seed in runs.items()}


def of_seeds(by_seed: dict[int, Record], split: str) -> dict[int, float]:
    """Accuracy in %, by seed."""
    return {seed: 100 * record["accuracy"][split] for seed, record in sorted(by_seed.items())}


def perplexities(by_seed: dict[int, Record], split: str) -> list[float]:
    return [math.exp(record["test_loss"][split]) for record in by_seed.values()]


def mean_and_deviation(values: Iterable[float], digits: int = 2) -> str:
    """As text; a deviation, of the sample, from two values on."""
    values = list(values)
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def signed(points: float) -> str:
    """A difference in points, with its sign."""
    return f"{points:+.2f}".replace("-", "−")


def count_seeds(numbers: Collection[int]) -> str:
    """How many seeds there are of each thing, as text."""
    fewest, most = min(numbers), max(numbers)
    return count(most, "seed") if fewest == most else f"{fewest} to {most} seeds"


def listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
