"""The benchmark of heads, top-k teachers and sharded classes, at sizes that take no time."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # last, so that it cannot shadow an installed fused_kd

pytest.importorskip("rich")

from rich.console import Console  # noqa: E402

from benchmarks import __main__ as benchmark  # noqa: E402
from benchmarks.sources import call, cli, errors, forms, heads, shards, show, topk  # noqa: E402
from benchmarks.sources.case import Case, make_inputs  # noqa: E402
from fused_kd import TopK, kd_loss  # noqa: E402
from fused_kd.backends import native, sources  # noqa: E402
from fused_kd.core.rows import SourceRows  # noqa: E402

TINY = Case(8, 33, 6, 3)
EFFORT = heads.Effort(rounds=1, seconds=0.0, processes=False)


def silent(text: str, share: float) -> None:
    assert 0 <= share <= 1


def printed(result: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=100, highlight=False)
    show.print_result(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return str(text)


def result_of(source: str, case: dict[str, Any]) -> dict[str, Any]:
    args = cli.parser().parse_args(["--source", source, "--quick"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_case", lambda *_: case)
        return cli.run(args, silent)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_case_of_heads(dtype: str) -> None:
    measured = heads.measure(Case(8, 33, 6, 3, dtype), ["nkd", "js"], EFFORT, silent)
    by_key = {(entry["name"], entry["loss"]): entry for entry in measured["forms"]}
    for loss in ("nkd", "js"):
        entry = by_key["fused_kd", loss]
        assert entry["status"] == "ok" and entry["relative_errors"]["within"]
        assert set(measured["ratios"][loss]) == {"over_parts", "over_whole_parts", "over_unfused"}
    assert by_key["products", ""]["milliseconds"]["median"] > 0
    assert by_key["liger", "js"]["status"] == "unavailable"
    result = result_of("head", measured)
    json.dumps(result)
    assert not cli.failures(result)
    text = printed(result)
    assert "fused_kd, Head, nkd" in text and "row kernel, a chunk × chunks, js" in text


def test_a_million_classes_are_measured_of_fused_kd_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "MILLION", 33)
    measured = heads.measure(TINY, ["nkd"], EFFORT, silent)
    assert [entry["name"] for entry in measured["forms"]] == ["fused_kd"]
    measured["ratios"]["nkd"] |= {"peak_bytes": 3e9, "peak_over_logits": 9.0}
    assert [words.split(":")[1].split()[0] for words in heads.missed({"cases": [measured]})] == ["peak_bytes"]


@pytest.mark.parametrize("loss", forms.LOSSES)
def test_forms_compute_one_loss(loss: str) -> None:
    """In float64, loss and gradients: the head in its chunks, with logits, and the definition."""
    case = Case(8, 33, 6, 3, "float64", chunk_rows=3)
    for form in forms.forms([loss]):
        if form.loss == loss and not form.unavailable(case):
            found = errors.relative_errors(form, case)
            if found is not None:
                assert max(found[name] for name in errors.WHAT) < 1e-12, form.key


def test_a_wrong_form_is_told() -> None:
    def wrong(inputs: Any, case: Case) -> forms.Run:
        run = forms.eager("kd", inputs)
        return lambda: run() * 1.01  # type: ignore[operator]

    found = errors.relative_errors(forms.Form("fused_kd", "kd", wrong), TINY)
    assert found is not None and not found["within"]
    entry = {"name": "fused_kd", "loss": "kd", "status": "ok", "relative_errors": found}
    result = {"cases": [{"name": "a case", "dtype": "float32", "forms": [entry]}]}
    assert len(cli.failures(result)) == 1 and "fused_kd kd at a case" in cli.failures(result)[0]


def test_products_take_the_chunks_of_fused_kd(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    rows = sources._rows
    monkeypatch.setattr(sources, "_rows", lambda *given: seen.append(len(given[1])) or rows(*given))  # type: ignore[func-returns-value]
    monkeypatch.setitem(sources.CHUNK_BYTES, "cpu", 2 * 33 * 4 * 3)
    call.run_once(next(iter(forms.forms(["nkd"]))).make(make_inputs(TINY), TINY))
    assert seen == [3, 3, 2] and forms.chunk_rows(TINY) == 3 and forms.chunks(TINY) == 3
    assert forms.chunk_rows(Case(8, 33, 6, 3, chunk_rows=100)) == 8
    assert SourceRows(torch.empty(0)).weight is None


def test_memory_is_seen_in_a_process_of_its_own() -> None:
    """8 rows of a million classes: three matrices of 32 MB with logits, beyond the gradients."""
    case = Case(8, 2**20, 1, 1)
    form = next(form for form in forms.forms(["nkd"]) if form.name == "unfused")
    found = call.in_process(form, case, 0.0, 1)
    assert found["gradient_bytes"] == 4 * (8 + 2**20)
    assert 2.5 * case.logits_bytes < found["peak_bytes"] < 5 * case.logits_bytes
    with pytest.raises(RuntimeError, match="RuntimeError: "):
        call.in_process(form, Case(8, -4, 1, 1), 0.0, 1)


def test_kept_classes() -> None:
    case = topk.Case(6, 65, 8)
    measured = topk.measure(case, ["kd"], 0.01, 1, silent)
    assert [entry["rest"] for entry in measured["forms"]] == ["dense", *topk.RESTS]
    assert measured["teacher_bytes"] == {"dense": 6 * 65 * 4, "kept": 6 * 8 * 12}
    assert [entry["status"] for entry in measured["forms"]] == ["ok"] * 5
    result = result_of("topk", measured)
    assert not cli.failures(result)
    assert "kd, dense" in printed(result)


def test_kept_classes_of_a_loss_that_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in that makes logits of them, and is wrong for one ``rest``."""

    def kd(student: torch.Tensor, teacher: Any, target: torch.Tensor, **options: Any) -> torch.Tensor:
        wrong = 0.0
        if isinstance(teacher, TopK):
            wrong = 0.1 * (teacher.rest == "bucket" and not options)
            few = torch.full_like(student, float("-inf")).detach()
            teacher = few.scatter(1, teacher.indices, teacher.log_probs.to(few.dtype))
        loss = kd_loss(student, teacher, target, **options)
        assert isinstance(loss, torch.Tensor)
        return loss * (1 + wrong)

    monkeypatch.setitem(topk.LOSSES, "kd", (kd, kd))
    measured = topk.measure(topk.Case(6, 65, 8), ["kd"], 0.01, 1, silent)
    assert all(entry["status"] == "ok" and entry["over_dense"] > 0 for entry in measured["forms"])
    result = result_of("topk", measured)
    (failure,) = set(cli.failures(result))  # of two dtypes, for which the same case stands
    assert failure.startswith("kd bucket at 8 of 6×65 float32: wrong by")
    assert "kd, uniform" in printed(result)


