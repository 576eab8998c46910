"""Findings for the page: the paper's order, learning rates and convergence, and the ablations."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.show.report import lines
from study.comparison import paper
from study.comparison.ablations import ABLATIONS, Ablation, Variant
from study.comparison.paper import Comparison, compare_all, compare_seeds
from study.comparison.plan import METHODS
from study.comparison.records import Record
from study.comparison.results import (
    BySeed,
    View,
    accuracies,
    count,
    count_seeds,
    mean_and_deviation,
    of_seeds,
    signed,
)

ORDERS = (("With a teacher", paper.WITH_TEACHER), ("Without a teacher", paper.TEACHER_FREE))
#: Pairs in the outcome's table.
_FIRST = (("nkd", "ce"), ("nkd", "kd"), ("nkd", "dkd"), ("uskd", "ce"), ("uskd", "label-smoothing"))


def comparisons(view: View, runs: BySeed) -> list[Comparison]:
    """All pairs that the paper ranks, for the task's methods."""
    return compare_all([pair for _, pairs in ORDERS for pair in pairs], accuracies(runs, view.splits[0]))


def outcome(views: Sequence[View]) -> str:
    """Summary for the top of the page and for other pages: a short table, a list and a sentence."""
    rows = [["points of accuracy", *(view.task.title for view in views)], ["---", *["---:"] * len(views)]]
    for better, worse in _FIRST:
        found = [paper.compare(better, worse, accuracies(view.main, view.splits[0])) for view in views]
        if any(found):
            rows.append([_pair(better, worse), *(c.text if c else "–" for c in found)])
    ranked = [c for view in views for c in comparisons(view, view.main)]
    sentence = (
        f"Of the {count(len(ranked), 'pair')} that the paper ranks, over {count(len(views), 'task')}, "
        f"{_verdicts(ranked)}{_widths(ranked)}."
    )
    return f"{lines(rows)}\n\n{_best(views)}\n\n{sentence}"


def _best(views: Sequence[View]) -> str:
    """A list of each task's method with the highest mean accuracy, with a teacher and without one."""
    found = []
    for title, needs_teacher in (("Best with a teacher", True), ("Best without one", False)):
        best = []
        for view in views:
            values = accuracies(view.main, view.splits[0])
            means = {
                name: statistics.fmean(by_seed.values())
                for name, by_seed in values.items()
                if METHODS[name].teacher == needs_teacher and name != "ce"
            }
            over = paper.compare(max(means, key=lambda name: means[name]), "ce", values) if means else None
            if over:
                best.append(f"{METHODS[over.better].title} on {view.task.title} ({over.text})")
        if best:
            found.append(f"- **{title}**, over the baseline: {'; '.join(best)}.")
    return "\n".join(found)


def _pair(better: str, worse: str) -> str:
    return f"{METHODS[better].title} over {METHODS[worse].title}"


def _verdicts(found: Sequence[Comparison]) -> str:
    numbers = [sum(c.verdict == verdict for c in found) for verdict in paper.VERDICTS]
    verb = "is" if numbers[2] == 1 else "are"
    return f"{numbers[0]} agree with its order, {numbers[1]} disagree, and {numbers[2]} {verb} undecided"


def _widths(found: Sequence[Comparison]) -> str:
    widths = [c.half_width for c in found if c.half_width is not None]
    if not widths:
        return ""
    ends, middle = f"±{min(widths):.2f} to ±{max(widths):.2f}", f"±{statistics.median(widths):.2f}"
    return f"; the 95 % intervals are {ends} points, {middle} in the median"


