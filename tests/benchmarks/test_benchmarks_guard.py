"""`make bench-guard`: planted regressions fail, noise and other processors do not, and what is not compared is told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # last, so that it cannot shadow an installed fused_kd

pytest.importorskip("rich")

from benchmarks import __main__ as cli  # noqa: E402
from benchmarks import guard  # noqa: E402
from benchmarks.forms.providers import LOSSES  # noqa: E402
from benchmarks.measure import cases, extras  # noqa: E402
from benchmarks.measure import run as runner  # noqa: E402


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """A real one, of a tiny case, with times that all are 1 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extras, "LONG_ROWS", (8, 300))
        providers = ("published", "cross_entropy", "fused_kd")
        plan = [
            runner.Work(loss, [loss.provider(each) for each in providers], [cases.Case(6, 11)])
            for loss in (LOSSES["nkd"], LOSSES["uskd"])
        ]
        options = runner.Options(seconds=0.01, min_rounds=1, extras=("fixed_cost", "bfloat16"))
        found: dict[str, Any] = json.loads(json.dumps(runner.run(plan, options, lambda text, share: None)))
    for _, case in runner._all_cases(found):
        for entry in case["providers"]:
            for own in entry["times"].values():
                own["milliseconds"]["both"]["median"] = 1.0
    return found


def changed(result: dict[str, Any], factor: float, loss: str = "nkd", regime: str = "cold") -> dict[str, Any]:
    """With another time of fused_kd in one regime of one loss."""
    made: dict[str, Any] = json.loads(json.dumps(result))
    (part,) = (part for part in made["losses"] if part["loss"] == loss)
    for entry in part["cases"][0]["providers"]:
        if entry["name"] == "fused_kd":
            entry["times"][regime]["milliseconds"]["both"]["median"] *= factor
    return made


@pytest.fixture
def folder(tmp_path: Path, result: dict[str, Any]) -> Path:
    """A repository with that result, and one of another benchmark."""
    subprocess.run(("git", "init", "-q"), cwd=tmp_path, check=True)
    commit(tmp_path, "old.json", result)
    (tmp_path / "other.json").write_text('{"schema": "source-1"}')
    return tmp_path


def commit(folder: Path, name: str, result: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(result))
    subprocess.run(("git", "add", "."), cwd=folder, check=True)


class Measured:
    """Gives results one after the other, and remembers for which losses."""

    def __init__(self, *results: dict[str, Any]) -> None:
        self.results, self.asked = list(results), []  # type: ignore[var-annotated]

    def __call__(self, losses: Sequence[str]) -> dict[str, Any]:
        self.asked.append(list(losses))
        return self.results.pop(0)


