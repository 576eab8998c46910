"""The published figures for ImageNet, the paper's order of methods, and comparisons of results with it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from study.comparison.results import signed

#: Sources of the figures below; each figure was read there.
CLS_KD = "[cls_KD](https://github.com/yzd-v/cls_KD/blob/master/nkd.md), the paper's own code"
MDISTILLER = "[mdistiller](https://github.com/megvii-research/mdistiller), the code of DKD's authors"
#: Top-1 accuracy in % of a ResNet-18 on ImageNet, with a ResNet-34 as the teacher if there is one; and its source.
IMAGENET: dict[str, tuple[float, str]] = {
    "ce": (69.90, CLS_KD),
    "nkd": (71.96, CLS_KD),
    "uskd": (70.79, CLS_KD),
    "kd": (71.03, MDISTILLER),
    "dkd": (71.70, MDISTILLER),
}
#: (better, worse) pairs of the paper: neighbours in its order, and each method against the baseline.
WITH_TEACHER = (
    ("nkd", "dkd"), ("dkd", "kd"), ("kd", "label-smoothing"), ("kd", "ce"), ("dkd", "ce"), ("nkd", "ce"),
)  # fmt: skip
TEACHER_FREE = (
    ("uskd", "zipf-ls"), ("uskd", "tf-kd"), ("zipf-ls", "label-smoothing"), ("tf-kd", "label-smoothing"),
    ("label-smoothing", "ce"), ("tf-kd", "ce"), ("zipf-ls", "ce"), ("uskd", "ce"),
)  # fmt: skip
#: 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; for more, the last one errs on the safe side.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
VERDICTS = AGREES, DISAGREES, UNDECIDED = ("agrees", "disagrees", "undecided")


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of two methods over the seeds that both have.

    ``half_width``: half the 95 % interval of the mean difference (Student's t); None with fewer than two seeds.
    """

    better: str
    worse: str
    seeds: int
    difference: float
    half_width: float | None

    @property
    def text(self) -> str:
        """The difference with its interval, in points."""
        half = "" if self.half_width is None else f" ± {self.half_width:.2f}"
        return f"{signed(self.difference)}{half}"

    @property
    def verdict(self) -> str:
        if self.half_width is None or abs(self.difference) <= self.half_width:
            return UNDECIDED
        return AGREES if self.difference > 0 else DISAGREES


def compare(better: str, worse: str, accuracy: Mapping[str, Mapping[int, float]]) -> Comparison | None:
    """Compare two methods, given accuracies by method and seed; None if they have no seed in common."""
    return compare_seeds(better, worse, accuracy.get(better, {}), accuracy.get(worse, {}))


def compare_seeds(
    better: str, worse: str, first: Mapping[int, float], second: Mapping[int, float]
) -> Comparison | None:
    """Compare accuracies by seed; None if there is no common seed."""
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if not differences:
        return None
    half_width = None
    if len(differences) > 1:
        quantile = T_QUANTILES[min(len(differences) - 1, len(T_QUANTILES)) - 1]
        half_width = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return Comparison(better, worse, len(differences), statistics.fmean(differences), half_width)


def compare_all(pairs: Sequence[tuple[str, str]], accuracy: Mapping[str, Mapping[int, float]]) -> list[Comparison]:
    """Comparisons of all pairs with results."""
    made = (compare(better, worse, accuracy) for better, worse in pairs)
    return [comparison for comparison in made if comparison is not None]
