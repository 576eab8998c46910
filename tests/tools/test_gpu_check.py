"""Test the scripts for a machine with a GPU without one."""

import json
import sys
import time
from argparse import Namespace

import pytest
import torch

from tools.gpu import check, tests
from tools.gpu.check import Stage

ARGUMENTS = Namespace(device="cpu", tests=["tests"], dtype="float32", seconds=1.0)


def plan_of(*given):
    return lambda args, capability, scratch: list(given)


def python(name, code, seconds=30.0, **more):
    return Stage(name, (sys.executable, "-c", code), seconds, **more)


def statuses(folder):
    stages = json.loads((folder / "gpu-check.json").read_text())["stages"]
    return {entry["name"]: entry["status"] for entry in stages}, {entry["name"]: entry["reason"] for entry in stages}


def test_stages_are_reported(tmp_path, capsys):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    plan = plan_of(
        python("good", "print('all is well')"),
        python("bad", "import sys; print('broken'); sys.exit(3)"),
        python("slow", child, seconds=6.0),
        Stage("absent", ("nothing",), 30.0, missing="there is no such tool"),
        Stage("no program", ("/nonexistent/program",), 30.0),
        python("last", "import os; print('still run,', os.environ['GREETING'])", environment={"GREETING": "well"}),
    )
    start = time.monotonic()
    assert check.main([str(tmp_path), "--device", "cpu"], plan) == 1
    assert time.monotonic() - start < 40
    found, reasons = statuses(tmp_path)
    assert found == {
        "good": "passed", "bad": "failed", "slow": "timed out", "absent": "skipped", "no program": "failed",
        "last": "passed",
    }  # fmt: skip
    assert reasons["bad"] == "exit status 3"
    log = (tmp_path / "gpu-check.log").read_text()
    assert "all is well" in log and "broken" in log and "still run, well" in log
    assert "\nfailed: bad, slow, no program" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu-check.json").read_text())["environment"]["torch"]


def test_the_limit_is_for_all_stages(tmp_path):
    plan = plan_of(python("first", "import time; time.sleep(3)"), python("second", "print('never')"))
    assert check.main([str(tmp_path), "--device", "cpu", "--limit", "7"], plan) == 0
    found, reasons = statuses(tmp_path)
    assert list(found.values()) == ["passed", "skipped"]
    assert reasons["second"] == "no time was left"


def test_a_stage_leaves_the_time_of_those_after_it(tmp_path):
    plan = plan_of(
        python("greedy", "import time; time.sleep(60)", seconds=60),
        python("skipped", "", least=500.0, missing="it sets nothing aside"),
        python("kept", "print('run')", least=8.0),
    )
    assert check.main([str(tmp_path), "--device", "cpu", "--limit", "16"], plan) == 1
    assert list(statuses(tmp_path)[0].values()) == ["timed out", "skipped", "passed"]


def test_all_stages_can_have_what_is_set_aside_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "lacking", lambda *packages: None)
    planned = check.stages(ARGUMENTS, 90, tmp_path)
    assert sum(stage.least for stage in planned) < check.LIMIT - 60
    assert all(stage.least <= stage.seconds for stage in planned)
    assert all((check.ROOT / file).is_file() for file in check.TRITON_TESTS)
    names = [stage.name for stage in planned]
    assert names.index("tests") < names.index("memcheck") < names.index("racecheck") < names.index("benchmark nkd")


@pytest.mark.parametrize(
    ("code", "output", "status", "reason"),
    [
        (9, "========= Invalid __global__ read of size 4 bytes", "failed", "it found errors"),
        (
            1,
            "========= Error: Device not supported. Please refer to the",
            "skipped",
            "it does not work here: Error: Dev",
        ),
        (1, "Traceback (most recent call last):", "failed", "exit status 1"),
        (0, "========= ERROR SUMMARY: 0 errors", "passed", None),
    ],
)
def test_a_sanitizer_that_cannot_work_is_no_failure(tmp_path, code, output, status, reason):
    stage = python("memcheck", f"import sys; print({output!r}); sys.exit({code})", tool=True)
    entry = check.run_stage(stage, tmp_path / "log", 30.0)
    assert entry["status"] == status
    assert entry["reason"] is None if reason is None else entry["reason"].startswith(reason)


def test_sanitizer_looks_at_our_kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(check.shutil, "which", lambda name, **where: f"/cuda/bin/{name}")
    stage = check._sanitizer("racecheck", ("python", "small"), "cuda")
    assert stage.missing is None and stage.tool
    assert stage.command[:3] == ("/cuda/bin/compute-sanitizer", "--tool", "racecheck")
    assert {"kns=fused_kd", "kns=rows_on_chip", "kns=ranked_on_chip", "kns=scale_rows"} <= {*stage.command}
    assert stage.command[-2:] == ("python", "small")


def test_what_is_not_installed_is_said(tmp_path, monkeypatch):
    absent = {"pytest", "xdist", "numpy", "triton", "rich", "setuptools"}
    monkeypatch.setattr(
        check, "lacking", lambda *packages: ", ".join(name for name in packages if name in absent) or None
    )
    planned = {stage.name: stage for stage in check.stages(ARGUMENTS, 90, tmp_path)}
    missing = {name: stage.missing for name, stage in planned.items() if stage.missing and not stage.tool}
    assert missing == {
        "build": "setuptools", "tests": "pytest, xdist", "Triton's tests": "pytest, xdist, triton",
        "benchmark nkd": "numpy, rich", "benchmark uskd": "numpy, rich", "kernels": "triton, rich",
    }  # fmt: skip


