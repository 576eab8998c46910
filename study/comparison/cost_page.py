"""The page's section on the cost of a step."""

from __future__ import annotations

from typing import Any

from benchmarks.show.report import lines, percent, significant, size
from study.comparison.plan import METHODS
from study.comparison.results import count

#: Forms of a loss in the record of the cost, and their titles.
FORMS = {"published": "published", "eager": "eager", "fused": "fused_kd", "PyTorch": "F.cross_entropy"}
OF_FUSED_KD = ("published", "eager", "fused")
Cost = dict[str, Any]


def largest(cost: Cost) -> list[dict[str, Any]]:
    """Measurements of fused_kd's losses at the largest number of classes."""
    rows = [row for row in cost["rows"] if "fused" in row["forms"]]
    return [row for row in rows if row["classes"] == max(row["classes"] for row in rows)]


def sentences(cost: Cost) -> list[str]:
    """List items for the top of the page: the shares of a step that NKD and USKD take."""
    parts = []
    for row in largest(cost):
        if row["method"] in ("nkd", "uskd"):
            shares = {form: times["loss"] / times["step"] for form, times in row["forms"].items()}
            parts.append(
                f"- At {row['classes']} classes **{METHODS[row['method']].title}** takes "
                f"{percent(shares['published'])} of a training step as published, {percent(shares['eager'])} in the "
                f"mask-free eager form, {percent(shares['fused'])} with fused_kd."
            )
    return parts


def _row(cost: Cost, method: str, classes: int) -> dict[str, Any] | None:
    return next((row for row in cost["rows"] if row["method"] == method and row["classes"] == classes), None)


def section(cost: Cost | None, picture: str) -> list[str]:
    """Parts of the section."""
    if not cost:
        return ["Not measured; `python -m study --part cost page` does so."]
    classes = sorted({row["classes"] for row in cost["rows"]})
    row = cost["rows"][0]
    steps, threads = count(row["steps"], "step"), count(row["threads"], "thread")
    parts = [
        f"Each step uses a batch of {row['batch_size']} and runs forward, the teacher's forward if there is one, loss, "
        "backward and update. The loss's part is measured in the same step: its forward and its backward to the "
        f"logits, cross-entropy included. Times are medians over {steps} with {threads}. The methods run one after the "
        'other; the forms of a loss take turns, one step each. "Eager" is `fused_kd.reference`, without boolean masks; '
        '"published" has the operations of the authors\' releases, as in `benchmarks/`. The networks are '
        f"{cost['student']} and its teacher {cost['teacher']}, on glyphs of 32 × 32 pixels.",
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
        found = [(method, _row(cost, method, number)) for method in METHODS]
        rows += [[METHODS[method].title, *_cost_cells(entry["forms"])] for method, entry in found if entry]
        parts += [f"**{number} classes**", lines(rows)]
    if most := largest(cost):
        shares = {
            form: [row["forms"][form]["loss"] / row["forms"][form]["step"] for row in most] for form in OF_FUSED_KD
        }
        all_of_them = ", as many as the fonts allow," if classes[-1] == cost["most_classes"] else ""
        ranges = ", ".join(
            f"{FORMS[form]} {percent(min(values))} to {percent(max(values))}" for form, values in shares.items()
        )
        parts.append(
            f"At {classes[-1]} classes{all_of_them} the loss's share of a step depends on the method: {ranges}."
        )
    parts += [
        "The peak memory that a step allocates for the teacher, activations, logits and gradients:",
        _memory(cost, classes),
        "All measurements are on the CPU, none on a GPU.",
    ]
    return parts


def _memory(cost: Cost, classes: list[int]) -> str:
    rows = [
        ["method", *(f"{number}: {' | '.join(FORMS[form] for form in OF_FUSED_KD)}" for number in classes)],
        ["---", *["---:"] * (len(classes) * len(OF_FUSED_KD))],
    ]
    for method in METHODS:
        entries = [_row(cost, method, number) for number in classes]
        if all(entries):
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
