"""All losses in the benchmark: published forms, what rounding explains, peers, and the table and chart of all."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # last, so that it cannot shadow an installed fused_kd

pytest.importorskip("rich")

import fused_kd  # noqa: E402
from benchmarks import __main__ as cli  # noqa: E402
from benchmarks.forms import dist, nkd, teacher, uskd, zipf_ls  # noqa: E402
from benchmarks.forms.providers import LOSSES  # noqa: E402
from benchmarks.forms.spec import BASELINE, OURS, Loss, LossFunction, Provider  # noqa: E402
from benchmarks.measure import (  # noqa: E402
    agreement,
    cases,
)
from benchmarks.measure import run as runner  # noqa: E402
from benchmarks.show import overview, pages, terminal  # noqa: E402

OPTIONS = runner.Options(seconds=0.02, min_rounds=1)
GOLDEN = golden.CASES
FORMS: dict[str, Callable[..., torch.Tensor]] = {
    "nkd": nkd.published,
    "uskd": uskd.published,
    "kd": teacher.kd,
    "dkd": teacher.dkd,
    "wsld": teacher.wsld,
    "dist": dist.published,
    "tf_kd_reg": teacher.tf_kd,
    "zipf_ls": zipf_ls.published,
}
#: What the published USKD has, whose weights are constants here.
USKD_PARAMS = {"alpha": uskd.ALPHA, "beta": uskd.BETA, "mu": uskd.MU, "rank": "normalized"}


def golden_cases() -> list[dict[str, Any]]:
    """Those of a published form that the benchmark has, with class indices."""
    indices = [case for case in GOLDEN if case["loss"] in FORMS and isinstance(case["inputs"]["target"][0], int)]
    return [case for case in indices if case["loss"] != "uskd" or case["params"] == USKD_PARAMS]


def silent(text: str, share: float) -> None:
    assert 0 <= share <= 1


def inputs_of(loss: Loss, case: cases.Case) -> cases.Inputs:
    return cases.make_inputs(case, trains_other=loss.trains_other, positions=loss.positions)


@pytest.fixture(scope="module")
def result() -> Iterator[dict[str, Any]]:
    shapes = [cases.Case(6, 11), cases.Case(4, 1000)]
    names = (BASELINE, OURS)
    plan = [runner.Work(loss, [loss.provider(name) for name in names], shapes) for loss in LOSSES.values()]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads wait for each other longer than such sizes take
    yield runner.run(plan, OPTIONS, silent)
    torch.set_num_threads(threads)


def test_every_published_form_has_a_golden_case() -> None:
    assert {case["loss"] for case in golden_cases()} == set(FORMS)
    without = {name for name in LOSSES if name not in FORMS and f"{name}_reg" not in FORMS}
    assert without <= {"js"}  # TRL's, compared with the reference below


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["name"])
def test_published_forms_give_the_published_values(case: dict[str, Any]) -> None:
    inputs = {
        key: torch.tensor(value, dtype=torch.int64 if key == "target" else torch.float64)
        for key, value in case["inputs"].items()
    }
    others = [key for key in inputs if key not in ("student_logits", "target")]
    student = inputs["student_logits"].requires_grad_()
    trained = {"student_logits": student}
    if case["loss"] == "uskd":
        trained["weak_logits"] = inputs["weak_logits"].requires_grad_()
    params = {"correct" if key == "correct_prob" else key: value for key, value in case["params"].items()}
    if case["loss"] == "zipf_ls":
        params["weight"] = 1.0
    elif case["loss"] == "uskd":
        params = {}
    other = inputs[others[0]] if others else torch.empty(0)
    loss = FORMS[case["loss"]](student, other, inputs["target"], **params)
    loss.backward()
    tolerance = 1e-6 if "1e-6" in case["source"] else 1e-9
    assert loss.item() == pytest.approx(case["value"], rel=tolerance, abs=tolerance)
    for key, logits in trained.items():
        expected = torch.tensor(case["grads"][key], dtype=torch.float64)
        torch.testing.assert_close(logits.grad, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature, beta", [(1.0, 0.5), (2.0, 0.3)])
def test_the_published_js_is_the_reference(temperature: float, beta: float) -> None:
    inputs = cases.make_inputs(cases.Case(6, 11, "float64"))
    options = {"temperature": temperature, "beta": beta}
    expected, _ = fused_kd.reference.js_loss(inputs.student_logits, inputs.other_logits, None, **options)
    assert teacher.js(*inputs[:3], **options).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("rows, classes, positions", [(6, 11, 49), (5, 300, 9), (3, 3, 4)])
def test_the_zipf_form_that_is_compiled_is_the_published_one(rows: int, classes: int, positions: int) -> None:
    inputs = cases.make_inputs(cases.Case(rows, classes, "float64"), positions=positions)
    values = []
    for form in (zipf_ls.published, zipf_ls.mask_free):
        inputs.drop_gradients()
        value = form(*inputs[:3])
        value.backward()
        values.append((value.detach(), inputs.student_logits.grad))
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-9)  # its table of ranks is float32
    assert not (values[0][1] == 0).all()


def test_dense_logits_pool_to_about_the_logits_and_their_votes_differ() -> None:
    inputs = cases.make_inputs(cases.Case(8, 1000), positions=49)
    assert inputs.other_logits.shape == (8, 49, 1000)
    assert not inputs.other_logits.requires_grad
    difference = inputs.other_logits.mean(1) - inputs.student_logits.detach()
    assert difference.square().mean() < 0.2 * inputs.student_logits.detach().square().mean()
    votes = [len(row.argmax(1).unique()) for row in inputs.other_logits]
    assert min(votes) > 1
    assert max(votes) < 49
    again = cases.make_inputs(cases.Case(8, 1000), positions=49)
    assert torch.equal(again.other_logits, inputs.other_logits)


# What each loss is taken for when its published form is slightly wrong.
WRONG: dict[str, LossFunction] = {
    "kd": lambda s, t, y: teacher.kd(s, t, y, temperature=4.02),
    "dkd": lambda s, t, y: teacher.dkd(s, t, y, beta=8.02),
    "wsld": lambda s, t, y: teacher.wsld(s, t, y, alpha=2.51),
    "tf_kd": lambda s, t, y: teacher.tf_kd(s, t, y, correct=0.5),  # at T = 20 the label is nearly uniform anyway
    "dist": lambda s, t, y: dist.published(s, t, y, gamma=1.01),
    "zipf_ls": lambda s, t, y: zipf_ls.published(s, t, y, power=1.01),
    "js": lambda s, t, y: teacher.js(s, t, y, beta=0.49),
}


@pytest.mark.parametrize("loss", [loss for name, loss in LOSSES.items() if name in WRONG], ids=lambda loss: loss.name)
def test_slightly_wrong_forms_are_found(loss: Loss) -> None:
    case = cases.Case(16, 100)
    judge = agreement.Judge(loss, inputs_of(loss, case))
    published = loss.provider("published")
    assert judge.errors(published, published.build()).within(agreement.tolerance(loss, case, published))
    assert not judge.errors(published, WRONG[loss.name]).within(agreement.tolerance(loss, case, published))


def kd_like(term: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> LossFunction:
    """A form of KD at T = 4 whose summands are ``term`` of log p and q, in float32 at least."""

    def call(student: torch.Tensor, other: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        student = student if student.dtype == torch.float64 else student.float()
        log_p, q = F.log_softmax(student / 4, 1), F.softmax(other.to(student.dtype) / 4, 1)
        return 16 * term(log_p, q).sum(1).mean()

    return call


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_divergence_may_lose_what_one_rounding_of_each_term_takes_and_no_more(dtype: str) -> None:
    case = cases.Case(6, 11, dtype)
    kd = LOSSES["kd"]
    judge = agreement.Judge(kd, cases.make_inputs(case))
    accurate = kd_like(lambda log_p, q: torch.xlogy(q, q) - q * log_p)
    # The same gradient, and a loss that is off by the teacher's entropy, or by 5 % of the difference.
    cross_entropy = kd_like(lambda log_p, q: -q * log_p)
    lower = kd_like(lambda log_p, q: torch.xlogy(q, q) - q * log_p - 0.05 * (q * (q.log() - log_p)).detach())
    accumulating = Provider("mine", "", lambda: accurate)
    in_dtype = Provider("mine", "", lambda: accurate, as_published=True)
    published = kd.provider("published")
    for provider, form, right in (
        (published, published.build(), True),
        (in_dtype, cross_entropy, False),
        (accumulating, accurate, True),
        (accumulating, lower, False),  # whatever the dtype of the logits, this works in float32
        (accumulating, cross_entropy, False),
    ):
        found = judge.errors(provider, form)
        assert found.within(agreement.tolerance(kd, case, provider)) == right, (provider, found)
        assert found.loss_beyond_rounding <= found.loss
    if dtype == "bfloat16":  # the reason for all this
        assert judge.errors(published, published.build()).loss > agreement.TOLERANCE[dtype]


def test_the_magnitude_of_the_terms_is_what_it_says() -> None:
    inputs = cases.make_inputs(cases.Case(6, 11, "float64"))
    student, other = inputs.student_logits.detach(), inputs.other_logits
    log_p, log_q = (student / 4).log_softmax(1), (other / 4).log_softmax(1)
    expected = 16 * (log_q.exp() * (log_q.abs() + log_p.abs())).sum()
    torch.testing.assert_close(teacher.kd_magnitude(student, other, inputs.target), expected)
    # Of DKD without its binary part, the same over the other classes alone; there is nothing there for the target.
    rest = torch.arange(11) != inputs.target.unsqueeze(1)
    log_p, log_q = ((x[rest].view(6, 10) / 4).log_softmax(1) for x in (student, other))
    expected = 16 * (log_q.exp() * (log_q.abs() + log_p.abs())).sum()
    torch.testing.assert_close(teacher.dkd_magnitude(student, other, inputs.target, alpha=0.0, beta=1.0), expected)
    for loss in LOSSES.values():
        if loss.magnitude is not None:
            value = loss.reference_sum(student, other, inputs.target, None)
            assert loss.magnitude(student, other, inputs.target) > value > 0


def test_the_judge_gives_dist_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts it would compare with another loss."""
    monkeypatch.setattr(agreement, "CHUNK_ELEMENTS", 1)
    loss = LOSSES["dist"]
    inputs = cases.make_inputs(cases.Case(6, 11))
    published = loss.provider("published")
    assert agreement.Judge(loss, inputs).errors(published, published.build()).within(1e-4)
    in_parts = Loss(**{**vars(loss), "whole_batch": False})
    assert not agreement.Judge(in_parts, inputs).errors(published, published.build()).within(1e-4)