def orders(views: Sequence[View]) -> list[str]:
    """Tables of all pairs, at the shared learning rate and at each method's own."""
    parts = [
        "The paper ranks NKD over DKD over KD over the baseline with a teacher, and USKD over Zipf's LS and Tf-KD over "
        "label smoothing over the baseline without one. Runs of one seed start from the same weights and see the same "
        "batches, so the difference of a pair is taken seed by seed. A pair agrees or disagrees if the 95 % interval "
        "of the mean difference (Student's t) excludes zero; otherwise it is undecided. The pairs are not independent, "
        "and of twenty pairs without a true difference one would seem to have one.",
        "**At the baseline's best learning rate**",
        *_pairs(views, [view.main for view in views]),
    ]
    with_own = [view for view in views if view.own]
    if with_own:
        own_seeds = {len(by_seed) for view in with_own for by_seed in view.own.values()}
        parts += [
            "**At each method's own best learning rate**, chosen with other seeds among half the baseline's, the same "
            f"and twice that; {count_seeds(own_seeds)} each. A sum of losses takes larger steps than one of them.",
            *_pairs(with_own, [view.own for view in with_own]),
        ]
    return parts


def _pairs(views: Sequence[View], runs: Sequence[BySeed]) -> list[str]:
    found = [{(c.better, c.worse): c for c in comparisons(view, own)} for view, own in zip(views, runs, strict=True)]
    rows = [["the paper's order", *(f"{view.task.title}: points | order" for view in views)]]
    rows.append(["---", *["---: | ---"] * len(views)])
    for better, worse in (pair for _, pairs in ORDERS for pair in pairs):
        if any((better, worse) in own for own in found):
            cells = [_cell(own.get((better, worse))) for own in found]
            rows.append([_pair(better, worse), *cells])
    numbers = [
        f"{view.task.title}: of {count(len(own), 'pair')} {_verdicts(list(own.values()))}"
        for view, own in zip(views, found, strict=True)
    ]
    return [lines(rows), f"{'. '.join(numbers)}."]


def _cell(comparison: Comparison | None) -> str:
    if comparison is None:
        return "– | not of this task"
    verdict = comparison.verdict
    return f"{comparison.text} | {f'**{verdict}**' if verdict == paper.DISAGREES else verdict}"


def convergence(views: Sequence[View]) -> list[str]:
    """Whether the baseline is at its best rate, converged, and below its teacher."""
    rows = [
        [
            "task", "learning rate", "accuracy at half, one and two times that", "last quarter", "seeds' deviation",
            "teacher over baseline",
        ],
        ["---", *["---:"] * 5],
    ]  # fmt: skip
    moving = []
    for view in views:
        if view.rate is None or "ce" not in view.main:
            continue
        split, baseline = view.splits[0], view.main["ce"]
        searched = view.searched("ce")
        last = _last_quarters(baseline, split)
        three = " / ".join(f"{searched[rate]:.2f}" for rate in (view.rate / 2, view.rate, view.rate * 2))
        own = of_seeds(baseline, split)
        teacher = 100 * view.teacher["accuracy"][split] - statistics.fmean(own.values()) if view.teacher else None
        if len(own) > 1 and last > statistics.stdev(own.values()):
            moving.append(view.task.title)
        rows.append(
            [
                view.task.title, f"{view.rate:g}", three, signed(last),
                f"{statistics.stdev(own.values()):.2f}" if len(own) > 1 else "–",
                signed(teacher) if teacher is not None else "–",
            ]
        )  # fmt: skip
    return [
        "The baseline's learning rate was searched with other seeds, in factors of two, until both neighbours of the "
        "best rate were no better. The table has accuracy on the first test set, in % or points: *last quarter* is "
        "what the last quarter of the epochs adds.",
        lines(rows),
        *([_caveat(moving)] if moving else []),
        *_lengths(views),
    ]


def _caveat(moving: Sequence[str]) -> str:
    """Caveat for tasks with a last quarter that adds more than the seeds differ."""
    return (
        f"**Caveat:** the baseline has not converged on {'; '.join(moving)}: the last quarter, in which the learning "
        "rate falls to zero, adds more than the seeds differ by. This page holds for training of this length."
    )


