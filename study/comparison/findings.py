"""The page's sections that say what the results come to: the paper's order, and what a step costs."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.show.report import lines, percent, significant, size
from study.comparison import paper
from study.comparison.plan import CONTROL, METHODS
from study.comparison.results import accuracies, cost_of, count, signed, splits

#: Forms of a loss as the cost has them, and their titles.
FORMS = {"published": "published", "eager": "eager", "fused": "fused_kd", "PyTorch": "F.cross_entropy"}
OF_FUSED_KD = ("published", "eager", "fused")
ORDERS = (("With a teacher", paper.WITH_TEACHER), ("Without a teacher", paper.TEACHER_FREE))


def outcome(results: dict[str, Any]) -> str:
    """The whole in some lines, for the head of the page and for docs/which-loss.md."""
    first = splits(results)[0]
    found, parts = accuracies(results, first), []
    means = {name: statistics.fmean(by_seed.values()) for name, by_seed in found.items()}
    for title, pairs in ORDERS:
        comparisons = paper.compare_all(pairs, found)
        if not comparisons:
            continue
        names = {name for pair in pairs for name in pair if name in means}
        best = max(names, key=lambda name: means[name])
        numbers = [sum(c.verdict == verdict for c in comparisons) for verdict in paper.VERDICTS]
        parts.append(
            f"- **{title}** {METHODS[best].title} is best on {first}, with {means[best]:.2f} % against the baseline's "
            f"{means['ce']:.2f} %. Of {len(comparisons)} pairs that the paper ranks, {numbers[0]} have the same order "
            f"here, {numbers[1]} the opposite order, and {numbers[2]} are undecided."
            if "ce" in means
            else f"- **{title}** {METHODS[best].title} is best on {first}, {means[best]:.2f} %."
        )
    control = _control(results)
    if control:
        parts.append(
            f"- A control, the baseline with twice the learning rate, has {means[CONTROL]:.2f} %. Of the "
            f"{len(control[0])} methods above the baseline, {len(control[1])} are better than the control as well"
            f"{_named(control[1])}."
        )
    for row in _largest(results):
        if row["method"] in ("nkd", "uskd"):
            shares = {form: times["loss"] / times["step"] for form, times in row["forms"].items()}
            title, classes = METHODS[row["method"]].title, row["classes"]
            parts.append(
                f"- At {classes} classes **{title}** takes {percent(shares['published'])} of a training step as "
                f"published, {percent(shares['eager'])} in the mask-free eager form, {percent(shares['fused'])} with "
                "fused_kd."
            )
    return "\n".join(parts)


def _largest(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured of fused_kd's losses at the largest number of classes."""
    rows = [row for row in results.get("cost", {}).get("rows", ()) if "fused" in row["forms"]]
    return [row for row in rows if row["classes"] == max(row["classes"] for row in rows)]


def orders(results: dict[str, Any]) -> list[str]:
    names = splits(results)
    by_split = [accuracies(results, name) for name in names]
    parts = [
        "The paper has NKD over DKD over KD over the baseline with a teacher, and USKD over Zipf's LS and Tf-KD over "
        "label smoothing over the baseline without one. For each pair the difference is taken seed by seed, as runs of "
        "one seed start from the same weights and see the same batches. It counts if the 95 % interval of its mean "
        "(Student's t) excludes zero, in either direction; otherwise the pair is undecided. With three seeds that "
        "interval is 2.5 times the deviation of the differences to each side. The pairs are not independent of each "
        "other, and of twenty pairs without a true difference one would seem to have one.",
    ]
    for title, pairs in ORDERS:
        found = [paper.compare_all(pairs, accuracy) for accuracy in by_split]
        if not found[0]:
            continue
        rows = [
            ["the paper's order", *(f"{name}, points | paper's order there" for name in names)],
            ["---", *["---: | ---"] * len(names)],
        ]
        for same in zip(*found, strict=True):
            pair = f"{METHODS[same[0].better].title} over {METHODS[same[0].worse].title}"
            rows.append([pair, *(f"{_difference(c)} | {_verdict(c)}" for c in same)])
        parts += [f"**{title}**", lines(rows)]
        parts += [f"On {name}: {paper.sentence(c)}" for name, c in zip(names, found, strict=True)]
    return [*parts, *_remarks(results)]


def _difference(comparison: paper.Comparison) -> str:
    half = "" if comparison.half_width is None else f" ± {comparison.half_width:.2f}"
    return f"{signed(comparison.difference)}{half}"


def _verdict(comparison: paper.Comparison) -> str:
    verdict = comparison.verdict
    return f"**{verdict}**" if verdict == paper.DISAGREES else verdict