def test_a_result_of_all_losses(result: dict[str, Any], tmp_path: Path) -> None:
    from rich.console import Console

    assert not runner.failures(result)
    path = cli.save(result, tmp_path)
    assert path.name.startswith("all-cpu-")
    console = Console(width=100, record=True, file=io.StringIO())
    terminal.print_result(result, console)
    assert "…" not in console.export_text(), "a column was cut at 100 columns"
    readme = tmp_path / "README.md"
    (small, small_end), (begin, end) = pages.HEADLINE_MARKS, pages.DETAILS_MARKS
    readme.write_text(f"{small}\n{small_end}\n\nbetween\n\n{begin}\nformer text\n{end}\n")
    assert cli.main(["table", str(path), "--details", "--update", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"{small}\n{small_end}\n\nbetween\n\n{begin}\n")
    assert "former text" not in text
    # Details of the headline's losses alone, and all of them in one table.
    assert text.count("**USKD loss**") == 2
    assert "KD loss**" not in text.replace("**NKD", "").replace("**USKD", "")
    assert "| loss, cold |" in text and "| loss, hot |" in text
    assert cli.main(["table", str(path), "--update", str(readme)]) == 0
    both = readme.read_text()
    assert both.endswith(text[text.index("between") :])
    assert both.count("\n| NKD | 6×11 |") == 1
    assert both.count("\n| KD |") == text.count("\n| KD |")


def test_the_overview_has_a_line_per_loss_with_the_right_ratios(result: dict[str, Any]) -> None:
    made = json.loads(json.dumps(result))
    medians = {"published": 12.0, "compile": 6.0, "fused_kd": 0.75}
    for part in made["losses"]:
        for case in part["cases"]:
            published = next(entry for entry in case["providers"] if entry["name"] == "published")
            if part["loss"] != "kd":
                case["providers"].append({**json.loads(json.dumps(published)), "name": "compile"})
            for entry in case["providers"]:
                for regime, slower in (("cold", 2), ("hot", 1)):
                    if entry["status"] == "ok":
                        both = entry["times"][regime]["milliseconds"]["both"]
                        both["median"] = slower * medians.get(entry["name"], 1.0)
                        if part["loss"] == "nkd" and entry["name"] == "fused_kd":
                            both["median"] = 0.5
    tables = overview.markdown(made).split("| loss, ")[1:]
    for regime, slower, text in zip(("cold", "hot"), (2, 1), tables, strict=True):
        lines = [line.split("|")[1:-1] for line in f"| loss, {text}".splitlines() if line.startswith("|")]
        table = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}
        assert len({len(cells) for cells in lines}) == 1
        assert list(table)[2:] == [loss.title.removesuffix(" loss") for loss in LOSSES.values()]
        assert table[f"loss, {regime}"][:3] == ["6×11 float32: **fused_kd**", "published eager", "torch.compile"]
        assert table["NKD"] == ["**0.500**", f"{24 * slower}×", f"{12 * slower}×", "1.0"] * 2
        own = {"cold": "**1.50**", "hot": "**0.750**"}[regime]
        ratio = {"cold": "3.0", "hot": "1.5"}[regime]
        assert table["DIST"] == [own, "16×", "8.0×", ratio] * 2
        assert table["KD"] == [own, "16×", "–", ratio] * 2
    assert "49 positions" in overview.markdown(made)
    made["losses"] = made["losses"][1:]  # without NKD
    assert "| 8.0× | – |" in overview.markdown(made)