def test_kept_classes_over_the_bar() -> None:
    entry = {"loss": "kd", "rest": "drop", "over_dense": 0.8}
    assert topk.missed({"cases": [{"name": "a case", "forms": [entry, {**entry, "over_dense": 0.7}]}]}) == [
        "kd, drop at a case: 0.8 of the dense loss's time, the bar is 0.75"
    ]


def test_shared_classes() -> None:
    measured = shards.measure(shards.Case(4, 31), 0.05, silent)
    assert measured["status"] == "ok", measured["reason"]
    result = result_of("shard", measured)
    assert not cli.failures(result)
    text = printed(result)
    assert "4×31 float32" in text and "2 processes" in text


def test_shared_classes_are_summed_up() -> None:
    processes = [
        {"shared": [9.0, 2.0, 3.0], "alone": [9.0, 1.0, 1.0]},
        {"shared": [9.0, 1.0, 5.0], "alone": []},
    ]
    counts = {"exchanges": 1, "given_bytes": 400, "got_bytes": 400, "relative_errors": {"loss": 1e-7, "gradient": 1e-7}}
    found = shards._summary(shards.Case(4, 31), [process | counts for process in processes])
    assert found["over_alone"] == 3.5 and found["given_bytes_per_row"] == 100 and found["calls"] == 2
    text = printed(result_of("shard", {**vars(shards.Case(4, 31)), "name": "a case", **found}))
    assert "4×31 float32" in text and "3.5×" in text


def test_exchanged_bytes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(all_gather_into_tensor=lambda *_: None, all_reduce=lambda *_, **__: None)
    monkeypatch.setattr(shards, "distributed", fake)
    with shards.Counted().counting() as counted:
        fake.all_gather_into_tensor(torch.empty(2, 5), torch.empty(5), None)
        fake.all_reduce(torch.empty(3), group=None)
    assert (counted.given, counted.got, counted.calls) == (32, 32, 2)
    fake.all_reduce(torch.empty(3))
    assert counted.calls == 2


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--cases", "6x65", "--dtype", "float32", "--output", str(tmp_path), "--seconds", "0.01"]
    assert benchmark.main(["--source", "topk", *options, "--width", "4"]) == 0
    (path,) = tmp_path.glob("topk-*.json")
    result = json.loads(path.read_text())
    assert result["schema"] == cli.SCHEMA and result["machine"]["cpu"] and result["cases"][0]["kept"] == 4
    assert "TopK, 4 of 6×65" in capsys.readouterr().out
    for wrong in (["--source", "nothing"], ["--source=head", "--width", "0"]):
        with pytest.raises(SystemExit):
            benchmark.main(wrong)


def test_eager_pytorch_is_not_timed_as_fused_kd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "unavailable", lambda *_: "it was built from other sources")
    with pytest.raises(SystemExit):
        benchmark.main(["--source", "topk", "--cases", "6x65", "--device", "cpu"])
    said = "fused_kd's kd would run in eager PyTorch here: native: it was built from other sources"
    assert said in capsys.readouterr().err