def test_the_same_ratios_pass(folder: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    measure = Measured(changed(changed(result, 1.14), 0.5, "uskd"))
    assert guard.main([], folder, measure) == 0
    assert measure.asked == [["nkd", "uskd"]]
    out = capsys.readouterr().out
    assert "nkd 6×11 float32, cold, over F.cross_entropy: 1.00 committed, 1.14 now (+14%)" in out
    assert "uskd 6×11 float32, cold, over published eager: 1.00 committed, 0.500 now (-50%)" in out
    assert "nkd fixed cost 1×10 float32, hot, over F.cross_entropy" in out
    assert "uskd 8×300, hot, bfloat16 over float32" in out
    assert "no case is more than 15% slower against every baseline" in out


@pytest.mark.parametrize("regime", ["cold", "hot"])
def test_a_planted_regression_fails(
    regime: str, folder: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    slow = changed(result, 1.16, "uskd", regime)
    measure = Measured(slow, slow)
    assert guard.main([], folder, measure) == guard.REGRESSED
    assert measure.asked == [["nkd", "uskd"], ["uskd"]], "what is slower is measured a second time"
    out = capsys.readouterr().out
    assert f"slower by more than 15%: uskd 6×11 float32, {regime}, over F.cross_entropy: 1.00 committed, 1.16" in out
    assert "in old.json" in out and "slower by more than 15%: nkd" not in out


@pytest.mark.parametrize("place", ["fixed_cost", "bfloat16"])
def test_a_regression_beside_the_cases_fails(place: str, folder: Path, result: dict[str, Any]) -> None:
    slow = json.loads(json.dumps(result))
    slow[place][0]["providers"][-1]["times"]["hot"]["milliseconds"]["both"]["median"] = 1.2
    assert guard.main([], folder, Measured(slow, slow)) == guard.REGRESSED


def test_what_is_slow_only_once_passes(folder: Path, result: dict[str, Any]) -> None:
    assert guard.main([], folder, Measured(changed(result, 3.0), result)) == 0


def test_a_ratio_that_alone_is_high_passes_and_is_told(
    folder: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    faster = json.loads(json.dumps(result))
    (case,) = faster["losses"][0]["cases"]
    (entry,) = (each for each in case["providers"] if each["name"] == "published")
    entry["times"]["hot"]["milliseconds"]["both"]["median"] /= 2
    assert guard.main([], folder, Measured(faster, faster)) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "not against every baseline" in line]
    (line,) = told
    assert line.startswith("nkd 6×11 float32, hot, over published eager: 1.00 committed, 2.00 now")


def test_no_number_is_a_regression(folder: Path, result: dict[str, Any]) -> None:
    nan = changed(result, float("nan"))
    assert guard.main([], folder, Measured(nan, nan)) == guard.REGRESSED


@pytest.mark.parametrize("name", guard.SAME)
def test_another_processor_is_told(
    name: str, folder: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads(json.dumps(result))
    other["machine"][name] = 64 if name == "threads" else "another"
    commit(folder, "old.json", other)
    measure = Measured()
    assert guard.main([], folder, measure) == guard.NOT_COMPARED and not measure.asked
    assert "not compared: no committed result of NKD or USKD on" in capsys.readouterr().out


def test_the_newest_committed_result_counts(folder: Path, result: dict[str, Any]) -> None:
    newer = {**changed(result, 2.0), "date": "2999-01-01T00:00:00+00:00"}
    assert guard.main([], folder, Measured(changed(result, 2.2), changed(result, 2.2))) == guard.REGRESSED
    (folder / "new.json").write_text(json.dumps(newer))  # not known to git
    assert guard.main([], folder, Measured(changed(result, 2.2), changed(result, 2.2))) == guard.REGRESSED
    commit(folder, "new.json", newer)
    assert guard.main([], folder, Measured(changed(result, 2.2))) == 0


def test_without_git_nothing_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guard.main([], tmp_path, Measured()) == guard.NOT_COMPARED
    assert "not compared: git cannot say" in capsys.readouterr().out


def test_another_torch_is_told(folder: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    old = json.loads(json.dumps(result))
    old["software"]["torch"] = "1.0"
    commit(folder, "old.json", old)
    assert guard.main([], folder, Measured(result)) == 0
    assert f"from torch 1.0, these are from {torch.__version__}" in capsys.readouterr().out


def test_the_command_measures(folder: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From start to end with real times, which here are far from what is planted on either side."""
    monkeypatch.setattr(guard, "HEADLINE", ("nkd",))
    monkeypatch.setattr(guard, "SHAPES", ((6, 11),))
    monkeypatch.setattr(guard, "SMALL", ("published", "cross_entropy"))
    monkeypatch.setattr(extras, "LONG_ROWS", (8, 300))
    options = runner.Options
    monkeypatch.setattr(guard, "Options", lambda **given: options(**{**given, "seconds": 0.01, "min_rounds": 1}))
    monkeypatch.setattr(guard.main, "__defaults__", (folder, guard._measure))
    for factor, status in ((1e3, 0), (1e-3, guard.REGRESSED)):
        made = json.loads(json.dumps(result))
        for _, case in runner._all_cases(made):
            for entry in case["providers"]:
                if entry["name"] == "fused_kd" and entry.get("dtype") != "float32":
                    for own in entry["times"].values():
                        own["milliseconds"]["both"]["median"] *= factor
        commit(folder, "old.json", made)
        assert cli.main(["guard", "--threads", str(result["machine"]["threads"])]) == status


def test_a_faster_baseline_alone_is_no_regression(folder: Path, result: dict[str, Any]) -> None:
    faster = changed(result, 1.0)
    (part,) = (part for part in faster["losses"] if part["loss"] == "nkd")
    for entry in part["cases"][0]["providers"]:
        if entry["name"] == "published":
            entry["times"]["hot"]["milliseconds"]["both"]["median"] /= 2.0
    assert guard.main([], folder, Measured(faster, faster)) == 0
    slower = changed(faster, 2.0, regime="hot")
    assert guard.main([], folder, Measured(slower, slower)) == guard.REGRESSED