def test_the_overview_has_the_cases_that_all_losses_have(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = json.loads(json.dumps(result))
    del made["losses"][-1]["cases"][0]
    assert overview.cases(made) == ["4×1000 float32"]
    (entry,) = [entry for entry in made["losses"][2]["cases"][1]["providers"] if entry["name"] == "published"]
    entry.update(status="wrong", reason="off")
    with pytest.raises(ValueError, match="a case with a time of published eager and of fused_kd for every loss"):
        overview.markdown(made)
    path = cli.save(made, tmp_path)
    for argv in (["table", str(path), "--details"], ["plot", str(path)], ["table", str(path), "--loss", "mse"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 2
    assert "got 'mse'" in capsys.readouterr().err


def test_the_chart_of_all_losses(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with_compiled = json.loads(json.dumps(result))
    for part in with_compiled["losses"]:
        for case in part["cases"]:
            case["providers"].append({**case["providers"][0], "name": "compile"})
    path = cli.save(with_compiled, tmp_path)
    assert cli.main(["plot", str(path)]) == 0
    assert cli.main(["plot", str(path), "--loss", "kd", "--output", str(tmp_path / "kd.png")]) == 0
    chart, panel = path.with_suffix(".png"), tmp_path / "kd.png"
    for picture in (chart, panel):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert chart.read_bytes() != panel.read_bytes()


def planned(*argv: str, device: str = "cpu") -> dict[str, runner.Work]:
    parser = cli._run_parser()
    return {work.loss.name: work for work in cli._plan(parser, parser.parse_args(argv), device)}


def shapes_of(work: runner.Work) -> list[str]:
    return [case.shape for case in work.cases]


def test_cases_of_each_loss() -> None:
    assert list(planned()) == ["nkd", "uskd"]
    plan = planned("--loss", "all")
    assert list(plan) == list(LOSSES)
    assert shapes_of(plan["kd"]) == ["256×1000", "1024×1000", "128×21841", "32×128256"]
    assert shapes_of(plan["zipf_ls"]) == ["256×1000", "128×21841"]
    assert shapes_of(planned("--loss", "all", "--cases", "6x11")["zipf_ls"]) == ["6×11"]
    cuda = planned("--loss", "all", device="cuda")
    assert len(cuda["dist"].cases) < len(cuda["kd"].cases)  # eager DIST of the largest does not fit
    assert {case.dtype for case in cuda["dist"].cases} == {"bfloat16", "float32"}


def test_quick_leaves_out_what_takes_longest() -> None:
    plan = planned("--quick")
    assert "compile" in {provider.name for provider in plan["nkd"].providers}
    assert shapes_of(plan["nkd"]) == ["256×1000", "128×21841", "32×128256"]
    plan = planned("--quick", "--loss", "all")
    assert "compile" in {provider.name for provider in plan["kd"].providers}
    assert shapes_of(plan["kd"]) == ["256×1000", "128×21841"]
    asked = planned("--quick", "--loss", "kd", "--providers", "compile,fused_kd", "--cases", "1024x1000")["kd"]
    assert [provider.name for provider in asked.providers] == ["compile", "fused_kd"]
    assert shapes_of(asked) == ["1024×1000"]
