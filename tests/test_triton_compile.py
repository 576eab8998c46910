"""What is launched, and every kernel that dispatch can choose compiled ahead of time: no spills, shared memory, loads.

In a process of its own, since this one may have imported the kernels for Triton's interpreter. That process is this
file, run as a script: it prints one JSON line per kernel and capability.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from fused_kd.backends import triton as backend
from fused_kd.backends import triton_config

ROW_KERNELS = ("rows_on_chip", "rows_looped")
#: What USKD's kernels may take of shared memory: what every GPU since sm_80 gives a block, the smaller ones included.
RANKED_SHARED = 99 * 1024


def main(selection: str, capabilities: list[int]) -> None:
    from fused_kd.backends import triton_compile

    seen = set()
    loss, extent = selection.split("-")
    cases = triton_compile.cases if loss == "nkd" else triton_compile.ranked_cases
    for case in cases(full=extent == "full"):
        for launch in case.launches():
            # The count kernels and reductions of two cases are mostly the same.
            tensors = [getattr(argument, "dtype", None) for argument in launch.arguments]
            key = (launch.kernel, str(launch.options), str(tensors))
            if key in seen:
                continue
            seen.add(key)
            for capability in capabilities:
                report = triton_compile.compile_launch(launch, capability)
                line = {
                    "case": str(case),
                    "kernel": launch.kernel,
                    "capability": capability,
                    "limit": triton_compile.SHARED_LIMIT[capability] if loss == "nkd" else RANKED_SHARED,
                    "element_bytes": max(case.student.itemsize, case[1].itemsize),
                    "vector": launch.options.get("VEC", 1),
                    "warps": launch.options["num_warps"],
                    **report._asdict(),
                }
                print(json.dumps(line), flush=True)


def compile_in_subprocess(selection, capabilities):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, selection, ",".join(map(str, capabilities))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(reports):
    failures = []
    for report in reports:
        name = f"{report['kernel']} of {report['case']}, sm_{report['capability']}"
        if report["stack"]:
            failures.append(f"{name}: spills, {report['stack']} bytes of stack at {report['registers']} registers")
        if report["shared"] > report["limit"]:
            failures.append(f"{name}: {report['shared']} bytes of shared memory, {report['limit']} at most")
        if report["registers"] * 32 * report["warps"] > 65536:
            failures.append(f"{name}: {report['registers']} registers in {report['warps']} warps cannot launch")
        # Tile loads and stores are one vector each; the few other loads are of targets, counts and the logits at y.
        loads, stores, vector = report["loads"], report["stores"], 2 * report["vector"]
        if report["kernel"] in ROW_KERNELS and report["element_bytes"] == 2 and vector >= 8:
            narrow = loads.get("2", 0) if report["kernel"] == "rows_on_chip" else 0
            if loads.get(str(vector), 0) < 2 or not stores.get(str(vector)) or narrow > loads[str(vector)]:
                failures.append(f"{name}: expected rows in vectors of {vector} bytes, got {loads} and {stores}")
    assert not failures, "\n".join(failures)


pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def test_selection():
    reports = compile_in_subprocess("nkd-short", (80, 90))
    assert {report["kernel"] for report in reports} == {
        *ROW_KERNELS,
        "count_chunks",
        "reduce_parts",
        "scale_rows",
    }
    check(reports)


def test_ranked_selection():
    reports = compile_in_subprocess("uskd-short", (90,))
    assert {report["kernel"] for report in reports} == {
        "target_probabilities",
        "ranked_on_chip",
        "write_keys",
        "write_zipf",
        "combine_ranked",
        "reduce_parts",
    }
    check(reports)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["nkd", "uskd"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_matrix(capability, loss):
    check(compile_in_subprocess(f"{loss}-full", (capability,)))


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
    weights = [1.5, 0.0, 1.0, 0.0, 0.0]
    plan = backend.plan_row_loss(
        student, student, target, student, loss, loss, loss, "nkd", weights, False, -100, reduction, True, 1.0
    )
    assert [launch.kernel for launch in plan] == launches


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("narrow", [2, 4, 8])
def test_dispatch_table(narrow, probabilities):
    wide = narrow == 8
    on_chip = 2048 if wide else 4096 if probabilities else 8192
    for classes in (2, 3, 17, 100, 1000, 1024, 1025, 4096, 4097, 8192, 8193, 21841, 49153, 128256, 262144):
        config = triton_config.row_config(
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


if __name__ == "__main__":
    main(sys.argv[1], [int(capability) for capability in sys.argv[2].split(",")])
