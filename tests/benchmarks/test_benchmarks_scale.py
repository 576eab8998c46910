"""docs/scale.md is what its script writes from the result that it names, and the script's sums are right."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # last, so that it cannot shadow an installed fused_kd

pytest.importorskip("rich")

from benchmarks import __main__ as benchmark  # noqa: E402
from benchmarks.sources import scale  # noqa: E402
from benchmarks.sources.case import Case  # noqa: E402
from fused_kd.backends import sources  # noqa: E402
from fused_kd.backends.native.staged import FIELDS  # noqa: E402

PAGE = ROOT / "docs" / "scale.md"
RESULT = re.compile(r"`(benchmarks/results/[\w.+-]+\.json)`")


@pytest.fixture
def result() -> dict[str, Any]:
    (named,) = RESULT.findall(PAGE.read_text(encoding="utf-8"))
    found: dict[str, Any] = json.loads((ROOT / named).read_text(encoding="utf-8"))
    return found


def test_the_page_is_what_the_script_writes(result: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (named,) = RESULT.findall(text)
    block = text.partition(f"{scale.BEGIN}\n")[2].partition(f"\n{scale.END}")[0]
    assert block == scale.markdown(result, Path(named).name), (
        f"run `python -m benchmarks scale {named} --update {PAGE.name}`"
    )
    assert "](scale.png)" in text and (PAGE.parent / "scale.png").stat().st_size > 10_000


def test_the_command_writes_page_and_picture(result: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    page, (named,) = tmp_path / "page.md", RESULT.findall(PAGE.read_text(encoding="utf-8"))
    page.write_text(f"before\n{scale.BEGIN}\nearlier tables\n{scale.END}\nafter\n")
    for words in ("updated", "up to date"):
        assert benchmark.main(["scale", str(ROOT / named), "--update", str(page)]) == 0
        assert words in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "earlier" not in text
    assert page.with_suffix(".png").stat().st_size > 10_000
    assert benchmark.main(["scale", str(ROOT / named)]) == 0
    assert "GFLOP/s" in capsys.readouterr().out


def test_what_is_no_result_of_heads_is_refused(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "other.json"
    for text, words in (
        ('{"source": "topk", "cases": []}', "--source head"),
        ("[", "Expecting"),
        ("{}", "--source head"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit):
            benchmark.main(["scale", str(path)])
        assert words in capsys.readouterr().err


def test_the_constants_are_those_of_the_largest_case() -> None:
    def case(rows: int, dtype: str, **milliseconds: float) -> dict[str, Any]:
        timed = {"products": "", "row_kernel": "nkd"}
        forms = [
            {"name": name, "loss": timed[name], "milliseconds": {"median": value}}
            for name, value in milliseconds.items()
        ]
        return {**vars(Case(rows, 1000, 4, 2, dtype, chunk_rows=8)), "forms": forms}

    given = [
        case(10, "float32", products=1.0, row_kernel=1.0),
        case(100, "float32", products=2.0, row_kernel=4.0),
        case(200, "bfloat16", products=1.0, row_kernel=1.0),
        case(300, "float32", products=1.0),
    ]
    found = scale.measured({"source": "head", "cases": given})
    assert found.case.rows == 100 and found.case.chunk_rows is None  # what was measured is not what others take
    # Three products with a width of 4 and one with a width of 2, in 2 ms; three matrices in 4 ms.
    assert found.flops == pytest.approx(2 * 100 * 1000 * (3 * 4 + 2) / 2e-3)
    assert found.bytes == pytest.approx(3 * 100 * 1000 * 4 / 4e-3)


def test_the_model() -> None:
    about = scale.Measured(Case(2048, 128256, 512, 256), 1e11, 1e10)
    one, two = (scale.times(about, 1_000_000, processes) for processes in (1, 2))
    assert one.exchange == 0 and one.products == pytest.approx(2 * 2048 * 1e6 * (3 * 512 + 256) / 1e11)
    assert two.products == one.products / 2 and two.kernel == one.kernel / 2
    # 2048 rows in chunks, of which each tells its statistics, and half of the hidden states' gradient twice.
    rows, stored = scale._chunk(Case(2048, 500_000, 512, 256), "cpu")
    assert 1 < rows < 64 and stored == 2 * rows * 500_000 * 4 <= sources.CHUNK_BYTES["cpu"]
    moved = 2048 * scale.exchanged("nkd") + 2048 * 512 * 4
    assert two.exchange == pytest.approx(moved / scale.BANDWIDTH + (-(-2048 // rows) + 1) * scale.LATENCY)
    rows, stored = scale._chunk(Case(2048, 1_000_000, 512, 256), "cuda")
    assert rows > 16 and stored == 3 * rows * 1_000_000 * 4 <= sources.CHUNK_BYTES["cuda"]


def test_what_is_exchanged() -> None:
    assert scale.exchanged("nkd") == 88  # what a process of --source shard counts
    assert scale.exchanged("js", standardize=True) == 8 * (FIELDS["moments"] + 7 + 6)
