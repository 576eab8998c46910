"""The script for a machine with a GPU, tried out without one."""

import json
import sys
import time

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Stage


def plan_of(*given):
    return lambda device, folder, seconds, tests: list(given)


def python(name, code, seconds=30.0):
    return Stage(name, (sys.executable, "-c", code), seconds)


def test_stages_are_reported(tmp_path, capsys):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    plan = plan_of(
        python("good", "print('all is well')"),
        python("bad", "import sys; print('broken'); sys.exit(3)"),
        python("slow", child, seconds=1.0),
        Stage("absent", ("nothing",), 5.0, "there is no such tool"),
        Stage("no program", ("/nonexistent/program",), 5.0),
        python("last", "print('still run')"),
    )
    start = time.monotonic()
    assert gpu_check.main([str(tmp_path), "--device", "cpu"], plan) == 1
    assert time.monotonic() - start < 30
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    statuses = {entry["name"]: entry["status"] for entry in result["stages"]}
    assert statuses == {
        "good": "passed", "bad": "failed", "slow": "timed out", "absent": "skipped", "no program": "failed",
        "last": "passed",
    }  # fmt: skip
    assert result["stages"][1]["reason"] == "exit status 3"
    log = (tmp_path / "gpu-check.log").read_text()
    assert "all is well" in log and "broken" in log and "still run" in log
    assert "what failed: bad, slow, no program" in capsys.readouterr().out
    assert result["environment"]["torch"]


def test_the_limit_is_for_all_stages(tmp_path):
    plan = plan_of(python("first", "import time; time.sleep(2)"), python("second", "print('never')"))
    assert gpu_check.main([str(tmp_path), "--device", "cpu", "--limit", "6"], plan) == 0
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [entry["status"] for entry in result["stages"]] == ["passed", "skipped"]
    assert result["stages"][1]["reason"] == "no time was left"


def test_real_stages_on_the_cpu(tmp_path, capsys):
    """What does not need a GPU of it: the environment, and pytest with its outcome read."""
    arguments = [str(tmp_path), "--device", "cpu", "--stages", "environment,tests", "--tests", "tests/test_errors.py"]
    assert gpu_check.main(arguments) == 0, (tmp_path / "gpu-check.log").read_text()[-2000:]
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert result["tests"]["passed"] > 10
    assert result["tests"]["failed"] == 0
    assert "nothing failed" in capsys.readouterr().out
    assert not (tmp_path / "tests.xml").exists()


def test_failures_are_named(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_one"/>'
        '<testcase classname="tests.test_a" name="test_two[cuda]"><failure/></testcase>'
        '<testcase classname="tests.test_a" name="test_three"><skipped/></testcase></testsuite></testsuites>'
    )
    found = gpu_check.read_tests(path)
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["tests.test_a::test_two[cuda]"]}


def test_refuses(capsys, tmp_path):
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu_check.main([str(tmp_path)])
        assert "finds no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_check.main([str(tmp_path), "--device", "cpu", "--stages", "polish"])
    assert "expected names among environment, build" in capsys.readouterr().err