def result_of(loss, copy):
    ours = {"name": "fused_kd", "times": {"hot": {"share_of_copy_bandwidth": 0.5}}}
    case = {"device": "cuda", "providers": [ours, {"name": "liger"}]}
    parts = [{"loss": loss, "cases": [case]}]
    return {"schema": 3, "losses": parts, "warnings": [loss], "copy_bytes_per_second": {"cuda": copy}}


def test_one_file_has_everything(tmp_path):
    scratch, folder = tmp_path / "scratch", tmp_path / "folder"
    folder.mkdir()
    for loss, copy in (("nkd", 8.0), ("uskd", 10.0)):
        (scratch / loss).mkdir(parents=True)
        (scratch / loss / f"{loss}-cuda.json").write_text(json.dumps(result_of(loss, copy)))
        (scratch / loss / f"{loss}-cuda.png").write_bytes(b"PNG")
    (scratch / "kernels.json").write_text("[]")
    found = check.collect(scratch, folder)
    assert [part["loss"] for part in found["losses"]] == found["warnings"] == ["nkd", "uskd"]
    assert found["copy_bytes_per_second"] == {"cuda": 10.0}, "the best one, to which all shares relate"
    shares = [part["cases"][0]["providers"][0]["times"]["hot"]["share_of_copy_bandwidth"] for part in found["losses"]]
    assert shares == [0.4, 0.5]
    assert found["schema"] == 3 and found["kernels"] == [] and found["tests"] is None
    assert sorted(path.name for path in folder.iterdir()) == ["nkd-cuda.png", "uskd-cuda.png"]
    assert check.collect(tmp_path / "nothing", folder) == {"tests": None, "triton-tests": None, "kernels": None}


def test_real_stages_on_the_cpu(tmp_path, capsys):
    """Run the stages that need no GPU: the environment, the tests with their outcome, and the benchmark. The one JSON
    file holds the benchmark's result as its own file would."""
    arguments = [str(tmp_path), "--device", "cpu", "--dtype", "float32", "--seconds", "0.01"]
    arguments += ["--stages", "environment,tests", "--tests", "tests/losses/test_errors.py"]
    assert check.main(arguments) == 0, (tmp_path / "gpu-check.log").read_text()[-2000:]
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert result["tests"]["passed"] > 10
    assert result["tests"]["failed"] == 0
    assert "nothing failed" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-check.json", "gpu-check.log"]


TESTS = """
import os, signal, time
import pytest

def test_one(): pass
def test_two(): assert 1 + 1 == 3
@pytest.mark.skip(reason="not today")
def test_three(): pass
@pytest.fixture
def broken():
    yield
    raise OSError("when torn down")
def test_four(broken): pass
"""


def test_outcomes_of_tests(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_collected.py").write_text("import nothing_of_that_name")
    found = tests.run([str(tmp_path)], 2, 60.0, "")
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 3, 1)
    text = "\n".join(tests.as_text(found))
    assert "tests: 1 passed, 3 failed, 1 skipped" in text
    assert "test_some.py::test_two: assert (1 + 1) == 3" in text
    assert "test_some.py::test_four: OSError: when torn down" in text
    assert "No module named 'nothing_of_that_name'" in text
    assert found["why skipped"] == {"Skipped: not today": 1}
    assert found["unfinished"] == []


def test_a_crash_and_a_lost_gpu_cost_one_test_each(tmp_path):
    """The tests after it run in another process, because CUDA's errors last."""
    (tmp_path / "test_lost.py").write_text(
        TESTS
        + """
lost = False
def test_five(): os.kill(os.getpid(), signal.SIGSEGV)
def test_six():
    global lost
    lost = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
@pytest.mark.parametrize("k", range(4))
def test_seven(k): assert not lost
"""
    )
    found = tests.run([str(tmp_path)], 1, 60.0, "")
    assert (found["passed"], found["failed"], found["skipped"]) == (5, 4, 1)
    assert "crashed while running 'test_lost.py::test_five'" in found["failures"][2]
    assert found["failures"][3].endswith("test_six: RuntimeError: CUDA error: an illegal memory access was encountered")
    assert found["unfinished"] == []


def test_what_is_known_survives_the_end_of_the_time(tmp_path):
    (tmp_path / "test_wait.py").write_text(TESTS + "def test_five(): time.sleep(60)\ndef test_six(): pass")
    late = tests.run([str(tmp_path)], 1, 10.0, "")
    assert (late["passed"], late["failed"], late["skipped"]) == (1, 2, 1)
    assert late["unfinished"] == ["out of time", "test_wait.py::test_five: not ended", "1 tests: not begun"]
    none = tests.run([str(tmp_path)], 1, 0.0, "")
    assert none["passed"] == 0 and none["unfinished"] == ["out of time"]


def test_refuses(capsys, tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            check.main([str(tmp_path)])
        assert "finds no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        check.main([str(tmp_path), "--device", "cpu", "--stages", "polish"])
    assert "expected names among environment, build" in capsys.readouterr().err
