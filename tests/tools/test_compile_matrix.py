"""The launches, and what the compilers make of them: no spills, shared memory, width of loads.

`python -m tools.compile_matrix` compiles in its own process, because this one may have imported the kernels for
Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fused_kd.backends.triton import layout
from fused_kd.backends.triton.plans.rows import plan_row_loss
from fused_kd.core.options import HyperParameters, Options

pytest.importorskip("rich")
from tools.compile_matrix import __main__, compiling, tables
from tools.compile_matrix.rules import problems

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_nvcc = pytest.mark.skipif(compiling.nvcc() is None or find_spec("triton") is None, reason="there is no nvcc")
ALL = pytest.param("1/1", marks=pytest.mark.slow)
#: Some kernels of the selection, and all of it.
parts = pytest.mark.parametrize("part", ("1/4", ALL))


def compile_kernels(folder, *arguments):
    """Return the rows of a run without a problem."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.compile_matrix", *arguments, "--json", str(folder / "kernels.json")]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert ", 0 problems" in result.stdout
    return json.loads((folder / "kernels.json").read_text())


@needs_triton
@parts
def test_selection(tmp_path, part):
    rows = compile_kernels(tmp_path, "--loss", "nkd", "--arch", "80", "--no-cuda", "--part", part)
    names = {row["kernel"] for row in rows}
    assert names == {"rows_on_chip", "rows_looped", "count_chunks", "reduce_parts", "scale_rows"}
    assert {row["capability"] for row in rows} == {80}
    # Where rows are walked in vectors, the edges alone are stored one by one.
    walked = [row for row in rows if row["kernel"] == "rows_looped" and row["vector"] == 16 and row["writes"]]
    assert walked
    assert all(row["stores"].get("2", 0) <= 1 for row in walked if row["element_bytes"] == 2)


@needs_triton
@pytest.mark.parametrize("part", ("1/5", ALL))  # of more kernels
def test_selection_of_further_losses(tmp_path, part):
    rows = compile_kernels(tmp_path, "--loss", "rows", "--arch", "90", "--no-cuda", "--part", part)
    assert {"rows_on_chip", "rows_looped"} <= {row["kernel"] for row in rows}


@needs_triton
@parts
def test_ranked_selection(tmp_path, part):
    rows = compile_kernels(tmp_path, "--loss", "uskd", "--arch", "100", "--no-cuda", "--part", part)
    assert {row["kernel"] for row in rows} == {
        "target_probabilities",
        "ranked_on_chip",
        "write_keys",
        "write_zipf",
        "combine_ranked",
        "reduce_parts",
    }


@needs_triton
def test_sm_100_needs_no_stack():
    """These kernels spilled there, with register limits that did not spill on sm_90."""
    script = """
from tools.compile_matrix.machine_code import compile_launch
from tools.compile_matrix.cases import BF16, FP16, Case
of_rows = [Case(BF16, BF16, 2048, loss=loss, ce_weight=0.0) for loss in ("kd", "js")]
for case in (Case(FP16, FP16, 4096, 3.0, rows=40000), *of_rows):
    for launch in case.launches():
        if launch.kernel.startswith("rows"):
            report = compile_launch(launch, 100)
            print(launch.kernel, report.stack, report.local)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines() == ["rows_looped 0 0", *["rows_on_chip 0 0"] * 2], result


@needs_triton
def test_an_option_that_does_not_reach_the_compiler_is_an_error():
    script = """
import torch
from fused_kd.backends.triton.plans.scale import plan_scale
from tools.compile_matrix.machine_code import compile_launch
x = torch.empty(4, 8, device="meta")
launch = plan_scale(x, x[:, 0], x[0, 0], x)
compile_launch(launch, 90)
launch.options["num_wraps"] = 4
try:
    compile_launch(launch, 90)
except ValueError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "scale_rows: neither an argument nor an option of the compiler: ['num_wraps']" in result.stdout, result


@needs_nvcc
def test_cuda_selection(tmp_path):
    rows = compile_kernels(tmp_path, "--loss", "none", "--arch", "90", "--sources", "batch_sums.cu,scale_gradient.cu")
    assert {row["case"] for row in rows} == {"batch_sums.cu", "scale_gradient.cu"}
    assert all(row["registers"] > 0 for row in rows)


