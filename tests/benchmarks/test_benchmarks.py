"""The benchmark's own parts: shipped logits, providers, tables, plot and command line, at sizes that take no time."""

from __future__ import annotations

import io
import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # last, so that it cannot shadow an installed fused_kd

pytest.importorskip("rich")

from benchmarks import __main__ as cli  # noqa: E402
from benchmarks.forms.providers import LOSSES, NKD  # noqa: E402
from benchmarks.forms.spec import Loss, Provider  # noqa: E402
from benchmarks.measure import (  # noqa: E402
    agreement,
    cases,
    timing,
)
from benchmarks.measure import run as runner  # noqa: E402
from benchmarks.show import pages, report, terminal  # noqa: E402

TINY = cases.Case(6, 11)
EAGER = tuple(provider for provider in NKD.providers if provider.name not in ("compile", "liger", "quack"))
OPTIONS = runner.Options(seconds=0.02, min_rounds=1)


def inputs_of(loss: Loss, case: cases.Case) -> cases.Inputs:
    return cases.make_inputs(case, trains_other=loss.trains_other, positions=loss.positions)


def silent(text: str, share: float) -> None:
    assert 0 <= share <= 1


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    shapes = [cases.Case(6, 11), cases.Case(4, 1000)]
    providers = (*EAGER, NKD.provider("liger"))
    return runner.run([runner.Work(NKD, providers, shapes)], OPTIONS, silent)


def test_shipped_logits_are_real_and_small() -> None:
    assert cases.LOGITS_FILE.stat().st_size < 2_000_000
    shipped = cases.load_shipped_logits()
    rows = len(shipped.target)
    assert shipped.student_logits.shape == shipped.teacher_logits.shape == (rows, 1000)
    assert shipped.student_logits.isfinite().all() and shipped.teacher_logits.isfinite().all()
    assert shipped.target.min() >= 0 and shipped.target.max() < 1000
    assert len(shipped.photo) == rows and int(shipped.photo.max()) + 1 == len(shipped.photo_names)
    assert json.loads(shipped.meta)["versions"]["torch"]
    # ImageNet classes: tabby, tiger cat and Egyptian cat; espresso. Wrong preprocessing would not see them.
    for photo, classes in (("chelsea", (281, 282, 285)), ("coffee", (967,))):
        seen = shipped.photo == shipped.photo_names.index(photo)
        for logits in (shipped.student_logits, shipped.teacher_logits):
            assert logits[seen].softmax(1)[:, classes].sum(1).median() > 0.5
    assert len(shipped.student_logits.unique(dim=0)) == rows


@pytest.mark.parametrize("shape", [(5, 1000), (5, 3000)])
def test_inputs_are_seeded_and_peaked(shape: tuple[int, int]) -> None:
    case = cases.Case(*shape)
    first, again, other = cases.make_inputs(case, 1), cases.make_inputs(case, 1), cases.make_inputs(case, 2)
    assert torch.equal(first.student_logits, again.student_logits) and torch.equal(first.target, again.target)
    assert not torch.equal(first.student_logits, other.student_logits)
    assert first.student_logits.is_leaf and first.student_logits.requires_grad
    assert first.student_logits.shape == first.other_logits.shape == shape
    assert first.other_logits.softmax(1).amax(1).median() > 20 / case.classes


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_providers_agree_with_float64(loss: Loss, dtype: str) -> None:
    case = cases.Case(6, 11, dtype)
    judge = agreement.Judge(loss, inputs_of(loss, case))
    for provider in loss.providers:
        # Compiling takes seconds; the benchmark verifies it.
        if provider.same_loss and provider.name != "compile" and not provider.unavailable("cpu"):
            found = judge.errors(provider, provider.build())
            assert found.within(agreement.tolerance(loss, case, provider)), provider.name


