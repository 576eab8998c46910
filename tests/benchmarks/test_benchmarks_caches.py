"""Hot and cold calls: what runs before a cold one, what counts as its time, and results from before there were any."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # last, so that it cannot shadow an installed fused_kd

pytest.importorskip("rich")

from benchmarks import __main__ as cli  # noqa: E402
from benchmarks.forms.providers import NKD  # noqa: E402
from benchmarks.measure import caches, cases, timing  # noqa: E402
from benchmarks.measure import run as runner  # noqa: E402
from benchmarks.show import pages, report  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
FORMER = "nkd+uskd-cpu-20261124T153113-3c17eb6dee.json"


class Events:
    """Calls and other work that write down their turn; the work takes far longer than a call."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.seconds = 3e-3

    def __call__(self) -> None:
        self.seen.append("work")
        time.sleep(self.seconds)

    def call(self, name: str) -> Callable[[timing.Samples], None]:
        def run(samples: timing.Samples) -> None:
            start = time.perf_counter()
            self.seen.append(name)
            samples.both.append(time.perf_counter() - start)

        return run


def timed(regimes: tuple[str, ...], events: Events) -> dict[str, Any]:
    calls = {name: events.call(name) for name in ("a", "b")}
    return caches.time_calls(calls, regimes, events, 0.05, 3, lambda share: None)  # type: ignore[arg-type]


def test_other_work_runs_before_each_cold_call_and_before_no_hot_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "COLD_BLOCK", 0.02)  # of several calls
    events = Events()
    found = timed(("cold",), events)
    assert events.seen[::2] == ["work"] * (len(events.seen) // 2)
    assert set(events.seen[1::2]) == {"a", "b"}
    times = found["a"]["cold"]["milliseconds"]
    assert list(times) == ["both"] and times["both"]["median"] < events.seconds * 1e3 / 10
    assert found["a"]["cold"]["calls"] >= 3
    events = Events()
    assert list(timed(("hot",), events)["b"]) == ["hot"] and "work" not in events.seen


def test_cold_calls_take_turns() -> None:
    events = Events()
    timed(("cold",), events)
    turns = [name for name in events.seen if name != "work"][6:]  # after three of each to warm up
    blocks = [name for name, before in zip(turns, [None, *turns], strict=False) if name != before]
    assert blocks[:4] == ["a", "b", "a", "b"]


def test_the_gradient_is_gone_before_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its memory would be given back inside of the next cold call's time, or beside it."""
    inputs = cases.make_inputs(cases.Case(6, 11))
    function = NKD.provider("published").build()
    samples = timing.Samples()
    timing.timer("cpu")(function, inputs, samples)
    assert inputs.student_logits.grad is None and len(samples.both) == 1
    assert samples.forward[0] > 0 and samples.backward[0] > 0


def test_the_other_work_is_as_many_steps_as_last_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    work = caches.OtherWork("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert work.about()["steps"] == work.steps >= 1 and work.about()["milliseconds"] is None
    monkeypatch.setattr(caches, "TARGET", 10 * caches.TARGET)
    assert caches.OtherWork("cpu").steps > work.steps
    before = work.average.clone()
    weight = work.network.head.weight.detach().clone()
    work.weights.fill_(1.0)
    for _ in range(3):
        work()
    assert work.about()["milliseconds"] == caches.quantiles(work.taken) and len(work.taken) == 3
    assert not torch.equal(work.average, before) and not torch.equal(work.network.head.weight, weight)


def test_other_work_of_another_length_is_told() -> None:
    assert caches.doubts(None) == caches.doubts({"milliseconds": {"median": 5.0}}) == []
    assert "lasted 9.1 ms instead of 3 to 8" in caches.doubts({"milliseconds": {"median": 9.1}})[0]
    assert "lasted 0.4 ms" in caches.doubts({"milliseconds": {"median": 0.4}})[0]


@pytest.mark.parametrize("regime", ["cold", "hot"])
def test_one_regime_alone(regime: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--caches", regime, "--loss", "uskd", "--cases", "6x11", "--providers", "published,fused_kd"]
    assert cli.main([*argv, "--quick", "--seconds", "0.02", "--device", "cpu", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    result = cli.load(path)
    (case,) = result["losses"][0]["cases"]
    assert report.regimes_of(case) == [regime] == result["options"]["caches"]
    assert (result["other_work"] is not None) == (regime == "cold")
    for block in (pages.headline(result), pages.details(result)):
        assert ("Before a cold call other work ran for" in block) == (regime == "cold")
    assert ({"cold": "hot: **", "hot": "cold: **"}[regime]) not in pages.headline(result)


def test_a_result_of_the_former_schema_has_hot_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = json.loads((RESULTS / FORMER).read_text())
    assert raw["schema"] == 2
    result = cli.load(RESULTS / FORMER)
    assert result["schema"] == runner.SCHEMA
    for part, old in zip(result["losses"], raw["losses"], strict=True):
        for case, old_case in zip(part["cases"], old["cases"], strict=True):
            assert report.regimes_of(case) == ["hot"]
            for entry, before in zip(case["providers"], old_case["providers"], strict=True):
                if before["status"] == "ok":
                    assert report.median(entry, "hot") == before["milliseconds"]["both"]["median"]
                    assert entry["times"]["hot"]["fused_kd_speedup"] == before["fused_kd_speedup"]
    for argv in (["table"], ["table", "--details"]):
        assert cli.main([argv[0], str(RESULTS / FORMER), *argv[1:]]) == 0
    out = capsys.readouterr().out
    share = raw["losses"][1]["cases"][0]["ranking"]["share_of_loss"]
    assert f"| {report.percent(share)} |" in out and "hot: **fused_kd**" in out and "cold: **" not in out
    pytest.importorskip("matplotlib")
    assert cli.main(["plot", str(RESULTS / FORMER), "--output", str(tmp_path / "old.png")]) == 0
    older = tmp_path / "older.json"
    older.write_text(json.dumps({"schema": 1, "cases": []}))
    with pytest.raises(SystemExit):
        cli.main(["table", str(older)])
    assert f"schema 2 or {runner.SCHEMA}" in capsys.readouterr().err