@needs_nvcc
@pytest.mark.slow
def test_every_kernel(tmp_path):
    assert len(compile_kernels(tmp_path, "--full")) > 1000


@needs_triton
def test_what_does_not_compile_is_one_line_of_many(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.compile_matrix", "--loss", "none", "--arch", "90", "--sources"]
    command += ["batch_sums.cu,scale_gradient.cu", "--json", str(tmp_path / "kernels.json")]
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    environment["CUDACXX"] = str(broken)
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert ", 2 problems" in result.stdout
    assert len(re.findall("error: .*no such luck", result.stderr)) == 2
    assert json.loads((tmp_path / "kernels.json").read_text()) == []


GOOD = {
    "kernel": "rows_on_chip", "case": "1024x1000 bf16", "capability": 90, "registers": 64, "threads": 128,
    "shared": 512, "shared_limit": 227 * 1024, "stack": 0, "local": 0, "spilled": 0,
    "loads": {2: 2, 8: 5, 16: 2}, "stores": {16: 1},
    "vector": 16, "element_bytes": 2, "inputs": 2, "writes": True, "elements": 8, "library": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"stack": 8}, "spills: 8 bytes of stack"),
        ({"local": 3}, "3 instructions on local memory"),
        ({"spilled": 24}, "24 bytes spilled at 64 registers"),
        ({"shared": 228 * 1024}, "233472 bytes of shared memory, 232448 at most"),
        ({"shared": 164 * 1024, "capability": 80}, "167936 bytes of shared memory, 166912 at most"),
        ({"shared": 100 * 1024, "shared_limit": 99 * 1024}, "102400 bytes of shared memory, 101376 at most"),
        ({"registers": 129, "threads": 512}, "129 registers in 512 threads cannot launch"),
        ({"loads": {2: 18}}, "expected rows in vectors of 16 bytes"),
        ({"elements": 16}, "expected rows in vectors of 16 bytes"),  # half of the tile is
        ({"stores": {2: 8}}, "expected rows in vectors of 16 bytes"),
    ],
)
def test_rules(change, complaint):
    assert problems(GOOD) == []
    (found,) = problems({**GOOD, **change})
    assert complaint in found
    assert problems({**GOOD, **change, "library": True}) == []


def test_rules_of_a_kernel_that_may_spill():
    row = {**GOOD, "kernel": "rank_streamed_row<1024,24,2>", "stack": 48, "local": 37, "spilled": 148}
    assert problems(row) == []
    (found,) = problems({**row, "spilled": 400})
    assert "400 bytes spilled" in found


def test_rules_of_ranked_rows():
    """Each row needs one wide load: after the ranking it is read in another order."""
    row = {**GOOD, "kernel": "ranked_on_chip", "loads": {2: 16, 8: 1, 16: 1}}
    assert problems(row) == []
    (found,) = problems({**row, "loads": {2: 16, 8: 1}})
    assert "expected rows in vectors of 8 bytes at least" in found
    assert problems({**row, "loads": {2: 16}, "vector": 2}) == []


def test_rules_of_amd_gpus():
    """They have less shared memory, and their compiler distributes the registers itself."""
    row = {**GOOD, "capability": "gfx942", "shared_limit": 64 * 1024, "registers": 256, "threads": 1024}
    assert problems(row) == []
    (found,) = problems({**row, "shared": 65 * 1024})
    assert "rows_on_chip of 1024x1000 bf16, gfx942: 66560 bytes of shared memory, 65536 at most" in found
    (found,) = problems({**row, "stack": 36})
    assert "gfx942: spills: 36 bytes of stack" in found
    rows = [{**each, "seconds": 1.0} for each in (row, {**row, "capability": "gfx90a"}, GOOD)]
    summary = [line[:2] for line in tables.summarise(rows)]
    assert summary == [("rows_on_chip", "90"), ("rows_on_chip", "gfx90a"), ("rows_on_chip", "gfx942")]


def test_rules_of_odd_rows_and_wide_logits():
    assert problems({**GOOD, "vector": 2, "loads": {2: 18}, "stores": {2: 8}}) == []
    assert problems({**GOOD, "element_bytes": 4, "loads": {4: 18}, "stores": {4: 8}}) == []
    assert problems({**GOOD, "writes": False, "stores": {4: 3}}) == [], "forward only"


