"""The README's plot: each provider's speed as a multiple of the published eager form's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.forms.spec import BASELINE, OURS
from benchmarks.show.report import case_name, entry_of, label, median, note, regimes_of, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
PANELS = 3  # for more losses than this overview.py draws one chart
COLUMNS = 4  # of the legend; the narrowest plot has room for them
COLORS = {
    "published": "#9aa5b1",
    "reference": "#c3b59b",
    "compile": "#7ba3cc",
    "cross_entropy": "#d5d9de",
    "liger": "#b7a6cf",
    "speculators": "#8fb8b0",
    "quack": "#cfc39a",
    "mdistiller": "#9cc3a5",
    "fused_kd": "#d1495b",
}


def speeds(part: dict[str, Any], regime: str) -> tuple[list[str], dict[str, list[float | None]]]:
    """Names of a loss's cases, and each provider's speed over the published eager form in each case."""
    cases = [case for case in part["cases"] if entry_of(case, BASELINE)]
    by_provider: dict[str, list[float | None]] = {}
    for name in dict.fromkeys(entry["name"] for case in cases for entry in case["providers"]):
        values: list[float | None] = []
        for case in cases:
            baseline, entry = entry_of(case, BASELINE), entry_of(case, name)
            assert baseline is not None
            values.append(median(baseline, regime) / median(entry, regime) if entry else None)
        if any(value is not None for value in values):
            by_provider[name] = values
    return [case_name(case) for case in cases], by_provider


def plot(result: dict[str, Any], path: Path) -> None:
    """Write the PNG: a row of panels per loss, a panel per regime."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = [part for part in result["losses"] if any(entry_of(case, BASELINE) for case in part["cases"])]
    if not parts:
        raise ValueError(f"the result holds no time of {label(BASELINE)}, to which the plot relates all others")
    shown = regimes_of(parts[0]["cases"][0])
    widest = max(len(speeds(part, shown[0])[0]) for part in parts)
    with plt.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK}):
        width = max(8.4, 2.1 * widest + 1.2)
        size = (width * len(shown), 4.1 * len(parts) + 0.5)
        figure, panels = plt.subplots(len(parts), len(shown), figsize=size, layout="constrained", squeeze=False)
        for part, row in zip(parts, panels, strict=True):
            for regime, axes in zip(shown, row, strict=True):
                _draw(part, regime, axes)
        figure.supxlabel(note(result, 120 * len(shown)), x=0.01, ha="left", fontsize=7, color=MUTED)
        figure.savefig(path, dpi=160, facecolor="white")
        plt.close(figure)


def _draw(part: dict[str, Any], regime: str, axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    cases, by_provider = speeds(part, regime)
    # The published form is the line at 1, so it needs no bar.
    bars = {name: values for name, values in by_provider.items() if name != BASELINE}
    other_losses = {entry["name"] for case in part["cases"] for entry in case["providers"] if not entry["same_loss"]}
    width = 0.84 / max(len(bars), 1)
    largest = max((value for values in bars.values() for value in values if value), default=1.0)
    smallest = min((value for values in bars.values() for value in values if value), default=1.0)
    for number, (name, values) in enumerate(bars.items()):
        ours = name == OURS
        offset = (number - (len(bars) - 1) / 2) * width
        text: str | None = label(name) + (" (another loss)" if name in other_losses else "")
        for position, value in enumerate(values):
            if value is None:
                continue
            # Bars start at 1 and point down if the provider is slower than the published form.
            x, below = position + offset, value < 1
            axes.bar(x, value - 1, width * 0.92, bottom=1, color=COLORS.get(name, MUTED), label=text, zorder=3)
            text = None  # one entry in the legend
            axes.annotate(
                times(value),
                (x, value),
                xytext=(0, -3 if below else 3),
                textcoords="offset points",
                ha="center",
                va="top" if below else "bottom",
                fontsize=10 if ours else 9,
                fontweight="bold" if ours else "normal",
                color=INK if ours else MUTED,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},  # hides grid lines behind the number
                zorder=2,
            )
    axes.set_yscale("log")
    axes.set_ylim(min(0.92, smallest / 1.3), largest * 1.5)
    spare = max(0.0, 2 - len(cases)) / 2  # keeps the bars of a single case narrow
    axes.set_xlim(-0.55 - spare, len(cases) - 0.45 + spare)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(range(len(cases)), [name.replace(" ", "\n") for name in cases])
    axes.set_ylabel(f"speed over {label(BASELINE)} (log scale)")
    axes.axhline(1, color=INK, lw=1, zorder=4)
    axes.grid(axis="y", color=GRID, lw=0.8, zorder=0)
    axes.tick_params(length=0, colors=INK)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=COLUMNS, frameon=False, fontsize=9, borderaxespad=0.2)
    title = f"{part['title']}, {regime}, forward + backward: speed over the {label(BASELINE)} form"
    axes.set_title(title, x=0, ha="left", fontsize=11, fontweight="bold", pad=8 + 16 * math.ceil(len(bars) / COLUMNS))
