"""All losses at a glance: a table per regime for the page of details, and one chart, made from a result alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.forms.spec import BASELINE, COMPILED, OURS
from benchmarks.show.plot import COLORS, GRID, INK, MUTED
from benchmarks.show.report import case_name, entry_of, label, lines, median, note, regimes_of, significant, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

YARDSTICK = "nkd"  # the other losses are compared with this one
SHADES = ("#d1495b", "#edae49", "#00798c", "#30638e")  # one per case


def cases(result: dict[str, Any]) -> list[str]:
    """Names of the cases with a time of fused_kd and of the published form for every loss."""
    names = [
        [case_name(case) for case in part["cases"] if entry_of(case, BASELINE) and entry_of(case, OURS)]
        for part in result["losses"]
    ]
    common = [name for name in names[0] if all(name in others for others in names)] if names else []
    if not common:
        raise ValueError(f"expected a case with a time of {label(BASELINE)} and of {label(OURS)} for every loss")
    return common


def regimes(result: dict[str, Any]) -> list[str]:
    return regimes_of(result["losses"][0]["cases"][0])


def title(part: dict[str, Any]) -> str:
    found: str = part["title"]
    return found.removesuffix(" loss")


def _case(part: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(case for case in part["cases"] if case_name(case) == name)
    return found


def _milliseconds(part: dict[str, Any], name: str, provider: str, regime: str) -> float | None:
    entry = entry_of(_case(part, name), provider)
    return median(entry, regime) if entry else None


def markdown(result: dict[str, Any]) -> str:
    """A table per regime, a line per loss: fused_kd's time, the others' as multiples of it, and it as a multiple of
    NKD's."""
    names = cases(result)
    yardstick = next((part for part in result["losses"] if part["loss"] == YARDSTICK), None)
    text = (
        "Forward + backward through the public function, each loss with its defaults: milliseconds of fused_kd, the "
        f"time of the {label(BASELINE)} form and of {label(COMPILED)} of a form without boolean masks as a multiple of "
        "it, and fused_kd's time as a multiple of its time for NKD."
    )
    for part in result["losses"]:
        positions = _case(part, names[0]).get("dense_positions")
        if positions:
            text += f" {title(part)} also reads the logits of {positions} positions of each row."
    return "\n\n".join([text, *(_table(result, names, yardstick, regime) for regime in regimes(result))])


def _table(result: dict[str, Any], names: list[str], yardstick: dict[str, Any] | None, regime: str) -> str:
    header = [f"loss, {regime}"]
    for name in names:
        header += [f"{name}: **{label(OURS)}**", label(BASELINE), label(COMPILED), "× NKD"]
    rows = [header, ["---", *("---:" for _ in header[1:])]]
    for part in result["losses"]:
        row = [title(part)]
        for name in names:
            ours = _milliseconds(part, name, OURS, regime)
            assert ours is not None  # cases() ensures it
            row.append(f"**{significant(ours)}**")
            for provider in (BASELINE, COMPILED):
                other = _milliseconds(part, name, provider, regime)
                row.append(times(other / ours) if other else "–")
            nkd = _milliseconds(yardstick, name, OURS, regime) if yardstick else None
            row.append(significant(ours / nkd, 2) if nkd else "–")
        rows.append(row)
    return lines(rows)


def plot(result: dict[str, Any], path: Path) -> None:
    """Write the PNG: for each loss and case the speed of fused_kd and torch.compile over the published form, a chart
    per regime."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, shown = cases(result), regimes(result)
    with plt.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK}):
        size = (1.4 + 7.2 * len(shown), 0.3 * len(result["losses"]) * (len(names) + 0.6) + 1.8)
        figure, panels = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False, sharey=True)
        for regime, axes in zip(shown, panels[0], strict=True):
            _draw(result, names, regime, axes)
        figure.supxlabel(note(result, 130 * len(shown)), x=0.01, ha="left", fontsize=7, color=MUTED)
        figure.savefig(path, dpi=160, facecolor="white")
        plt.close(figure)


def _draw(result: dict[str, Any], names: list[str], regime: str, axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    parts, thick = result["losses"], 0.8 / len(names)
    largest = smallest = 1.0
    for row, part in enumerate(parts):
        for number, name in enumerate(names):
            at = row + (number - (len(names) - 1) / 2) * thick
            published, ours, compiled = (
                _milliseconds(part, name, provider, regime) for provider in (BASELINE, OURS, COMPILED)
            )
            assert published is not None and ours is not None  # cases() ensures it
            speed = published / ours
            axes.barh(
                at,
                speed - 1,
                thick * 0.88,
                left=1,
                color=SHADES[number % len(SHADES)],
                label=f"fused_kd, {name}" if row == 0 else None,
                zorder=3,
            )
            axes.annotate(
                f"{times(speed)}  {significant(published)} → {significant(ours)} ms",
                (max(speed, 1.0), at),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                zorder=2,
            )
            if compiled:
                style: dict[str, Any] = {"color": "white", "edgecolors": COLORS[COMPILED], "linewidths": 1.6}
                axes.scatter(published / compiled, at, 26, **style, zorder=5)
                smallest = min(smallest, published / compiled)
            largest, smallest = max(largest, speed), min(smallest, speed)
    if any(entry_of(_case(part, name), COMPILED) for part in parts for name in names):
        axes.scatter([], [], 26, color="white", edgecolors=COLORS[COMPILED], linewidths=1.6, label=label(COMPILED))
    axes.set_xscale("log")
    axes.set_xlim(min(0.92, smallest / 1.2), largest * 4)  # room for the figures
    axes.set_ylim(len(parts) - 0.45, -0.55)
    axes.set_yticks(range(len(parts)), [title(part) for part in parts])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color=INK, lw=1, zorder=4)
    axes.grid(axis="x", color=GRID, lw=0.8, zorder=0)
    axes.tick_params(length=0, colors=INK)
    axes.tick_params(axis="y", labelsize=11)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_xlabel(f"speed over the {label(BASELINE)} form (log scale)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=9, borderaxespad=0.2)
    words = f"Forward + backward of every loss, {regime}: speed over the {label(BASELINE)} form"
    axes.set_title(words, x=0, ha="left", fontsize=12, fontweight="bold", pad=26)
