"""The README: its example runs as pasted, it is short, and its figures are those of the results."""

import json
import re
from pathlib import Path

import torch

from tools import losses

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = 700  # beside tables and code


def test_the_example_runs_as_pasted():
    names = {}
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(example, "README.md", "exec"), names)
    assert names["student_logits"].grad.abs().sum() > 0
    torch.testing.assert_close(sum(names["parts"]), names["loss"].detach())


def test_it_is_short_and_installing_comes_first():
    prose = re.sub(r"```.*?```", "", re.sub(r"^\|.*$", "", TEXT, flags=re.MULTILINE), flags=re.DOTALL)
    assert len(prose.split()) < WORDS
    assert TEXT.index("pip install") < TEXT.index("```python")


def test_tables_of_losses_are_those_of_the_catalogue():
    assert f"{losses.BEGIN}\n{losses.markdown_table()}\n{losses.END}" in TEXT
    assert (ROOT / "docs" / "losses.md").read_text(encoding="utf-8") == losses.markdown_page()
    assert "Σ<sub>j≠y</sub> q̂<sub>j</sub> log p̂<sub>j</sub>" in TEXT


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\s-]", "", head).lower().replace(" ", "-") for head in heads}, link


def test_shares_of_a_step_are_those_of_the_study():
    (sentence,) = re.findall(r"At 3755 classes[^(]*", TEXT)
    outcome = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    for loss, said in (("NKD", sentence.partition("USKD")[0]), ("USKD", sentence.partition("USKD")[2])):
        (line,) = re.findall(rf"At 3755 classes \*\*{loss}\*\* .*", outcome)
        published, ours = re.findall(r"[\d.]+%", said)
        assert f"{published} of a training step as published" in line and f"{ours} with fused_kd" in line


def test_ratios_on_a_gpu_are_those_of_the_result():
    result = json.loads((ROOT / "benchmarks/results/nkd+uskd-cuda-20261127T030458-a1ef99b688.json").read_text())

    def ratios_of(loss, other):
        (part,) = (part for part in result["losses"] if part["loss"] == loss)
        found = {}
        for case in part["cases"]:
            times = {each["name"]: each.get("milliseconds") for each in case["providers"]}
            found[f"{case['rows']}×{case['classes']}"] = (
                times[other]["both"]["median"] / times["fused_kd"]["both"]["median"]
            )
        return found

    ratios = ratios_of("nkd", "cross_entropy")
    assert max(ratios_of("uskd", "cross_entropy").values()) < 0.3, "far slower"
    assert 0.8 < ratios_of("uskd", "compile")["4096×21841"] < 1.2, "about as fast"
    text = TEXT.partition("## On a GPU")[2]
    assert f"at 8192×128256 NKD had {ratios['8192×128256']:.2g} times the speed" in " ".join(text.split())
    assert f"{ratios['4096×21841']:.2g} of that speed" in text and f"launch-bound, {ratios['8192×1000']:.1f}" in text
