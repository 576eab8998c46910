"""``python -m benchmarks guard``: fails if a case's ratios to all baselines are over 15 % above the committed ones for
this kind of processor.

Times of two machines, or of one machine at two moments, do not compare; ratios of calls timed in turn do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.forms.providers import HEADLINE, LOSSES
from benchmarks.forms.spec import OURS
from benchmarks.measure import extras, machine
from benchmarks.measure.cases import Case
from benchmarks.measure.run import Options, Work, failures, run
from benchmarks.show.pages import SHAPES, SMALL
from benchmarks.show.report import case_name, entry_of, label, median, regimes_of, significant
from benchmarks.show.stored import load

RESULTS = Path(__file__).parent / "results"
LIMIT = 1.15
SAME = ("cpu", "cpu_family_model", "cpu_capability", "threads")  # two processors of one kind agree in these
REGRESSED, NOT_COMPARED = 1, 2  # exit statuses

Run = Callable[[Sequence[str]], dict[str, Any]]  # names of losses -> result


class Expected(NamedTuple):
    ratio: float
    file: str
    torch: str


def ratios(result: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Time ratios by (loss, comparison): fused_kd over other providers, and bfloat16 over float32."""
    found = {}
    cases = [(part["loss"], "", case) for part in result["losses"] for case in part["cases"]]
    cases += [("nkd", "fixed cost ", case) for case in result["fixed_cost"]]
    for loss, what, case in cases:
        ours = entry_of(case, OURS)
        for name in SMALL:
            entry = entry_of(case, name)
            if entry and ours:
                for regime in regimes_of(case):
                    key = (loss, f"{what}{case_name(case)}, {regime}, over {label(name)}")
                    found[key] = median(ours, regime) / median(entry, regime)
    for case in result["bfloat16"]:
        by_dtype = {entry["dtype"]: entry for entry in case["providers"] if entry["status"] == "ok"}
        if {extras.FLOAT32, extras.BFLOAT16} <= set(by_dtype):
            for regime in regimes_of(case):
                key = (case["loss"], f"{case['rows']}×{case['classes']}, {regime}, bfloat16 over float32")
                found[key] = median(by_dtype[extras.BFLOAT16], regime) / median(by_dtype[extras.FLOAT32], regime)
    return found


def same_processor(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in SAME)


def committed(folder: Path) -> list[Path]:
    """Results that git tracks, so not one that was just measured. Raises ValueError without git."""
    try:
        listed = subprocess.run(
            ("git", "ls-files", "-z", "--", "*.json"), cwd=folder, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"git cannot say which results are committed: {type(error).__name__}") from None
    return [folder / name for name in listed.split("\0") if name]


def expected(paths: Iterable[Path], here: dict[str, Any]) -> dict[tuple[str, str], Expected]:
    """Ratios on processors of the same kind as ``here``, each from the newest result that has it."""
    results = []
    for path in paths:
        try:
            result = load(path)
        except ValueError:  # a result of another benchmark
            continue
        on_cpu = all(case["device"] == "cpu" for part in result["losses"] for case in part["cases"])
        if on_cpu and same_processor(result["machine"], here):
            results.append((result["date"], path.name, result))
    found = {}
    for _, name, result in sorted(results, key=lambda each: each[:2]):
        torch_version = result["software"]["torch"]
        found.update({key: Expected(ratio, name, torch_version) for key, ratio in ratios(result).items()})
    return found


def _measured_of(key: tuple[str, str]) -> tuple[str, str]:
    """The loss and the case that a ratio belongs to; each has several ratios."""
    return key[0], key[1].split(", over ")[0]


def compare(wanted: dict[tuple[str, str], Expected], measure: Run) -> tuple[list[str], list[str]]:
    """Lines about all ratios, and about ratios that are too high. A ratio must be too high in two measurements."""
    now = ratios(measure([loss for loss in LOSSES if loss in {key[0] for key in wanted} & set(HEADLINE)]))
    shared = [key for key in wanted if key in now]
    again = sorted({loss for loss, what in shared if now[loss, what] > LIMIT * wanted[loss, what].ratio})
    if again:
        print(f"{', '.join(again)}: slower than committed, measured once more", flush=True)
        second = ratios(measure(again))
        now |= {key: min(now[key], ratio) for key, ratio in second.items() if key in now}
    # A baseline's own time varies (the allocator, for one), so fused_kd counts as slower only against all baselines.
    slower = {key for key in shared if not now[key] <= LIMIT * wanted[key].ratio}  # NaN is too high
    agreed = {_measured_of(key) for key in slower} - {_measured_of(key) for key in shared if key not in slower}
    lines, worse = [], []
    for key in shared:
        before, ratio = wanted[key].ratio, now[key]
        line = (
            f"{key[0]} {key[1]}: {significant(before)} committed, {significant(ratio)} now ({ratio / before - 1:+.0%})"
        )
        everywhere = _measured_of(key) in agreed
        lines.append(f"{line}; not against every baseline" if key in slower and not everywhere else line)
        if everywhere:
            worse.append(f"{line}, in {wanted[key].file}")
    return lines, worse


def _measure(losses: Sequence[str]) -> dict[str, Any]:
    def progress(text: str, share: float) -> None:
        print(f"\r[{share:4.0%}] {text:<60}", end="", file=sys.stderr, flush=True)

    plan = [
        Work(
            LOSSES[name],
            [provider for provider in LOSSES[name].providers if provider.name in (*SMALL, OURS)],
            [Case(*shape) for shape in SHAPES],
        )
        for name in losses
    ]
    options = Options(seconds=2.0, min_rounds=5, quick=True, extras=("fixed_cost", "bfloat16"))
    result = run(plan, options, progress)
    print(file=sys.stderr)
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    if problems := failures(result):
        raise ValueError("; ".join(problems))
    return result


def main(argv: Sequence[str], folder: Path = RESULTS, measure: Run = _measure) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks guard",
        description="Runs a short benchmark of NKD and USKD and compares its ratios with the committed results of this "
        f"kind of processor. Exit status {REGRESSED}: a case is more than {LIMIT - 1:.0%} slower against every "
        f"baseline; {NOT_COMPARED}: there is nothing to compare with.",
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads, default: PyTorch's choice"
    )
    torch.set_num_threads(max(1, parser.parse_args(argv).threads))
    here = machine.machine()
    kind = f"{here['cpu']} ({here['cpu_family_model']}, {here['cpu_capability']}) with {here['threads']} threads"
    try:
        wanted = {key: value for key, value in expected(committed(folder), here).items() if key[0] in HEADLINE}
        if not wanted:
            print(f"not compared: no committed result of NKD or USKD on {kind}; `python -m benchmarks` measures one")
            return NOT_COMPARED
        lines, worse = compare(wanted, measure)
    except ValueError as error:
        print(f"not compared: {error}")
        return NOT_COMPARED
    if not lines:
        print(f"not compared: the committed results on {kind} have none of the measured ratios")
        return NOT_COMPARED
    print("\n".join(lines))
    others = sorted({value.torch for value in wanted.values()} - {torch.__version__})
    if others:
        print(f"note: the committed ratios are from torch {', '.join(others)}, these are from {torch.__version__}")
    for line in worse:
        print(f"slower by more than {LIMIT - 1:.0%}: {line}")
    if not worse:
        print(f"{len(lines)} ratios on {kind}: no case is more than {LIMIT - 1:.0%} slower against every baseline")
    return REGRESSED if worse else 0