def _remarks(results: dict[str, Any]) -> list[str]:
    """What the results say about reasons, and no more."""
    first = splits(results)[0]
    found = {name: list(by_seed.values()) for name, by_seed in accuracies(results, first).items()}
    means = {name: statistics.fmean(values) for name, values in found.items()}
    parts = []
    deviations = [statistics.stdev(values) for values in found.values() if len(values) > 1]
    if deviations and len(means) > 1:
        parts.append(
            f"The best method is {max(means.values()) - min(means.values()):.2f} points above the worst on "
            f"{first}; a method's standard deviation over the seeds is {min(deviations):.2f} to {max(deviations):.2f}."
        )
    baseline = [run for run in results["runs"] if run["method"] == "ce"]
    for name in ("ce", CONTROL):
        chosen = [run for run in results["runs"] if run["method"] == name]
        if chosen:
            train = statistics.fmean(run["training_loss"] for run in chosen)
            test = statistics.fmean(run["test_loss"][first] for run in chosen)
            parts.append(
                f"The cross-entropy of the {METHODS[name].title} in its last epoch is {train:.2f} on training images "
                f"(shifted, before each update) and {test:.2f} on {first}."
            )
    if results["teacher"] and baseline:
        gap = 100 * results["teacher"]["accuracy"][first] - means["ce"]
        (network, source), (student, _) = paper.TEACHER, paper.IMAGENET["ce"]
        parts.append(
            f"On {first} the teacher is {signed(gap)} points from the baseline; the ResNet-34 that teaches the paper's "
            f"ResNet-18 is {signed(network - student)} from it ({source})."
        )
    control = _control(results)
    if control:
        better, beaten = control
        gain = means[CONTROL] - means["ce"]
        parts.append(
            "Most losses here add a term to the whole cross-entropy and so take larger steps, which by itself may help "
            "in a short schedule. The baseline with twice the learning rate, a control that the paper does not have, "
            f"is {signed(gain)} points from the baseline. Of the {len(better)} methods whose mean is above the "
            f"baseline's, {len(beaten)} are better than the control, too, by the rule above{_named(beaten)}."
        )
        if gain > 0:
            parts.append(
                "So the learning rate is low for such a schedule (it is the usual one of `study/train.py`, not tuned), "
                "and what the other methods gain over the baseline may come from the larger steps alone."
            )
    return [" ".join(parts)] if parts else []


def _control(results: dict[str, Any]) -> tuple[list[str], list[str]] | None:
    """Methods with a mean above the baseline's, and those of them that are better than the control."""
    accuracy = accuracies(results, splits(results)[0])
    if CONTROL not in accuracy or "ce" not in accuracy:
        return None
    means = {name: statistics.fmean(by_seed.values()) for name, by_seed in accuracy.items()}
    better = [name for name in means if means[name] > means["ce"] and name not in ("ce", CONTROL)]
    compared = {name: paper.compare(name, CONTROL, accuracy) for name in better}
    return better, [name for name, found in compared.items() if found and found.verdict == paper.AGREES]


def _named(methods: list[str]) -> str:
    return f": {', '.join(METHODS[name].title for name in methods)}" if methods else ""


def cost(results: dict[str, Any], picture: str) -> list[str]:
    cost = results.get("cost")
    if not cost:
        return ["Not measured; `python -m study --only cost page` does so."]
    classes = sorted({row["classes"] for row in cost["rows"]})
    row = cost["rows"][0]
    steps, threads = count(row["steps"], "step"), count(row["threads"], "thread")
    parts = [
        f"A step gets a batch of {row['batch_size']} and runs forward, the teacher's forward where there is one, loss, "
        "backward and update. The loss's part of it is measured on the same step: its forward, and its backward to the "
        f"logits, with the cross-entropy beside it. Times are medians over {steps} with {threads}. The methods run one "
        'after the other; the forms of a loss take turns, a step each. "Eager" is `fused_kd.reference`, without '
        'boolean masks; "published" has the operations of the authors\' releases, as in `benchmarks/`. Seconds an '
        "epoch in the tables above are fused_kd's step here times the steps of an epoch.",
        picture,
    ]
    for number in classes:
        rows = [
            [
                "method",
                *(f"{FORMS[form]}: step, ms | loss, ms | share" for form in OF_FUSED_KD),
                "step, published ÷ fused",
            ],
            ["---", *["---: | ---: | ---:"] * len(OF_FUSED_KD), "---:"],
        ]
        for method in results["methods"]:
            entry = cost_of(results, method, number)
            if entry and method != CONTROL:
                rows.append([METHODS[method].title, *_cost_cells(entry["forms"])])
        parts += [f"**{number} classes**", lines(rows)]
    largest = _largest(results)
    if largest:
        shares = {
            form: [row["forms"][form]["loss"] / row["forms"][form]["step"] for row in largest] for form in OF_FUSED_KD
        }
        most = ", as many as the fonts allow," if classes[-1] == cost["most_classes"] else ""
        ranges = ", ".join(
            f"{FORMS[form]} {percent(min(values))} to {percent(max(values))}" for form, values in shares.items()
        )
        parts.append(
            f"At {classes[-1]} classes{most} the loss's share of a step ranges over the methods as follows: {ranges}."
        )
    parts += [
        "The most memory that a step allocates, teacher, activations, logits and gradients together:",
        _memory(results, classes),
        "All this is on the CPU; it was not measured on a GPU.",
    ]
    return parts


def _memory(results: dict[str, Any], classes: list[int]) -> str:
    rows = [
        ["method", *(f"{number}: {' | '.join(FORMS[form] for form in OF_FUSED_KD)}" for number in classes)],
        ["---", *["---:"] * (len(classes) * len(OF_FUSED_KD))],
    ]
    for method in results["methods"]:
        entries = [cost_of(results, method, number) for number in classes]
        if method != CONTROL and all(entries):
            forms = [entry["forms"] for entry in entries if entry]
            cells = [[size(int(own[form]["memory"])) if form in own else "–" for form in OF_FUSED_KD] for own in forms]
            for own, row in zip(forms, cells, strict=True):
                if "PyTorch" in own:
                    row[-1] = size(int(own["PyTorch"]["memory"]))
            rows.append([METHODS[method].title, *(" | ".join(row) for row in cells)])
    return lines(rows)


def _cost_cells(seconds: dict[str, Any]) -> list[str]:
    if "PyTorch" in seconds:
        return [*["– | – | –"] * 2, _times(seconds["PyTorch"]), ""]
    factor = seconds["published"]["step"] / seconds["fused"]["step"]
    return [*(_times(seconds[form]) for form in OF_FUSED_KD), f"{significant(factor)}×"]


def _times(times: dict[str, float]) -> str:
    share = percent(times["loss"] / times["step"])
    return f"{significant(1e3 * times['step'])} | {significant(1e3 * times['loss'])} | {share}"
