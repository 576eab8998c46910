"""USKD in the benchmark: what its comparison lets pass, the ranking alone, results of both losses, soft labels."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # last, so that it cannot shadow an installed fused_kd

pytest.importorskip("rich")

import fused_kd  # noqa: E402
from benchmarks import __main__ as cli  # noqa: E402
from benchmarks.forms import soft_labels, uskd  # noqa: E402
from benchmarks.forms.providers import NKD, USKD  # noqa: E402
from benchmarks.forms.spec import LossFunction, Provider  # noqa: E402
from benchmarks.measure import (  # noqa: E402
    agreement,
    cases,
    ranking,
)
from benchmarks.measure import run as runner  # noqa: E402
from benchmarks.show import pages, report, terminal  # noqa: E402

OPTIONS = runner.Options(seconds=0.02, min_rounds=1)
EAGER = {
    loss: tuple(provider for provider in loss.providers if provider.name not in ("compile", "liger"))
    for loss in (NKD, USKD)
}


def silent(text: str, share: float) -> None:
    assert 0 <= share <= 1


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    shapes = [cases.Case(6, 11), cases.Case(4, 1000)]
    return runner.run([runner.Work(loss, providers, shapes) for loss, providers in EAGER.items()], OPTIONS, silent)


def reference(**options: Any) -> LossFunction:
    return lambda student, weak, target: fused_kd.reference.uskd_loss(student, weak, target, **options)[0]


def with_ranks(change: Callable[[torch.Tensor], torch.Tensor]) -> LossFunction:
    """The loss of a form that ranks other keys than it should."""

    def call(student: torch.Tensor, weak: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        keys = fused_kd.reference.uskd_terms(student, weak, target)
        order = change((keys.weak_key + keys.student_key).double()).argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(1, student.shape[1] + 1, dtype=student.dtype).expand_as(student)
        zipf = torch.zeros_like(student).scatter(1, order, 1 / ranks).masked_fill(keys.is_target, 0.0)
        log_p_hat = student.masked_fill(keys.is_target, float("-inf")).log_softmax(1).masked_fill(keys.is_target, 0.0)
        non_target = -uskd.BETA * (zipf / zipf.sum(1, keepdim=True) * log_p_hat).sum(1).mean()
        return reference(beta=0.0)(student, weak, target) + non_target

    return call


def errors(function: LossFunction, inputs: cases.Inputs, as_published: bool = False) -> agreement.Errors:
    provider = Provider("mine", "", lambda: function, as_published=as_published)
    return agreement.Judge(USKD, inputs).errors(provider, function)


def twins(gap: float) -> cases.Inputs:
    """Rows whose second and third class have keys apart by this share of the key, and student logits far apart."""
    rows, classes = 5, 40
    generator = torch.Generator().manual_seed(0)
    student, weak = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    student[:, 1], student[:, 2], weak[:, 1] = 4.0, 2.0, 0.0
    p_rest = 1 - student.softmax(1)[:, :1] + uskd.EPSILON
    for _ in range(200):  # weak's own divisor moves with it
        v = weak.softmax(1)
        v_rest = 1 - v[:, :1] + uskd.EPSILON
        p = student.softmax(1) / p_rest
        wanted = ((v[:, 1:2] / v_rest + p[:, 1:2]) * (1 - gap) - p[:, 2:3]) * v_rest
        weak[:, 2:3] += (wanted / v[:, 2:3]).log()
    target = torch.zeros(rows, dtype=torch.int64)
    return cases.Inputs(student.requires_grad_(), weak.requires_grad_(), target, "twins")


def exchanged(keys: torch.Tensor) -> torch.Tensor:
    return keys[:, [0, 2, 1, *range(3, keys.shape[1])]]


def rounded(inputs: cases.Inputs, dtype: torch.dtype) -> cases.Inputs:
    student, weak = (logits.detach().to(dtype).requires_grad_() for logits in inputs[:2])
    return cases.Inputs(student, weak, inputs.target, inputs.source)


def test_near_equal_keys_may_exchange_their_ranks_and_others_may_not() -> None:
    tolerance = agreement.TOLERANCE["float64"]
    right = with_ranks(lambda keys: keys)
    for gap, allowed in ((1e-15, True), (1e-12, False), (1e-3, False)):
        inputs = twins(gap)
        assert errors(right, inputs).within(tolerance)
        found = errors(with_ranks(exchanged), inputs)
        assert found.within(tolerance) == allowed, (gap, found)
        # What the exchange does to the loss is accounted for as well, though the two logits are far apart.
        assert (found.loss < tolerance) == allowed


def test_the_published_divisor_is_allowed_for_in_that_form_only() -> None:
    inputs = twins(1e-15)
    with torch.no_grad():  # the target takes nearly everything, so 1 - p has one or two digits left in float32
        inputs.student_logits[:, 0], inputs.other_logits[:, 0] = 16.0, 17.0
    inputs = rounded(inputs, torch.float32)
    published = USKD.provider("published")
    tolerance = agreement.TOLERANCE["float32"]
    assert errors(published.build(), inputs, as_published=True).within(tolerance)
    accurate, lax = (
        uskd.explain_by_swaps(inputs[0].detach().double(), inputs[1].detach().double(), inputs[2], torch.float32, flag)
        for flag in (False, True)
    )
    for name in ("below", "above"):
        narrow, wide = getattr(accurate, name).abs(), getattr(lax, name).abs()
        assert bool((narrow <= wide + 1e-12).all())
        assert float(wide.sum()) > 2 * float(narrow.sum())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_wrong_forms_are_found(dtype: str) -> None:
    case = cases.Case(16, 1000, dtype)
    judge = agreement.Judge(USKD, cases.make_inputs(case, trains_other=True))
    forms = {
        "right": reference(),
        **{f"rank {rank}": reference(rank=rank) for rank in ("cls_kd", "weak", "final", "sum")},
        "no square": reference(square=False),
        "weight": reference(mu=1.01 * uskd.MU),
    }
    if dtype in ("float64", "float32"):  # it is written for the accumulating dtypes
        forms["ascending"] = with_ranks(lambda keys: -keys)
    for name, form in forms.items():
        provider = Provider(name, "", lambda form=form: form)  # type: ignore[misc]
        found = judge.errors(provider, form)
        assert found.within(agreement.tolerance(USKD, case, provider)) == (name == "right"), (name, found)


class WithLabelSum(torch.autograd.Function):
    """The weak logits as they are; their gradient has mu v_j (sum - 1) on top, for a sum of the labels per row."""

    @staticmethod
    def forward(ctx: Any, weak: torch.Tensor, label_sum: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weak, label_sum)
        return weak.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        weak, label_sum = ctx.saved_tensors
        off = (label_sum.double() - 1).unsqueeze(1) * uskd.MU / len(weak)
        return (gradient + off * weak.double().softmax(1)).to(gradient.dtype), None


def with_label_sum(of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> LossFunction:
    """The loss of a form that has this sum of the smoothed labels in the backward pass of its weak part."""

    def call(student: torch.Tensor, weak: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        smoothed = torch.full_like(weak, uskd.SPREAD / weak.shape[1])
        smoothed.scatter_add_(1, target.unsqueeze(1), torch.full_like(smoothed[:, :1], uskd.KEPT))
        weak = WithLabelSum.apply(weak, of(smoothed, target))  # type: ignore[no-untyped-call]
        return uskd.mask_free(student, weak, target)

    return call


def by_lanes(smoothed: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As PyTorch's log_softmax adds up a row where a vector has 8 lanes: the labels times mu / N, by each lane."""
    scaled = smoothed * (uskd.MU / len(smoothed))
    lanes = torch.zeros(len(smoothed), 8)
    for vector in scaled.unflatten(1, (-1, 8)).unbind(1):
        lanes += vector
    return lanes.sum(1) / (uskd.MU / len(smoothed))