def test_the_form_that_is_compiled_agrees_with_float64() -> None:
    from benchmarks.forms import nkd

    for temperature in (1.0, 3.0):
        inputs = cases.make_inputs(cases.Case(6, 11, "float64"))
        values = []
        for form in (nkd.published, nkd.mask_free):
            student = inputs.student_logits.detach().clone().requires_grad_()
            value = form(student, inputs.other_logits, inputs.target, temperature=temperature)
            value.backward()
            values.append((value.detach(), student.grad))
        torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_errors_are_the_same_in_chunks(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, provider = inputs_of(loss, TINY), loss.provider("published")
    whole = agreement.Judge(loss, inputs).errors(provider, provider.build())
    monkeypatch.setattr(agreement, "CHUNK_ELEMENTS", 2 * TINY.classes * max(1, loss.positions))
    judge = agreement.Judge(loss, inputs)
    assert len(judge.parts) == (1 if loss.whole_batch else 3)
    chunked = judge.errors(provider, provider.build())
    assert chunked.gradient == pytest.approx(whole.gradient, rel=1e-6)
    assert chunked.loss == pytest.approx(whole.loss, abs=1e-12)


def test_memory_counts_what_is_kept() -> None:
    case = cases.Case(64, 1024)
    inputs = cases.make_inputs(case)
    # exp keeps its result, one tensor of the input's size; the gradient is a second one.
    found = timing.memory(lambda student, teacher, target: student.exp().sum(), inputs)
    assert found.saved_bytes == found.saved_bytes_with_inputs == case.tensor_bytes
    assert found.held_bytes == pytest.approx(case.tensor_bytes, abs=100)
    assert found.peak_bytes == pytest.approx(2 * case.tensor_bytes, abs=100)
    found = timing.memory(lambda student, teacher, target: (student * teacher).sum(), inputs)
    assert found.saved_bytes == 0 and found.saved_bytes_with_inputs == case.tensor_bytes


def test_a_wrong_provider_fails_the_run_and_is_not_timed() -> None:
    def doubled(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 2 * NKD.provider("published").build()(student, teacher, target)

    def broken(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel in /opt/somewhere/lib.so")

    def nan(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (student * float("nan")).sum()

    providers = [
        Provider("doubled", "", lambda: doubled),
        Provider("broken", "", lambda: broken),
        Provider("nan", "", lambda: nan),
        Provider("absent", "", lambda: broken, lambda device: f"needs another device than {device}"),
    ]
    outcome = runner.run([runner.Work(NKD, providers, [TINY])], OPTIONS, silent)
    entries = {entry["name"]: entry for entry in outcome["losses"][0]["cases"][0]["providers"]}
    status = {name: entry["status"] for name, entry in entries.items()}
    assert status == {"doubled": "wrong", "broken": "failed", "nan": "wrong", "absent": "unavailable"}
    assert entries["broken"]["reason"] == "RuntimeError: no such kernel in <path>"
    assert entries["absent"]["reason"] == "needs another device than cpu"
    assert not any("milliseconds" in entry for entry in entries.values())
    assert len(runner.failures(outcome)) == 2


def test_result_is_complete_and_names_no_place(result: dict[str, Any], tmp_path: Path) -> None:
    assert not runner.failures(result)
    path = cli.save(result, tmp_path)
    assert cli.load(path) == json.loads(json.dumps(result))
    text = path.read_text()
    assert platform.node() not in text and str(Path.home()) + "/" not in text and str(ROOT) not in text
    for case in result["losses"][0]["cases"]:
        for entry in case["providers"]:
            assert entry["status"] == "ok" or entry["reason"], entry
            if entry["status"] == "ok":
                assert list(entry["times"]) == ["cold", "hot"] and entry["memory"]["peak_bytes"] > 0
                for own in entry["times"].values():
                    both = own["milliseconds"]["both"]
                    assert 0 < both["q20"] <= both["median"] <= both["q80"]
                    assert own["fused_kd_speedup"] > 0 and own["calls"] > 0


def test_tables(result: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    terminal.print_result(result, console)
    text = console.export_text()
    assert "…" not in text, "a column was cut at 100 columns"
    assert "liger-kernel" in text
    assert re.search(r"first call, compilation included: .*fused_kd\s[\d.]+\ss", text, re.DOTALL)
    block = pages.details(result)
    tables = [line for line in block.splitlines() if line.startswith("|")]
    assert sum(line.startswith("| 6×11 float32 |") for line in tables) == 3
    assert len({line.count("|") for line in tables[:4]}) == 1
    assert "F.cross_entropy" in block and "Liger" in block


def test_a_busy_machine_and_unsteady_times_are_told(result: dict[str, Any]) -> None:
    doubtful = json.loads(json.dumps(result))
    for _, case in runner._all_cases(doubtful):  # what was measured may be unsteady itself
        for entry in case["providers"]:
            for own in entry.get("times", {}).values():
                own["milliseconds"]["both"].update(q20=1.0, median=1.0, q80=1.0)
    assert not [warning for warning in runner._warnings(doubtful) if "unsteady" in warning]
    doubtful["machine"].update(load_average_before=3.3, cores=2, threads=2)
    doubtful["losses"][0]["cases"][0]["providers"][0]["times"]["cold"]["milliseconds"]["both"].update(
        q20=1.0, median=2.0, q80=3.0
    )
    doubtful["warnings"] = runner._warnings(doubtful)
    block = pages.headline(doubtful)
    assert "load average was 3.3" in block and "published at 6×11 float32, cold, was unsteady: 1 to 3 ms" in block
    assert "other times" not in block
    doubtful["warnings"] += [f"{name} at 6×11 float32, hot, was unsteady: 1 to 3 ms" for name in "abcd"]
    block = pages.headline(doubtful)
    assert "so were 2 other times, which the result lists." in block and "b at 6" in block and "c at 6" not in block
    doubtful["machine"].update(load_average_before=0.1)
    assert not any("load average" in warning for warning in runner._warnings(doubtful))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (0.06623, "0.0662"), (4.8, "4.80"), (78.34, "78.3"), (99.99, "100"), (115.4, "115")],
)
def test_significant_digits(value: float, expected: str) -> None:
    assert report.significant(value) == expected


def test_sizes() -> None:
    assert [report.size(n) for n in (0, 644, 5120, 999_900, 1_024_000, 12_300_000_000)] == [
        "0 B",
        "644 B",
        "5.12 kB",
        "1.00 MB",
        "1.02 MB",
        "12.3 GB",
    ]


def test_readme_block_is_replaced(result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = cli.save(result, tmp_path)
    readme = tmp_path / "README.md"
    begin, end = pages.HEADLINE_MARKS
    readme.write_text(f"before\n\n{begin}\nformer text\n{end}\n\nafter\n")
    assert cli.main(["table", str(source), "--update", str(readme)]) == 0
    once = readme.read_text()
    assert once.startswith(f"before\n\n{begin}\n") and once.endswith(f"\n{end}\n\nafter\n")
    assert "former text" not in once and pages.headline(result) in once
    assert cli.main(["table", str(source), "--update", str(readme)]) == 0
    assert readme.read_text() == once and "up to date" in capsys.readouterr().out
    readme.write_text("no markers")
    with pytest.raises(SystemExit) as stop:
        cli.main(["table", str(source), "--update", str(readme)])
    assert stop.value.code == 2 and "benchmark:begin" in capsys.readouterr().err
    assert readme.read_text() == "no markers"


def test_plot(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = cli.save(result, tmp_path)
    assert cli.main(["plot", str(source)]) == 0
    assert source.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", (1, 2))
def test_a_plot_of_few_cases_is_whole_and_has_the_doubts(
    count: int, result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from benchmarks.show.plot import plot

    few = json.loads(json.dumps(result))
    part = few["losses"][0]
    part["cases"], few["losses"] = part["cases"][:count], [part]
    for case in part["cases"]:  # as many as a run has, and so many names in the legend
        case["providers"].append({**case["providers"][0], "name": "compile"})
    few["warnings"] = ["other work was on the machine: its load average was 3.3 when the run began"]
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot(few, tmp_path / "few.png")
    (figure,) = figures
    assert len(figure.axes) == 2, "cold and hot"
    figure.canvas.draw()  # in the figure's own resolution, the file has another
    whole = figure.bbox
    pieces = [piece for axes in figure.axes for piece in (axes.get_legend(), axes.title, axes._left_title)]
    for piece in [*pieces, figure._supxlabel]:
        box = piece.get_window_extent()
        assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 and box.y1 <= whole.y1, piece
    assert "load average was 3.3" in " ".join(figure._supxlabel.get_text().split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cases", "256*1000"], "ROWSxCLASSES"),
        (["--cases", "0x1000"], "at least 1 row and 2 classes"),
        (["--dtype", "float8"], "expected dtypes among float64"),
        (["--providers", "published,mine"], "got 'mine'"),
        (["--threads", "0"], "expected a number above 0, got '0'"),
        (["--seconds", "soon"], "expected a number above 0, got 'soon'"),
        (["--loss", "mse"], "invalid choice: 'mse'"),
        (["--caches", "warm"], "invalid choice: 'warm'"),
        (["soft-labels", "--photos", "moon,mars"], "got 'mars'"),
        (["soft-labels", "--top", "1000"], "1 to 999 classes"),
        (["--output", __file__], "expected a folder"),
        (["table", "missing.json"], "cannot read missing.json"),
        (["plot", str(cases.LOGITS_FILE)], "expected a JSON file"),
    ],
)
def test_bad_arguments_are_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_command_line_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--loss", "nkd", "--cases", "6x11", "--providers", "published,fused_kd", "--seconds", "0.02"]
    assert cli.main([*argv, "--quick", "--no-plot", "--device", "cpu", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert [entry["name"] for entry in cli.load(path)["losses"][0]["cases"][0]["providers"]] == [
        "published",
        "fused_kd",
    ]
    captured = capsys.readouterr()
    assert "6×11 float32 on cpu" in captured.out and "verifying fused_kd" in captured.err


@pytest.mark.parametrize(
    ("name", "what", "group"),
    (
        ("test_forward_backward", LOSSES["uskd"].provider("fused_kd"), "uskd 6×11 float32"),
        ("test_ranking", "fused_kd", "uskd ranking 6×11 float32"),
    ),
)
def test_pytest_benchmark_has_the_same_cases(name: str, what: Any, group: str, request: pytest.FixtureRequest) -> None:
    """benchmarks/bench_losses.py, whose tests are not collected: once each, untimed."""
    pytest.importorskip("pytest_benchmark")
    from benchmarks import bench_losses

    benchmark = request.getfixturevalue("benchmark")
    getattr(bench_losses, name)(benchmark, LOSSES["uskd"], TINY, what)
    assert benchmark.group == group
