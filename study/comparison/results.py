"""The study's results, a JSON file, and how the page reads and words them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study.comparison.plan import CONTROL
from study.training import checkpoint
from study.training.errors import RunError


def read(path: Path) -> dict[str, Any]:
    """Results as JSON.

    Raises:
        RunError: There are none, or the file has something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: no results of a study ({type(error).__name__})") from None
    if not isinstance(results, dict):
        raise RunError(f"{path}: no results of a study")
    return results


def write(path: Path, results: dict[str, Any]) -> None:
    """Results as JSON, whole or not at all."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--page: {path.parent} cannot be made ({error.strerror})") from None
    checkpoint.write(path, lambda file: file.write(f"{text}\n".encode()))


def accuracies(results: dict[str, Any], split: str) -> dict[str, dict[int, float]]:
    """In %, by method and seed."""
    found: dict[str, dict[int, float]] = {}
    for run in results["runs"]:
        found.setdefault(run["method"], {})[run["seed"]] = 100 * run["accuracy"][split]
    return found


def splits(results: dict[str, Any]) -> list[str]:
    """Test sets by name, the first one the one that counts."""
    return list(results["runs"][0]["accuracy"])


def cost_of(results: dict[str, Any], method: str, classes: int) -> dict[str, Any] | None:
    """The measured cost of a method's step, if there is one. The control has the baseline's steps."""
    method = "ce" if method == CONTROL else method
    rows = results.get("cost", {}).get("rows", ())
    return next((row for row in rows if row["method"] == method and row["classes"] == classes), None)


def form_of(row: dict[str, Any]) -> dict[str, float]:
    """Seconds and bytes of a step with the form of the loss that the runs had."""
    form: dict[str, float] = row["forms"].get("fused") or row["forms"]["PyTorch"]
    return form


def mean_and_deviation(values: Sequence[float], digits: int = 2) -> str:
    """As text; a deviation, of the sample, from two values on."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def signed(points: float) -> str:
    """A difference in points, with its sign."""
    return f"{points:+.2f}".replace("-", "−")
