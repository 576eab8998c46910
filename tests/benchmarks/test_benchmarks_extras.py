"""Extra measurements: the fixed cost of a call, bfloat16 against float32, a training step."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # last, so that it cannot shadow an installed fused_kd

pytest.importorskip("rich")

from benchmarks import __main__ as cli  # noqa: E402
from benchmarks.forms.providers import LOSSES, NKD  # noqa: E402
from benchmarks.forms.spec import Provider  # noqa: E402
from benchmarks.measure import cases, extras, timing  # noqa: E402
from benchmarks.measure import run as runner  # noqa: E402
from benchmarks.show import extras as tables  # noqa: E402
from benchmarks.show import pages, report, terminal  # noqa: E402

OPTIONS = runner.Options(seconds=0.02, min_rounds=1, extras=runner.EXTRAS)


def silent(text: str, share: float) -> None:
    assert 0 <= share <= 1


@pytest.fixture(scope="module", autouse=True)
def small() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extras, "LONG_ROWS", (8, 300))
        patch.setattr(extras, "STEP_ROWS", 8)
        patch.setattr(extras, "STEP_FEATURES", 16)
        patch.setattr(extras, "STEP_CLASSES", (30, 40))
        yield


def planned(*names: str) -> list[runner.Work]:
    return [
        runner.Work(
            LOSSES[name],
            [provider for provider in LOSSES[name].providers if provider.name != "compile"],
            [cases.Case(6, 11)],
        )
        for name in names
    ]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return runner.run(planned("nkd", "zipf_ls"), OPTIONS, silent)


def test_everything_is_measured(result: dict[str, Any]) -> None:
    assert not runner.failures(result)
    (fixed,) = result["fixed_cost"]
    assert [(entry["name"], list(entry["times"])) for entry in fixed["providers"]] == [
        ("cross_entropy", ["cold", "hot"]),
        ("fused_kd", ["cold", "hot"]),
    ]
    assert [case["loss"] for case in result["bfloat16"]] == ["nkd", "zipf_ls"]
    for case in result["bfloat16"]:
        assert [(e["dtype"], list(e["times"])) for e in case["providers"]] == [
            ("float32", ["cold", "hot"]),
            ("bfloat16", ["cold", "hot"]),
        ]
    assert [case["classes"] for case in result["training_step"]] == [30, 40]
    for case in result["training_step"]:
        assert [entry["name"] for entry in case["providers"]] == ["none", "published", "cross_entropy", "fused_kd"]
        for entry in case["providers"]:
            (own,) = entry["times"].values()  # cold
            assert ("loss" in own["milliseconds"]) == (entry["name"] != "none")
            if entry["name"] != "none":
                assert 0 < report.median(entry, "cold", "loss") < report.median(entry, "cold")


def test_not_without_the_first_loss_and_not_unasked() -> None:
    options = runner.Options(seconds=0.01, min_rounds=1, caches=("hot",), extras=runner.EXTRAS)
    kd = runner.run(planned("kd"), options, silent)
    assert kd["fixed_cost"] == kd["training_step"] == [] and len(kd["bfloat16"]) == 1
    assert list(kd["bfloat16"][0]["providers"][0]["times"]) == ["hot"]
    alone = runner.run(planned("nkd"), runner.Options(seconds=0.01, min_rounds=1, caches=("hot",)), silent)
    assert alone["fixed_cost"] == alone["training_step"] == alone["bfloat16"] == []
    assert list(tables.tables(alone)) == []


def test_a_step_gives_the_gradients_of_autograd() -> None:
    """Cut at the logits or not."""
    step = extras._make_step(30, "cpu", 0)
    function = NKD.provider("published").build()
    function(F.linear(step.hidden, step.weight, step.bias), step.teacher_logits, step.target).backward()
    expected = [tensor.grad for tensor in step.trained()]
    assert torch.equal(extras._weight_gradient(step, function), expected[1])
    seen: list[list[torch.Tensor]] = []
    kept = extras.Step.drop_gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            extras.Step,
            "drop_gradients",
            lambda self: (seen.append([tensor.grad for tensor in self.trained()]), kept(self)),
        )
        samples = timing.Samples()
        kept(step)
        extras._run_step(step, function, torch.empty(0), "cpu", samples)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-7)
    assert len(samples.both) == len(samples.loss) == 1 and step.weight.grad is None


def test_a_wrong_loss_in_a_step_is_found() -> None:
    def halved(student: torch.Tensor, other: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 0.99 * NKD.provider("published").build()(student, other, target)

    def broken(student: torch.Tensor, other: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel in /opt/somewhere/lib.so")

    providers = [
        Provider("published", "", lambda: halved),
        Provider("compile", "", lambda: broken),
        Provider("fused_kd", "", lambda: broken, lambda device: "not here"),
    ]
    found = extras.training_step(NKD, providers, 30, "cpu", 0, lambda calls, progress: {}, silent)
    status = {entry["name"]: (entry["status"], entry["reason"]) for entry in found["providers"]}
    assert status["published"][0] == "wrong" and "off by 1.0e-02" in status["published"][1]
    assert status["compile"] == ("failed", "RuntimeError: no such kernel in <path>")
    assert status["fused_kd"] == ("unavailable", "not here")


def test_wrong_values_beside_the_cases_fail_the_run(result: dict[str, Any]) -> None:
    for name in ("fixed_cost", "training_step", "bfloat16"):
        wrong = json.loads(json.dumps(result))
        wrong[name][0]["providers"][-1].update(status="wrong", reason="off")
        (failure,) = runner.failures(wrong)
        assert failure.endswith("fused_kd: off") and (name.split("_")[0] in failure or "nkd 8×300" in failure)


def with_medians(result: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(result))
    values = {"none": 10.0, "published": 30.0, "cross_entropy": 12.0, "fused_kd": 11.0}
    for name in ("fixed_cost", "training_step", "bfloat16"):
        for case in made[name]:
            for entry in case["providers"]:
                for regime, own in entry["times"].items():
                    both = values[entry["name"]] * (2 if regime == "cold" and name != "training_step" else 1)
                    both *= 0.5 if entry.get("dtype") == "bfloat16" else 1
                    own["milliseconds"]["both"]["median"] = both
                    if "loss" in own["milliseconds"]:
                        own["milliseconds"]["loss"]["median"] = both - 10
    return made


def test_tables_have_the_right_ratios(result: dict[str, Any]) -> None:
    made = with_medians(result)
    fixed, half, *steps = tables.tables(made)
    assert fixed.rows == [
        ["fused_kd", "22000", "11000"],
        ["F.cross_entropy", "24000", "12000"],
        ["ratio", "0.92", "0.92"],
    ]
    assert half.rows == [[name, "22.0", "11.0", "0.50", "11.0", "5.50", "0.50"] for name in ("NKD", "Zipf's LS")]
    assert [step.title[-10:] for step in steps] == ["30 classes", "40 classes"]
    assert steps[0].rows == [
        ["no loss", "10.0", "–", "–", ""],
        ["published eager", "30.0", "20.0", "67%", "20×"],
        ["F.cross_entropy", "12.0", "2.00", "17%", "2.0×"],
        ["fused_kd", "11.0", "1.00", "9.1%", ""],
    ]


def test_pages_and_terminal_have_them(result: dict[str, Any]) -> None:
    from rich.console import Console

    made = with_medians(result)
    details = pages.details(made)
    for rows in tables.tables(made):
        assert f"**{rows.title}**" in details
        assert "| " + " | ".join(rows.rows[0]) + " |" in details
    assert "\n| NKD, the fixed cost | 1×10 | **22.0** | 1.1× | – | – | **11.0** | 1.1× | – | – |" in pages.headline(
        made
    )
    console = Console(width=100, record=True, file=io.StringIO())
    terminal.print_result(made, console)
    text = console.export_text()
    assert "…" not in text
    for words in ("The fixed cost of a call", "bfloat16 against float32", "A training step with 30 classes"):
        assert words in text


def test_extras_are_for_runs_of_the_usual_cases(tmp_path: Path) -> None:
    argv = ["--loss", "nkd", "--cases", "6x11", "--providers", "fused_kd", "--seconds", "0.01", "--no-plot"]
    assert cli.main([*argv, "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert cli.load(path)["training_step"] == []
