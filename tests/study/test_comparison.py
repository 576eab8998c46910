"""The study: a tiny one is made for real, and learning rates, intervals and orders are what its records say."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_runs
from study_results import RATE, TASK, made_up, put, searched

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

from study import __main__ as study
from study import compare
from study.comparison import cost, paper, plan, results, runs, stages
from study.comparison.ablations import ABLATIONS
from study.comparison.records import Records
from study.training import methods, options
from study.training.networks import Outputs

ROOT = Path(__file__).resolve().parents[2]
TINY = plan.Task(
    "tiny", "tiny", "noisy patterns", ("--data", "glyphs", "--classes", "20"), "cnn-tiny",
    plan.Teacher("tiny", "cnn-tiny", epochs=2, lr=0.02), epochs=2, batch_size=16, rates=(0.02, 0.04, 0.08),
    methods=("ce", "nkd"),
)  # fmt: skip
FEW = ("--seeds", "0", "1", "--cost-steps", "2", "--cost-classes", "20")


@pytest.fixture
def tiny(monkeypatch):
    """Runs are of the tiny data, few of them, and no fonts are looked for."""
    monkeypatch.setattr(runs, "TRAIN", (sys.executable, train_runs.__file__))
    monkeypatch.setattr(study, "COST", (sys.executable, train_runs.__file__, "cost"))
    monkeypatch.setattr(study, "METHODS", {name: plan.METHODS[name] for name in ("ce", "nkd")})
    monkeypatch.setattr(study, "TASKS", {"tiny": TINY})
    monkeypatch.setattr(study, "most_classes", lambda: 3755)
    for module in (stages, results):
        monkeypatch.setattr(module, "RATE_SEEDS", (50,))


def main(folder, *arguments):
    places = ("--out", folder / "runs", "--records", folder / "records", "--page", folder / "page.md")
    return study.main([*map(str, places), *FEW, *arguments])


@pytest.mark.slow
def test_a_study_that_broke_off_goes_on_and_is_not_made_twice(tmp_path, tiny, monkeypatch, capsys):
    with monkeypatch.context() as context:
        context.setenv("KILL_AT_STEP", "12")  # in the second of two epochs
        assert main(tmp_path, "--jobs", "1", "--part", "rates") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "study: run tiny ce-lr-0.02-seed-50: killed by signal 9; the same command continues"
    assert main(tmp_path, "--part", "rates", "main", "cost", "page") == 0
    assert "resuming at step 8 of 16" in (tmp_path / "runs" / "tiny" / "ce-lr-0.02-seed-50" / "log.txt").read_text()
    records = Records(tmp_path / "records", {"tiny": TINY})
    main_runs = [(r["method"], r["seed"]) for r in records.runs["tiny"].values() if r["seed"] < 50]
    assert sorted(main_runs) == [("ce", 0), ("ce", 1), ("nkd", 0), ("nkd", 1)]
    for record in (*records.runs["tiny"].values(), records.teachers["tiny"]):
        assert len(record["curve"]["accuracy"]["test"]) == 2 and record["peak_memory"] > 2**20
        assert record["curve"]["accuracy"]["test"][-1] == pytest.approx(record["accuracy"]["test"], abs=1e-5)
    rows = {row["method"]: row for row in records.cost["rows"]}
    assert set(rows["ce"]["forms"]) == {"PyTorch"}
    assert set(rows["nkd"]["forms"]) == {"fused", "eager", "published"}
    for times in (*rows["ce"]["forms"].values(), *rows["nkd"]["forms"].values()):
        assert 0 < times["loss"] < times["step"] and times["memory"] > 16 * 20 * 4  # the logits at least
    text = (tmp_path / "page.md").read_text()
    assert "| NKD |" in text and "20 classes" in text
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"page-differences.png", "page-convergence.png", "page-cost.png"}

    monkeypatch.setattr(runs, "TRAIN", ("false",))
    assert main(tmp_path, "--part", "rates", "main", "page") == 0
    assert "all runs of rates, main have a record" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == text
    monkeypatch.setattr(study, "TASKS", {"tiny": replace(TINY, epochs=3)})
    assert main(tmp_path, "--part", "page") == 2
    assert "of a study with another epochs (2, not 3)" in capsys.readouterr().err


@pytest.mark.slow
def test_own_data_are_compared(tmp_path, tiny):
    arguments = (
        "--data", "imagefolder", "somewhere", "--student", "cnn-tiny", "--teacher", "cnn-tiny", "--epochs", "1",
        "--batch-size", "16", "--lr", "0.2",
        "--methods", "nkd", "--seeds", "0", "1", "--part", "rates", "main", "page", "--flip",
        "--device", "cpu",
    )  # fmt: skip
    assert compare.main([*arguments, "--out", str(tmp_path)]) == 0
    assert len(list((tmp_path / "records" / "own").glob("*.json"))) >= 7
    text = (tmp_path / "comparison.md").read_text()
    assert text.startswith("# Losses compared") and "two cores" not in text
    assert "| NKD |" in text and "NKD over baseline" in text and "--flip" in text
    assert "somewhere" not in text.split("## How it was done")[0]


def other_records(records):
    """The same, of a task by another name."""
    found = Records(Path("made-up"), {"other": replace(TASK, name="other")})
    found.runs["other"] = records.runs[TASK.name]
    return found


def wanted(stage, records, seeds=(0, 1)):
    return stages.wanted(TASK, stage, records, seeds)


def test_learning_rate_is_searched_until_its_neighbours_are_worse():
    records = made_up()
    records.runs[TASK.name] = {}
    assert {spec.lr for spec in wanted("main", records)} == {0.1, 0.2, 0.4}
    searched(records, TASK, "ce", {0.1: 68.0, 0.2: 70.0, 0.4: 71.0})
    assert {spec.lr for spec in wanted("rates", records)} == {0.1, 0.2, 0.4, 0.8}
    searched(records, TASK, "ce", {0.8: 71.0})  # equal will do
    assert stages.best_rate(TASK, records).rate == 0.4
    searched(records, TASK, "ce", {0.1: 73.0})
    assert 0.05 in {spec.lr for spec in wanted("rates", records)}
    searched(records, TASK, "ce", {0.05: 1.0})
    assert {spec.lr for spec in wanted("main", records)} == {0.1}


def test_search_ends_where_all_rates_are_the_same():
    records = made_up()
    searched(records, TASK, "ce", {0.1: 5.0, 0.2: 5.0, 0.4: 5.0})
    assert stages.best_rate(TASK, records).rate == 0.2


def test_own_rates_are_chosen_with_seeds_apart():
    records = made_up()
    specs = [spec for spec in wanted("own", records) if spec.method == "nkd"]
    assert {(spec.lr, spec.seed) for spec in specs} == {(lr, seed) for lr in (0.1, 0.2, 0.4) for seed in (50, 51)}
    searched(records, TASK, "nkd", {0.1: 60.0, 0.2: 61.0, 0.4: 62.0})
    specs = [spec for spec in wanted("own", records) if spec.method == "nkd"]
    assert {(spec.lr, spec.seed) for spec in specs if spec.seed < 50} == {(0.4, 0), (0.4, 1)}


def test_stages_want_all_methods_and_seeds():
    records = made_up()
    main_specs = wanted("main", records)
    assert {(s.method, s.seed) for s in main_specs} == {(m, s) for m in plan.METHODS for s in (0, 1)}
    assert {spec.lr for spec in main_specs} == {RATE}
    own = {(length.factor, method) for length in TASK.lengths for method in length.methods}
    assert (4, "uskd") in own
    assert {(s.longer, s.method) for s in wanted("longer", records)} == own
    ablations = {(spec.method, spec.settings) for spec in wanted("ablations", records)}
    assert {("nkd", ("gamma=4",)), ("uskd", ("rank=weak",)), ("nkd", ())} < ablations
    assert stages.wanted(replace(TASK, name="other"), "ablations", other_records(records), (0,)) == []
    assert set(plan.WITH_TEACHER) | set(plan.TEACHER_FREE) == set(plan.METHODS)
    assert {name for pair in (*paper.WITH_TEACHER, *paper.TEACHER_FREE) for name in pair} == set(plan.METHODS)


def test_only_the_shared_rate_has_more_seeds():
    """A task of many seeds would take days over its own rates and ablations otherwise."""
    records = made_up()
    for method in plan.METHODS:
        searched(records, TASK, method, {0.1: 60.0, 0.2: 62.0, 0.4: 61.0})
    many = tuple(range(10))
    of_stage = {stage: {spec.seed for spec in wanted(stage, records, many)} - {50, 51} for stage in stages.STAGES}
    assert {stage: len(seeds) for stage, seeds in of_stage.items()} == {
        "rates": 0, "main": 10, "longer": 3, "own": 5, "ablations": 5,
    }  # fmt: skip


@pytest.mark.parametrize("task", plan.TASKS.values(), ids=plan.TASKS)
def test_every_run_is_what_train_py_takes(task, tmp_path):
    """Of every task and ablation; the schedule and the data of all are the same."""
    specs = [plan.Spec(task.name, method, 0.1, 0) for method in task.methods]
    own = [ablation for ablation in ABLATIONS if task.name in ablation.tasks]
    specs += [plan.Spec(task.name, each.method, 0.1, 0, variant.settings) for each in own for variant in each.variants]
    common = set()
    for spec in plan.unique(specs):
        job = plan.student_job(task, spec, tmp_path, tmp_path)
        args = options.parse(job.options)
        method = methods.build(args.loss, args.set, "auto")
        assert method.needs_teacher == plan.needs_teacher(spec) == (args.teacher is not None)
        common.add((args.model, args.epochs, args.batch_size, args.lr, args.shift, args.optimizer, tuple(args.data)))
    assert len(common) == 1
    assert len({spec.key for spec in specs}) == len(plan.unique(specs))
    teacher = options.parse(plan.teacher_job(task, tmp_path, tmp_path).options)
    assert (teacher.model, teacher.seed, teacher.loss) == (task.teacher.model, plan.TEACHER_SEED, "ce")


def test_a_teacher_comes_before_its_students_and_once(tmp_path):
    records = made_up()
    records.runs[TASK.name] = {}
    specs = [plan.Spec(TASK.name, method, 0.1, 0) for method in ("nkd", "kd", "ce")]
    todo = runs.Study({TASK.name: TASK}, records, tmp_path, tmp_path, lambda: specs)
    first = todo.next(todo.missing(), set())
    assert first.job.name == "teacher made-up" and first.spec is None
    second = todo.next(todo.missing(), {first.job.name})
    assert second.spec.method == "ce"
    assert todo.next(todo.missing(), {first.job.name, second.job.name}) is None
    first.job.folder.mkdir(parents=True)
    (first.job.folder / "result.json").write_text("{}")
    assert todo.next(todo.missing(), {second.job.name}).spec.method == "nkd"
    put(records, 1.0, "nkd", 0, 0.1)
    assert todo.next(todo.missing(), {second.job.name}).spec.method == "kd"


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
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3)) and found.text == "+2.00 ± 2.48"
    assert paper.compare("nkd", "ce", {"nkd": {0: 1.0}, "ce": {1: 1.0}}) is None
    assert compared(*([1.0, 2.0] * 20)[:30]).half_width > 0


@pytest.mark.parametrize("name", [name for name in plan.METHODS if name in methods.LOSSES])
def test_published_form_is_the_same_loss(name):
    torch.manual_seed(0)
    logits, teacher = torch.randn(16, 30, requires_grad=True), torch.randn(16, 30)
    outputs = Outputs(logits, torch.randn(16, 30), torch.randn(16, 9, 30))
    target = torch.randint(30, (16,))
    method = methods.build(name, [], "auto")
    ours, theirs = method.call(outputs, teacher, target)[0], cost.published(method).call(outputs, teacher, target)[0]
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_target_term_of_nkd_weighs_what_is_set(weight):
    torch.manual_seed(0)
    logits, teacher = torch.randn(16, 30, requires_grad=True), torch.randn(16, 30)
    outputs, target = Outputs(logits, None, None), torch.randint(30, (16,))
    loss, parts = methods.build("nkd", [f"target_weight={weight}"], "auto").call(outputs, teacher, target)
    whole, of_whole = methods.build("nkd", [], "auto").call(outputs, teacher, target)
    assert loss.item() == pytest.approx((whole - (1 - weight) * of_whole["target"]).item(), rel=1e-5)
    assert sum(parts.values()).item() == pytest.approx(loss.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    log_p, q = logits.log_softmax(1), teacher.softmax(1)
    own = -(q * log_p).gather(1, target[:, None]).mean()
    expected = torch.autograd.grad(whole - (1 - weight) * own, logits)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


REFUSED = {
    "seeds": (("--seeds", "1", "1"), "--seeds: expected distinct seeds from 0 on"),
    "rate_seeds": (("--seeds", "1", "50"), "without 50 and 51, which choose the learning rates; got 1 50"),
    "jobs": (("--jobs", "0"), "--jobs: expected at least 1, got 0"),
    "no_runs": (("--part", "page"), "has no runs of the methods; make them first"),
    "out": (("--out", "FILE/runs"), "--out FILE/runs: cannot be written (Not a directory)"),
    "cost_fails": (("--part", "cost"), "cost of ce: --model: expected one of"),
}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("imagefolder",), "--data imagefolder: expected one path, got 0"),
        (("imagefolder", "nowhere"), "--data imagefolder: nowhere does not exist"),
        (("text", "there"), "--data text: expected no path, got there"),
        (("glyph",), "--data: expected glyphs, text, cifar100 PATH, imagefolder PATH, got 'glyph'"),
    ],
)
def test_compare_looks_for_the_data_before_it_trains(data, message, tmp_path, capsys):
    assert compare.main(["--data", *data, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_and_status_2(case, tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setattr(study, "COST_STUDENT", "cnn-huge")
    arguments, message = REFUSED[case]
    (tmp_path / "file").write_text("")
    arguments = [argument.replace("FILE", str(tmp_path / "file")) for argument in arguments]
    assert main(tmp_path, *arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("study: ") and message.replace("FILE", str(tmp_path / "file")) in last


def test_a_run_that_fails_is_named(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setattr(study, "TASKS", {"tiny": replace(TINY, student="cnn-huge")})
    assert main(tmp_path, "--part", "rates", "--jobs", "1") == 2
    assert "run tiny ce-lr-0.02-seed-50: ended with status 2: --model: expected one of" in capsys.readouterr().err


def test_damaged_records(tmp_path, tiny, capsys):
    (tmp_path / "records" / "tiny").mkdir(parents=True)
    (tmp_path / "records" / "tiny" / "ce-lr-0.02-seed-50.json").write_text("{")
    assert main(tmp_path, "--part", "page") == 2
    assert "ce-lr-0.02-seed-50.json: no record of the study (JSONDecodeError)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--epochs", "0"), "--epochs: expected at least 1, got 0"),
        (("--lr", "-1"), "--lr: expected a positive number, got -1.0"),
        (("--cache-teacher", "x"), "--cache-teacher: there is no --teacher"),
    ],
)
def test_compare_refuses_in_one_line(arguments, message, capsys, tmp_path):
    assert compare.main(["--data", "glyphs", "--out", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"study.compare: {message}")


def test_help_names_the_defaults():
    text = study.make_parser().format_help()
    assert "(runs/study)" in text and "python -m study --part cost page" in text
    assert "runs/compare" in compare.make_parser().format_help()


def test_records_of_the_study_are_whole_and_hold_no_path_of_a_machine():
    records = Records(ROOT / "study" / "records", plan.TASKS)
    for path in (ROOT / "study" / "records").rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in ("/home", "/root", "/tmp", "/work")), path
        assert path.stat().st_size < 50_000
    for name, task in plan.TASKS.items():
        for key, record in records.runs[name].items():
            spec = plan.Spec(
                name, record["method"], record["lr"], record["seed"], tuple(record["settings"]), record["longer"]
            )
            assert spec.key == key and json.dumps(record["setting"]) == json.dumps(
                json.loads(json.dumps(task.setting()))
            )
