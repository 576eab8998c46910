"""The test suite in several processes side by side, and what became of every test: for tools/gpu/check.py.

One process would spend its minutes on compiling one kernel after the other. Every outcome is written as soon as it is
known, so that a process that runs out of time, or that an illegal access takes down, leaves what it has found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OPTIONS = ("-o", "addopts=-ra --strict-markers", "-p", "no:cacheprovider", "-p", "tools.gpu.tests", "-q")
#: Tests of one process, of one file: few enough to be shared out evenly, of which most compile a kernel.
TOGETHER = 50
# What a process learns from its environment.
OUTCOMES, PART, FOUND = "FUSED_KD_OUTCOMES", "FUSED_KD_PART", "FUSED_KD_FOUND"


# pytest calls these in the processes that name this module with -p.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leaves the tests of this part: neighbours, which mostly call the same kernels, so that one process compiles
    them and the others do not wait for the same."""
    number, count = map(int, os.environ.get(PART, "0/1").split("/"))
    items[:] = items[len(items) * number // count : len(items) * (number + 1) // count]


def pytest_collection_finish(session: Any) -> None:
    """How many tests each file has."""
    if FOUND in os.environ:
        files = Counter(os.path.relpath(item.path, ROOT) for item in session.items)
        Path(os.environ[FOUND]).write_text(json.dumps(files), encoding="utf-8")


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write({"test": report.nodeid, "outcome": "failed", "reason": _reason(report)})


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"test": nodeid, "outcome": "begun"})


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        _write({"test": report.nodeid, "outcome": report.outcome, "reason": _reason(report)})


def _reason(report: Any) -> str | None:
    text = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr or "").strip()
    lines = text.splitlines()
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return errors[0] if errors else lines[-1] if lines else None


def _write(entry: dict[str, Any]) -> None:
    path = os.environ.get(OUTCOMES)
    if path:
        with open(path, "a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")


def units_of(files: Mapping[str, int]) -> list[tuple[str, str]]:
    """(file, part) of each process, those of files with the most tests first."""
    parts = {file: -(-count // TOGETHER) for file, count in files.items()}
    return [(file, f"{k}/{parts[file]}") for file in sorted(files, key=lambda f: -files[f]) for k in range(parts[file])]


def run(tests: Sequence[str], jobs: int, seconds: float, marks: str) -> dict[str, Any]:
    """Run them and print what each process prints; returns what :func:`summarise` does."""
    deadline = time.monotonic() + seconds
    command = [sys.executable, "-m", "pytest", *OPTIONS, "-m", marks]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    done: list[tuple[str, Path, str | None]] = []
    running: dict[subprocess.Popen[bytes], tuple[str, Path]] = {}

    def wait(room: int) -> None:
        """Until fewer than so many processes are running, or the time is over."""
        while len(running) >= room:
            late = time.monotonic() >= deadline
            for process, (name, path) in list(running.items()):
                status = process.poll()
                if status is None and late:
                    os.killpg(process.pid, signal.SIGKILL)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.5)
                elif status is None:
                    continue
                del running[process]
                done.append((name, path, "out of time" if status is None else _problem(status)))
                print(f"\n--- {name}\n{Path(f'{path}.log').read_text(errors='replace')}", flush=True)
            time.sleep(0.05)

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "found"
        # A file that cannot be imported fails here.
        running[_start([*command, "--collect-only", *tests], path, {FOUND: str(path)})] = "looking for tests", path
        wait(1)
        files = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for number, (file, part) in enumerate(units_of(files)):
            path = Path(scratch) / str(number)
            if time.monotonic() >= deadline:
                done.append((f"{file} {part}", path, "not begun, no time was left"))
                continue
            running[_start([*command, file], path, {PART: part, "OMP_NUM_THREADS": threads})] = f"{file} {part}", path
            wait(jobs)
        wait(1)
        return summarise(done)


def _start(command: list[str], path: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, OUTCOMES: f"{path}.jsonl", **environment}
    with open(f"{path}.log", "wb") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _problem(status: int) -> str | None:
    if status in (0, 1, 5):  # all passed, some failed, none collected
        return None
    return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"


def summarise(done: Sequence[tuple[str, Path, str | None]]) -> dict[str, Any]:
    """Counts, the tests that failed and why, and the processes that did not come to an end. ``done``
    has of each its name, where its outcomes lie, and what was wrong with it as a whole."""
    outcomes: dict[str, dict[str, Any]] = {}
    unfinished = []
    for name, path, problem in done:
        lines = Path(f"{path}.jsonl")
        written = lines.read_text(encoding="utf-8") if lines.exists() else ""
        entries = [json.loads(line) for line in written.splitlines()]
        for entry in entries:
            known = outcomes.get(entry["test"])
            # A test that passed can still fail when what it used is torn down.
            if known is None or known["outcome"] in ("begun", "passed"):
                outcomes[entry["test"]] = entry
        if problem:
            cut = entries[-1]["test"] if entries and entries[-1]["outcome"] == "begun" else None
            unfinished.append(f"{name}: {problem}" + (f", in {cut}" if cut else ""))
    kinds = [entry["outcome"] for entry in outcomes.values()]
    skipped = [str(entry["reason"]) for entry in outcomes.values() if entry["outcome"] == "skipped"]
    return {
        **{outcome: kinds.count(outcome) for outcome in ("passed", "failed", "skipped")},
        "failures": [f"{e['test']}: {e['reason']}" for e in outcomes.values() if e["outcome"] == "failed"],
        "unfinished": unfinished,
        "why skipped": dict(Counter(skipped)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.tests", description=__doc__.split("\n\n")[0])
    parser.add_argument("tests", nargs="*", default=["tests"], help="folders or files, default: tests")
    parser.add_argument("--jobs", type=int, default=max(1, min(16, os.cpu_count() or 1)), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=240.0, help="for all of them, default: %(default)g")
    parser.add_argument("--marks", default="not large and not slow", help="pytest's -m, default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome there")
    args = parser.parse_args(argv)
    found = run(args.tests, args.jobs, args.seconds, args.marks)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(as_text(found)))
    return 1 if found["failures"] or found["unfinished"] or not found["passed"] else 0


def as_text(found: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [f"tests: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"]
    lines += [f"  {line}" for line in (*found["failures"], *found["unfinished"])]
    return lines


if __name__ == "__main__":
    sys.exit(main())
