"""Runs the test suite by pytest-xdist and records the outcome of every test, for tools/gpu/check.py.

Every outcome is written at once, so that a run out of time keeps its results. A process with a broken CUDA context
would fail all its other tests, so it exits, and xdist starts another. Each process gets runs of neighbouring tests:
they mostly call the same kernels, which one process then compiles.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OPTIONS = (
    "-o", "addopts=-ra --strict-markers", "-p", "no:cacheprovider", "-p", "tools.gpu.tests", "-q",
    "--dist", "worksteal", "--continue-on-collection-errors",
)  # fmt: skip
#: The environment variable that tells pytest's process where to write the outcomes.
OUTCOMES = "FUSED_KD_OUTCOMES"
#: PyTorch's and Triton's CUDA errors; after most of them every later CUDA call of the process fails.
CUDA_ERROR = re.compile(r"CUDA error|Triton Error \[CUDA\]")


# pytest calls these hooks in the controlling process and in the workers, which load this module by -p.
def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write({"test": report.nodeid, "outcome": "failed", "reason": _reason(report)})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(ids: Sequence[str]) -> None:
    _write({"collected": len(ids)})


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"test": nodeid, "outcome": "begun"})


@pytest.hookimpl(trylast=True)  # after xdist has sent the report
def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        _write({"test": report.nodeid, "outcome": report.outcome, "reason": _reason(report)})
    if "PYTEST_XDIST_WORKER" in os.environ and report.failed and CUDA_ERROR.search(str(report.longrepr)):
        os._exit(1)


def _reason(report: Any) -> str | None:
    text = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr or "").strip()
    lines = text.splitlines()
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return errors[0] if errors else lines[-1] if lines else None


def _write(entry: dict[str, Any]) -> None:
    path = os.environ.get(OUTCOMES)
    if path and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")


def run(tests: Sequence[str], jobs: int, seconds: float, marks: str) -> dict[str, Any]:
    """Run tests in ``jobs`` processes; return :func:`summarise`'s result."""
    command = [sys.executable, "-m", "pytest", *OPTIONS, "--numprocesses", str(jobs), "-m", marks, *tests]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "outcomes"
        # Variables of an outer xdist run would make this process look like its worker.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        environment |= {OUTCOMES: str(path), "OMP_NUM_THREADS": threads}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            problem = _problem(process.wait(seconds))
        except subprocess.TimeoutExpired:
            problem = "out of time"
            os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a hanging driver keeps even a killed process alive
                process.wait(0.5)
        written = path.read_text(encoding="utf-8") if path.exists() else ""
    return summarise([json.loads(line) for line in written.splitlines()], problem)


def _problem(status: int) -> str | None:
    if status in (0, 1, 5):  # all passed, some failed, none collected
        return None
    return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"


def summarise(entries: Sequence[dict[str, Any]], problem: str | None) -> dict[str, Any]:
    """Counts, failed tests with reasons, and if the run did not finish, ``problem`` and the tests left."""
    outcomes: dict[str, dict[str, Any]] = {}
    for entry in (entry for entry in entries if "test" in entry):
        known = outcomes.get(entry["test"])
        # A test that passed can still fail in its teardown.
        if known is None or known["outcome"] in ("begun", "passed"):
            outcomes[entry["test"]] = entry
    kinds = [entry["outcome"] for entry in outcomes.values()]
    skipped = [str(entry["reason"]) for entry in outcomes.values() if entry["outcome"] == "skipped"]
    begun = {entry["test"] for entry in entries if entry.get("outcome") == "begun"}
    waiting = max((entry.get("collected", 0) for entry in entries), default=0) - len(begun)
    unfinished = [f"{test}: not ended" for test, entry in outcomes.items() if entry["outcome"] == "begun"]
    unfinished += [f"{waiting} tests: not begun"] if waiting > 0 else []
    return {
        **{outcome: kinds.count(outcome) for outcome in ("passed", "failed", "skipped")},
        "failures": [f"{e['test']}: {e['reason']}" for e in outcomes.values() if e["outcome"] == "failed"],
        "unfinished": [*([problem] if problem else []), *unfinished],
        "why skipped": dict(Counter(skipped)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.tests", description=__doc__.split("\n\n")[0])
    parser.add_argument("tests", nargs="*", default=["tests"], help="folders or files, default: tests")
    parser.add_argument("--jobs", type=int, default=max(1, min(16, os.cpu_count() or 1)), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=240.0, help="for all tests, default: %(default)g")
    parser.add_argument("--marks", default="not large and not slow", help="pytest's -m, default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome to this file")
    args = parser.parse_args(argv)
    found = run(args.tests, args.jobs, args.seconds, args.marks)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(as_text(found)))
    return 1 if found["failures"] or found["unfinished"] or not found["passed"] else 0


def as_text(found: dict[str, Any]) -> list[str]:
    """The outcome as lines of text."""
    lines = [f"tests: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"]
    lines += [f"  {line}" for line in (*found["failures"], *found["unfinished"])]
    return lines


if __name__ == "__main__":
    sys.exit(main())