def test_a_long_sum_of_labels_is_allowed_for_in_forms_that_have_it() -> None:
    """At 128256 classes it is off by 5e-4 on AVX2, which a gradient relative to its largest entry is then as well."""
    case = cases.Case(2, 128256)
    # Targets among the first classes, so that all the others round as they are added to the 0.9.
    inputs = cases.make_inputs(case, trains_other=True)._replace(target=torch.arange(2))
    with torch.no_grad():  # another class has nearly everything: the gradient's largest entry is mu / N
        inputs.other_logits[:, 9] = 30.0
    judge = agreement.Judge(USKD, inputs)

    def found(function: LossFunction, log_softmax: bool = True) -> agreement.Errors:
        return judge.errors(Provider("mine", "", lambda: function, log_softmax=log_softmax), function)

    tolerance = agreement.tolerance(USKD, case, USKD.provider("reference"))
    rounded_sum = with_label_sum(by_lanes)
    assert tolerance < found(rounded_sum, log_softmax=False).gradient < 2 * tolerance
    assert found(rounded_sum).gradient < tolerance / 20
    for name in ("published", "reference"):
        assert judge.errors(USKD.provider(name), USKD.provider(name).build()).gradient < tolerance / 20

    # More than such a sum can lose is an error, and so is as little that is not spread as the probabilities are.
    assert not found(with_label_sum(lambda smoothed, target: torch.full((2,), 1 - 2e-3))).within(tolerance)

    def raised(student: torch.Tensor, weak: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        one_class = (weak[:, 5] - weak[:, 5].detach()).mean()
        return uskd.mask_free(student, weak, target) + 5e-4 * uskd.MU * one_class

    assert not found(raised).within(tolerance)


def test_a_missing_or_wrong_weak_gradient_is_found() -> None:
    inputs = cases.make_inputs(cases.Case(6, 11), trains_other=True)
    with pytest.raises(RuntimeError, match="no gradient on the other logits"):
        errors(lambda student, weak, target: reference()(student, weak.detach(), target), inputs)

    def halved(student: torch.Tensor, weak: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return reference()(student, weak / 2 + weak.detach() / 2, target)

    assert errors(halved, inputs).gradient > 0.3


def test_the_forms_agree_in_float64() -> None:
    inputs = cases.make_inputs(cases.Case(16, 1000, "float64"), trains_other=True)
    assert inputs.other_logits.is_leaf
    assert inputs.other_logits.requires_grad
    assert "weak" in inputs.source
    for form in (uskd.published, uskd.mask_free):
        found = errors(form, inputs)
        assert found.within(1e-11), form


def test_nan_is_an_error() -> None:
    inputs = cases.make_inputs(cases.Case(6, 11), trains_other=True)
    found = errors(lambda student, weak, target: reference()(student, weak, target) * float("nan"), inputs)
    assert not found.within(1.0)


def test_rankings_are_verified_and_compared(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    nkd, uskd_part = result["losses"]
    assert (nkd["loss"], uskd_part["loss"]) == ("nkd", "uskd")
    assert not any("ranking" in case for case in nkd["cases"])
    for case in uskd_part["cases"]:
        entries = {entry["name"]: entry for entry in case["ranking"]["entries"]}
        assert list(entries) == [ranking.SORT, "fused_kd"]
        assert entries["fused_kd"]["status"] == "ok"
        for regime in ("cold", "hot"):
            assert report.median(entries[ranking.SORT], regime) > 0
            own = entries["fused_kd"]["times"][regime]
            assert own["speedup"] > 0
            assert own["share_of_loss"] > 0
    monkeypatch.setattr(ranking, "_no_fused_ranking", lambda device: None)
    monkeypatch.setattr(ranking, "_fused_kd", lambda keys: keys.argsort(dim=1))
    bench = ranking.Bench(USKD, cases.make_inputs(cases.Case(6, 11), trains_other=True))
    assert bench.entries["fused_kd"]["status"] == "wrong"
    assert list(bench.calls()) == [ranking.SORT]


def test_a_wrong_ranking_fails_the_run(result: dict[str, Any]) -> None:
    assert not runner.failures(result)
    wrong = json.loads(json.dumps(result))
    wrong["losses"][1]["cases"][0]["ranking"]["entries"][1].update(status="wrong", reason="another order")
    assert runner.failures(wrong) == ["uskd 6×11 float32: ranking by fused_kd: another order"]


def test_a_result_of_both_losses(result: dict[str, Any], tmp_path: Path) -> None:
    from rich.console import Console

    path = cli.save(result, tmp_path)
    assert path.name.startswith("nkd+uskd-cpu-")
    console = Console(width=100, record=True, file=io.StringIO())
    terminal.print_result(result, console)
    text = console.export_text()
    assert "…" not in text, "a column was cut at 100 columns"
    assert "The ranking alone" in text
    readme = tmp_path / "README.md"
    begin, end = pages.DETAILS_MARKS
    readme.write_text(f"{begin}\n{end}\n")
    assert cli.main(["table", str(path), "--details", "--update", str(readme)]) == 0
    block = readme.read_text()
    assert block.count("**NKD loss**") == block.count("**USKD loss**") == 2
    tables = [line for line in block.splitlines() if line.startswith("|")]
    # Speed, cold and hot, and memory of each, and the ranking of one.
    assert sum(line.startswith("| 6×11 float32 |") for line in tables) == 8
    assert block.count("Measured on") == 1
    pytest.importorskip("matplotlib")
    assert cli.main(["plot", str(path), "--output", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "losses"),
    [([], ["nkd", "uskd"]), (["--loss", "uskd"], ["uskd"]), (["--loss", "uskd", "--loss", "nkd"], ["nkd", "uskd"])],
)
def test_losses_are_chosen(argv: list[str], losses: list[str], tmp_path: Path) -> None:
    options = ["--cases", "6x11", "--providers", "cross_entropy,fused_kd", "--seconds", "0.02", "--quick", "--no-plot"]
    assert cli.main([*argv, *options, "--device", "cpu", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert [part["loss"] for part in cli.load(path)["losses"]] == losses


def test_losses_without_a_chosen_provider_are_left_out() -> None:
    parser = cli._run_parser()
    plan = cli._plan(parser, parser.parse_args(["--providers", "liger"]), "cpu")
    assert [work.loss.name for work in plan] == ["nkd"]


def test_class_names_fit_the_logits() -> None:
    names = soft_labels.class_names()
    assert len(names) == len(set(names)) == 1000
    assert (names[281], names[285], names[967]) == ("tabby", "Egyptian cat", "espresso")
    licence = soft_labels.NAMES_FILE.with_suffix(".LICENSE.txt").read_text()
    assert "BSD 3-Clause" in licence


def test_soft_labels_of_real_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (coffee,) = soft_labels.collect(["coffee"], 999)
    assert coffee.target == "espresso"
    assert len(coffee.others) == 999
    assert "espresso" not in {other.name for other in coffee.others}
    for field in ("label", "student", "weak"):
        assert sum(getattr(other, field) for other in coffee.others) == pytest.approx(1, abs=1e-5)
    shipped = cases.load_shipped_logits()
    p = shipped.student_logits.softmax(1).gather(1, shipped.target.unsqueeze(1))
    assert coffee.label == pytest.approx(coffee.probability**2 + 1 - float(p.square().mean()), abs=1e-6)
    harmonic = float((1 / torch.arange(1, 1001, dtype=torch.float64)).sum())
    ratio = coffee.others[0].label / coffee.others[1].label
    assert coffee.others[0].label < 1 / (harmonic - 1) * 1.0001
    assert any(ratio == pytest.approx(value, rel=1e-5) for value in (2, 3, 3 / 2))  # ranks 1 2, 1 3 or 2 3

    pytest.importorskip("matplotlib")
    picture = tmp_path / "made" / "soft.png"
    assert cli.main(["soft-labels", "--photos", "chelsea, coffee", "--top", "3", "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "target: espresso" in text
    assert "target: Egyptian cat" in text