def test_rows_of_an_earlier_run(tmp_path, capsys):
    more = {"source": "triton", "loss": "nkd", "instructions": 9, "exponentials": 1, "seconds": 0.5}
    path, document = tmp_path / "kernels.json", tmp_path / "kernels.md"
    path.write_text(json.dumps([GOOD | more, GOOD | more | {"stack": 8, "registers": 72}]))
    document.write_text(f"before\n{__main__.FULL_BEGIN}\n{__main__.FULL_END}\n{__main__.BEGIN}\n{__main__.END}\n")
    assert __main__.main(["--read", str(path), "--full", "--update", str(document)]) == 1
    assert "2 kernels, 1 problems" in capsys.readouterr().out
    text = document.read_text()
    assert "| rows_on_chip | 90 | 2 | 64–72 | 512 | 1 spill | 16 B | 1 s | 0.5 s |" in text
    assert "2 kernels, of which 1 break a rule." in text
    assert f"{__main__.BEGIN}\n{__main__.END}" in text, "the selection's block is another"
    path.write_text("[{}]")
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["--read", str(path)])
    assert "expected what --json wrote" in capsys.readouterr().err


def test_parts_of_the_matrix():
    tasks = [(compiling.compile_triton, (i,)) for i in range(11)]
    parts = [compiling.part_of(tasks, f"{part}/3") for part in (1, 2, 3)]
    assert sorted(task for part in parts for task in part) == tasks
    for text in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(ValueError, match="expected a part such as 1/4"):
            compiling.part_of(tasks, text)


def test_summary():
    rows = [{**GOOD, "seconds": 1.0}, {**GOOD, "registers": 80, "local": 2, "loads": {2: 1, 8: 1}, "seconds": 2.5}]
    (line,) = tables.summarise(rows)
    assert line == ("rows_on_chip", "90", "2", "64–80", "512", "1 spill", "8 B", "4 s", "2.5 s")


def test_command_line_refuses(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for arguments in (
        ["--arch", "Hopper"],
        ["--arch", "90,gfx"],
        ["--part", "3/2", "--loss", "none"],  # planning would import the kernels, and here without the interpreter
        ["--loss", "none", "--sources", "missing.cu"],
    ):
        if arguments[0] == "--loss" and compiling.nvcc() is None:
            continue
        with pytest.raises(SystemExit) as caught:
            __main__.main(arguments)
        assert caught.value.code == 2
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        __main__.main([])
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "reduction", "dtype", "launches"),
    [
        (1024, "none", torch.bfloat16, ["rows_on_chip"]),
        (1024, "mean", torch.bfloat16, ["rows_on_chip", "reduce_parts"]),
        (8192, "sum", torch.bfloat16, ["rows_on_chip", "reduce_parts"]),
        (8192, "mean", torch.float16, ["count_chunks", "rows_on_chip", "reduce_parts"]),
        (8192, "mean", torch.bfloat16, ["count_chunks", "rows_on_chip", "reduce_parts"]),
        (40000, "mean", torch.bfloat16, ["count_chunks", "rows_on_chip", "reduce_parts", "reduce_parts"]),
    ],
)
def test_launches(rows, reduction, dtype, launches):
    student = torch.empty(rows, 1000, dtype=dtype)
    loss = torch.empty(rows if reduction == "none" else ())
    target = torch.zeros(rows, dtype=torch.int64)
    options = Options(HyperParameters(gamma=1.5), -100, reduction, (True,), (1.0,), "nkd")
    plan = plan_row_loss(student, student, target, None, None, (loss, loss, student, loss), options)
    assert [launch.kernel for launch in plan] == launches


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("narrow", [2, 4, 8])
def test_dispatch_table(narrow, probabilities):
    wide = narrow == 8
    on_chip = 4096 if probabilities and not wide else 2048
    for classes in (2, 3, 17, 100, 1000, 1024, 1025, 4096, 4097, 8192, 8193, 21841, 49153, 128256, 262144):
        config = layout.row_config(
            classes,
            narrow,
            wide=wide,
            probabilities=probabilities,
            unit_temperature=True,
            neighbours=True,
            vectors=True,
        )
        assert config.registers * 32 * config.warps <= 65536
        if classes <= on_chip:
            assert classes <= config.block < max(17, 2 * classes)
            assert config.rows * config.block <= on_chip
        else:
            assert config.lanes == 32 * config.warps
            assert config.width * narrow == 16
