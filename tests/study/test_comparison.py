"""The study: a tiny one is made for real, its page is made of results alone, and what it says of orders is so."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import train_runs
from study_results import ACCURACY, made_up

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

from study import __main__ as study
from study.comparison import cost, findings, page, paper, plan, results, runs
from study.training import methods
from study.training.errors import RunError
from study.training.networks import Outputs

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--methods", "ce", "nkd", "--seeds", "0", "1", "--epochs", "2", "--batch-size", "16", "--student", "cnn-tiny",
    "--teacher", "cnn-tiny", "--classes", "20", "--cost-steps", "2", "--cost-classes", "20",
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """Runs are of the tiny data, and no fonts are looked for."""
    monkeypatch.setattr(runs, "TRAIN", (sys.executable, train_runs.__file__))
    monkeypatch.setattr(study, "COST", (sys.executable, train_runs.__file__, "cost"))
    monkeypatch.setattr(study, "most_classes", lambda: 3755)


def main(folder, *arguments):
    return study.main(["--out", str(folder / "runs"), "--page", str(folder / "page.md"), *TINY, *arguments])


@pytest.mark.slow
def test_a_study_that_broke_off_goes_on_and_is_not_made_twice(tmp_path, tiny, monkeypatch, capsys):
    with monkeypatch.context() as context:
        context.setenv("KILL_AT_STEP", "12")  # in the second of two epochs
        assert main(tmp_path, "--jobs", "1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "study: run teacher: killed by signal 9; the same command goes on"
    assert main(tmp_path) == 0
    assert "goes on at step 8 of 16" in (tmp_path / "runs" / "teacher" / "log.txt").read_text()
    found = results.read(tmp_path / "page.json")
    assert [(run["method"], run["seed"]) for run in found["runs"]] == [("ce", 0), ("ce", 1), ("nkd", 0), ("nkd", 1)]
    assert found["runs"][0]["training_loss"] != found["runs"][1]["training_loss"]
    assert found["teacher"]["peak_memory"] > 2**20
    rows = {row["method"]: row for row in found["cost"]["rows"]}
    assert set(rows["ce"]["forms"]) == {"PyTorch"}
    assert set(rows["nkd"]["forms"]) == {"fused", "eager", "published"}
    for times in (*rows["ce"]["forms"].values(), *rows["nkd"]["forms"].values()):
        assert 0 < times["loss"] < times["step"] and times["memory"] > 16 * 20 * 4  # the logits at least
    text = (tmp_path / "page.md").read_text()
    assert "| NKD |" in text and "20 classes" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"page-accuracy.png", "page-cost.png"}

    monkeypatch.setattr(runs, "TRAIN", ("false",))
    assert main(tmp_path, "--only", "runs", "collect", "page") == 0
    assert results.read(tmp_path / "page.json") == found
    assert (tmp_path / "page.md").read_text() == text
    capsys.readouterr()
    assert main(tmp_path, "--epochs", "3") == 2
    assert "has a study with another --epochs (2, not 3)" in capsys.readouterr().err


def test_what_is_missing_is_said():
    found = made_up()
    found["runs"] = [run for run in found["runs"] if (run["method"], run["seed"]) not in (("uskd", 1), ("nkd", 2))]
    assert "these runs are missing: NKD with seed 2, USKD with seed 1." in page.markdown(found, "study")
    assert "missing" not in page.markdown(made_up(), "study")


def test_jobs_are_of_all_methods_and_seeds_and_the_teacher_comes_first():
    made = plan.jobs(plan.Setting(), tuple(plan.METHODS), (0, 1, 2), Path("cache"), Path("out"))
    assert len({job.name for job in made}) == len(made) == 1 + 9 * 3 and made[0].name == "teacher"
    waiting = {job.name.rpartition("-")[0] for job in made if job.after == "teacher"}
    assert (
        waiting == {"kd", "dkd", "nkd"} == {job.name.rpartition("-")[0] for job in made if "--teacher" in job.options}
    )
    rates = {job.name.rpartition("-")[0]: job.options[-1] for job in made if "--lr" in job.options}
    assert rates == {plan.CONTROL: "0.2"}  # twice what train.py takes for batches of 128
    first = [job.options[: job.options.index("--model")] for job in made]
    assert len(set(first)) == 1  # the schedule and the data of all are the same
    assert set(plan.WITH_TEACHER) | set(plan.TEACHER_FREE) == set(plan.METHODS)
    assert {name for pair in (*paper.WITH_TEACHER, *paper.TEACHER_FREE) for name in pair} == set(plan.METHODS) - {
        plan.CONTROL
    }


def compared(*differences):
    accuracy = {"nkd": dict(enumerate(differences, 5)), "ce": {seed: 0.0 for seed in range(20)}}
    return paper.compare("nkd", "ce", accuracy)


@pytest.mark.parametrize(
    "differences, verdict",
    [
        ((1.9, 2.0, 2.1), paper.AGREES),
        ((-1.9, -2.0, -2.1), paper.DISAGREES),
        ((1.0, 2.0, 3.0), paper.UNDECIDED),  # two deviations, where the interval is 2.48
        ((1.5, 2.0, 2.5), paper.AGREES),  # four of them
        ((-3.0, 1.0, 2.0), paper.UNDECIDED),
        ((5.0,), paper.UNDECIDED),
        ((0.0, 0.0), paper.UNDECIDED),
    ],
)
def test_verdicts(differences, verdict):
    assert compared(*differences).verdict == verdict


def test_interval_is_students():
    found = compared(1.0, 2.0, 3.0)
    assert found.difference == pytest.approx(2) and found.seeds == 3
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert paper.compare("nkd", "ce", {"nkd": {0: 1.0}, "ce": {1: 1.0}}) is None
    assert compared(*([1.0, 2.0] * 20)[:30]).half_width > 0


def test_page_says_where_the_order_shows_and_where_not():
    text = page.markdown(made_up(), "study")
    assert "Of 6 pairs that the paper ranks, 6 have the same order here, 0 the opposite order" in text
    # KD worse than the baseline in every seed, DKD here and there.
    text = page.markdown(made_up({**ACCURACY, "kd": 69.0}, {"dkd": (-3.0, 0.0, 3.0), "kd": (0.01, 0.0, 0.02)}), "study")
    lines = [line for line in text.splitlines() if " over " in line and line.startswith("|")]
    verdicts = {line.split(" | ")[0].strip("| "): line.split(" | ")[2].strip() for line in lines}
    assert verdicts["KD over baseline"] == "**disagrees**"
    assert verdicts["DKD over baseline"] == verdicts["NKD over DKD"] == "cannot tell"
    assert verdicts["NKD over baseline"] == "agrees"
    assert "The opposite of it shows in 2 of 6 pairs: KD over label smoothing, KD over baseline." in text


def test_page_shows_the_published_figures_and_no_others():
    text = page.markdown(made_up(), "study")
    rows = {
        line.split("|")[1].strip(): line
        for line in text.splitlines()
        if line.startswith("| ") and " ± " in line and " MB | " in line
    }
    assert rows["NKD"].endswith("| 71.96 (+2.06) |") and rows["KD"].endswith("| 71.03 |")
    for name in ("label smoothing", "Tf-KD", "Zipf's LS"):
        assert rows[name].endswith("| not shown |")


def test_control_says_what_larger_steps_do():
    text = page.markdown(made_up({**ACCURACY, plan.CONTROL: 72.5}), "study")
    assert "is +2.50 points from the baseline. Of the 7 methods" in text
    assert "3 are better than the control, too, by the rule above: DKD, NKD, USKD." in text
    assert "has 72.80 %. Of the 7 methods above the baseline, 3 are better than the control as well: DKD, NKD" in text
    rows = [line for line in text.splitlines() if line.startswith("| baseline, twice the rate |")]
    assert [row.split(" | ")[4] for row in rows[:2]] == ["4.32", "4.32"]
    assert "control" not in page.markdown(made_up(), "study")


def test_seconds_an_epoch_are_steps_times_the_median_step_and_memory_is_a_steps():
    text = page.markdown(made_up(), "study")
    row = next(line for line in text.splitlines() if line.startswith("| NKD | 7"))
    assert row.split(" | ")[4:6] == [f"{0.08 * (7000 // 128):.2f}", "25.0 MB"]
    without = page.markdown(made_up(cost=False), "study")
    assert "Not measured; `python -m study --only cost page` does so." in without


@pytest.mark.parametrize("name", [name for name in plan.METHODS if name in methods.LOSSES])
def test_published_form_is_the_same_loss(name):
    torch.manual_seed(0)
    logits, teacher = torch.randn(16, 30, requires_grad=True), torch.randn(16, 30)
    outputs = Outputs(logits, torch.randn(16, 30), torch.randn(16, 9, 30))
    target = torch.randint(30, (16,))
    method = methods.build(name, [], "auto")
    ours, theirs = method.call(outputs, teacher, target)[0], cost.published(method).call(outputs, teacher, target)[0]
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)


REFUSED = {
    "seeds": (("--seeds", "1", "1"), "--seeds: expected different ones from 0 on, got 1 1"),
    "epochs": (("--epochs", "0"), "--epochs: expected at least 1, got 0"),
    "no_results": (("--only", "page"), "page.json: no results of a study"),
    "none_complete": (("--only", "collect"), "no run is complete"),
    "out": (("--out", "FILE/runs"), "--out FILE/runs: cannot be written (Not a directory)"),
    "method_fails": (
        ("--student", "cnn-huge", "--jobs", "1"),
        "run ce-0: ended with status 2: --model: expected one of",
    ),
    "cost_fails": (("--only", "cost", "--student", "cnn-huge"), "cost of ce: --model: expected one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_and_status_2(case, tmp_path, tiny, capsys):
    arguments, message = REFUSED[case]
    (tmp_path / "file").write_text("")
    arguments = [argument.replace("FILE", str(tmp_path / "file")) for argument in arguments]
    assert main(tmp_path, "--methods", "ce", *arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("study: ") and message.replace("FILE", str(tmp_path / "file")) in last


def test_damaged_results(tmp_path, capsys):
    (tmp_path / "page.json").write_text("{")
    assert main(tmp_path, "--only", "page") == 2
    assert "page.json: no results of a study (JSONDecodeError)" in capsys.readouterr().err


def test_help_names_the_defaults():
    text = study.make_parser().format_help()
    assert "(runs/study)" in text and "python -m study --only cost" in text


def test_the_page_in_docs_is_what_its_results_give():
    path = ROOT / "docs" / "study.md"
    assert path.read_text(encoding="utf-8") == page.markdown(results.read(path.with_suffix(".json")), path.stem)
    pictures = {name for name in ("study-accuracy.png", "study-cost.png") if f"({name})" in path.read_text()}
    assert pictures and all((path.parent / name).is_file() for name in pictures)


def test_the_outcome_beside_the_losses_is_what_the_results_give():
    text = (ROOT / "docs" / "which-loss.md").read_text(encoding="utf-8")
    block = text.partition(page.BEGIN)[2].partition(page.END)[0]
    assert block.strip() == findings.outcome(results.read(ROOT / "docs" / "study.json"))


def test_outcome_goes_into_another_page(tmp_path):
    path, other = tmp_path / "page.md", tmp_path / "README.md"
    other.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    assert page.make(made_up(), path, other)[-1] == other
    lines = other.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert "- At 3755 classes **USKD** takes 49% of a training step as published" in other.read_text()
    other.write_text("no place for it")
    with pytest.raises(RunError, match="expected one line <!-- study:begin -->"):
        page.make(made_up(), path, other)


def test_results_hold_no_path_of_a_machine():
    text = json.dumps(results.read(ROOT / "docs" / "study.json"))
    assert "/home" not in text and "/root" not in text and "/tmp" not in text