def _lengths(views: Sequence[View]) -> list[str]:
    """A table of longer training, at the same learning rate and with the same schedule stretched."""
    rows = [
        ["task", "epochs", "seeds", "baseline", "over half as many", "last quarter", "USKD over baseline"],
        ["---", *["---:"] * 6],
    ]
    for view in views:
        split = view.splits[0]
        before: dict[int, float] | None = None
        for factor in (1, *(length.factor for length in view.task.lengths)):
            baseline = view.longer(factor)
            own = of_seeds(baseline, split)
            if not own:
                continue
            more = compare_seeds("ce", "ce", own, before) if before else None
            uskd = compare_seeds("uskd", "ce", of_seeds(view.longer(factor, "uskd"), split), own)
            rows.append(
                [
                    view.task.title, str(view.task.epochs * factor), str(len(own)), mean_and_deviation([*own.values()]),
                    more.text if more else "–",
                    signed(_last_quarters(baseline, split)),
                    uskd.text if uskd else "–",
                ]
            )  # fmt: skip
            before = own
    longer = any(view.longer(length.factor) for view in views for length in view.task.lengths)
    return ["Longer training, with the same rate and a schedule stretched to it:", lines(rows)] if longer else []


def _last_quarters(runs: Mapping[int, Record], split: str) -> float:
    """Points that the last quarter of the epochs adds, in the mean of runs."""
    return statistics.fmean(_last_quarter(record["curve"]["accuracy"][split]) for record in runs.values())


def _last_quarter(curve: Sequence[float]) -> float:
    """Points that the last quarter of the epochs, at least one epoch, adds."""
    return 100 * (curve[-1] - curve[-1 - max(1, len(curve) // 4)]) if len(curve) > 1 else 0.0


def ablations(views: Sequence[View]) -> list[str]:
    """A summary, and a table for each ablation with runs."""
    parts: list[str] = []
    seeds: set[int] = set()
    summary = [["the other settings are", *(view.task.title for view in views)], ["---", *["---"] * len(views)]]
    for ablation in ABLATIONS:
        varied = [variant for variant in ablation.variants if variant.settings]
        own = [view for view in views if any(view.variant(ablation, variant) for variant in varied)]
        if own:
            parts += [f"**{ablation.title}** (the paper's {ablation.source})", _ablation(ablation, own)]
            summary.append([ablation.title, *(_against_own(ablation, view) for view in views)])
            seeds |= {len(view.variant(ablation, variant)) for view in own for variant in varied} - {0}
    if not parts:
        return ["Not run; `python -m study --part ablations page` does so."]
    return [
        "Accuracy in %, and in brackets the difference from the study's own setting, in points with its 95 % "
        "interval. All settings use the learning rate that the methods share. The study's own setting is the paper's "
        f"choice, with the seeds of the tables above; each other setting has {count_seeds(seeds)}. Other settings that "
        "are worse confirm the paper's choice; one that is better does not:",
        lines(summary),
        *parts,
    ]


def _over_own(ablation: Ablation, variant: Variant, view: View) -> Comparison | None:
    """Compare a variant with the study's own setting; None without runs."""
    split = view.splits[0]
    usual = of_seeds(view.main.get(ablation.method, {}), split)
    return compare_seeds(ablation.method, ablation.method, of_seeds(view.variant(ablation, variant), split), usual)


def _against_own(ablation: Ablation, view: View) -> str:
    found = [_over_own(ablation, variant, view) for variant in ablation.variants if variant.settings]
    verdicts = [comparison.verdict for comparison in found if comparison]
    words = {paper.DISAGREES: "worse", paper.AGREES: "better", paper.UNDECIDED: "undecided"}
    return ", ".join(f"{n} {word}" for verdict, word in words.items() if (n := verdicts.count(verdict))) or "–"


def _ablation(ablation: Ablation, views: Sequence[View]) -> str:
    rows = [[METHODS[ablation.method].title, *(view.task.title for view in views)], ["---", *["---:"] * len(views)]]
    for variant in ablation.variants:
        cells = []
        for view in views:
            split = view.splits[0]
            by_seed = of_seeds(view.variant(ablation, variant), split)
            if not by_seed:
                cells.append("–")
                continue
            cell = mean_and_deviation(by_seed.values())
            if variant.settings:
                compared = _over_own(ablation, variant, view)
                cell += f" ({compared.text})" if compared else ""
            cells.append(cell)
        rows.append([variant.title, *cells])
    return lines(rows)
