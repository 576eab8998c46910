"""One command for a machine with a GPU: `python -m benchmarks.gpu_check FOLDER`, or `make gpu-check`.

Builds in place, compares with float64, runs the whole test suite on the GPU, the sanitizer where there is one, and the
benchmark, and writes into the folder a log, a JSON file and the plots. It needs Python with torch, triton and pytest,
nvcc and CMake, and no network. A stage that fails or runs out of time does not stop the next.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
#: Seconds that all stages may take together.
LIMIT = 540.0
PYTEST = ("-o", "addopts=-ra --strict-markers", "-p", "no:cacheprovider", "-q", "-m", "not large and not slow")


class Stage(NamedTuple):
    """A command and the most seconds that it may take; ``missing`` says why it cannot run, if so."""

    name: str
    command: tuple[str, ...]
    seconds: float
    missing: str | None = None


def stages(device: str, folder: Path, seconds: float, tests: Sequence[str]) -> list[Stage]:
    python = sys.executable
    sanitizer = shutil.which("compute-sanitizer") or _beside_nvcc("compute-sanitizer")
    small = (python, "-m", "fused_kd", "check", "--quick", "--device", device)
    unit = (python, "-m", "pytest", *PYTEST, f"--junit-xml={folder / 'tests.xml'}", *tests)
    absent = None if sanitizer else "there is no compute-sanitizer"
    bench = (python, "-m", "benchmarks", "--device", device, "--quick", "--seconds", f"{seconds:g}")
    return [
        Stage("environment", (python, "-m", "fused_kd", "env"), 60),
        Stage("build", (python, "setup.py", "build_ext", "--inplace"), 180),
        Stage("check", small, 90),
        Stage("tests", unit, 240),
        Stage("memcheck", (sanitizer or "", "--tool", "memcheck", "--error-exitcode", "9", *small), 60, absent),
        Stage("racecheck", (sanitizer or "", "--tool", "racecheck", "--error-exitcode", "9", *small), 60, absent),
        Stage("benchmark", (*bench, "--output", str(folder)), 200),
    ]


def _beside_nvcc(name: str) -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(name, path=f"{home}/bin")


def run_stage(stage: Stage, log: Path, seconds: float) -> dict[str, Any]:
    """Run a stage in a process group of its own, so that its time limit ends its children as well."""
    entry: dict[str, Any] = {"name": stage.name, "command": [Path(stage.command[0]).name, *stage.command[1:]]}
    if stage.missing:
        return entry | {"status": "skipped", "reason": stage.missing, "seconds": 0.0}
    if seconds < 5:
        return entry | {"status": "skipped", "reason": "no time was left", "seconds": 0.0}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONUNBUFFERED"] = "1"
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as out:
        out.write(f"\n===== {stage.name}: {' '.join(entry['command'])}\n")
        out.flush()
        try:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return entry | {"status": "failed", "reason": f"could not be started: {error.strerror}", "seconds": 0.0}
        try:
            code = process.wait(min(seconds, stage.seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            took = time.monotonic() - start
            return entry | {"status": "timed out", "reason": f"not done after {took:.0f} s", "seconds": round(took, 1)}
    took = round(time.monotonic() - start, 1)
    if code:
        return entry | {"status": "failed", "reason": f"exit status {code}", "seconds": took}
    return entry | {"status": "passed", "reason": None, "seconds": took}


def read_tests(path: Path) -> dict[str, Any]:
    """Counts, and the names of the tests that failed, from pytest's JUnit file."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname', '')}::{case.get('name', '')}")
    return {**counts, "failures": failed}


def _ask(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def about() -> dict[str, Any]:
    """The machine and the versions."""
    import torch

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    facts["driver"] = _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    facts["commit"] = _ask("git", "rev-parse", "HEAD")
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return facts


def summary(entries: list[dict[str, Any]], tests: dict[str, Any] | None) -> str:
    lines = [f"{'stage':<12} {'status':<10} {'seconds':>8}  reason"]
    lines += [f"{e['name']:<12} {e['status']:<10} {e['seconds']:>8.1f}  {e['reason'] or ''}".rstrip() for e in entries]
    if tests:
        lines.append(f"tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped")
        lines += [f"  {name}" for name in tests["failures"]]
    bad = [entry["name"] for entry in entries if entry["status"] in ("failed", "timed out")]
    lines.append(f"what failed: {', '.join(bad)}" if bad else "nothing failed")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, plan: Callable[..., list[Stage]] = stages) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="for the log, the JSON file and the plots")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries this script out")
    parser.add_argument("--stages", metavar="NAME,...", help="only these")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="what pytest runs, default: tests")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per case of the benchmark")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything, default: %(default)g")
    args = parser.parse_args(argv)
    facts = about()
    if args.device == "cuda" and facts["gpu"] is None:
        parser.error("this PyTorch finds no GPU; --device cpu tries the script out")
    start = time.monotonic()
    args.folder.mkdir(parents=True, exist_ok=True)
    log = args.folder / "gpu-check.log"
    log.write_text(f"{json.dumps(facts)}\n", encoding="utf-8")
    entries: list[dict[str, Any]] = []
    tests = None
    with tempfile.TemporaryDirectory() as scratch:
        planned = plan(args.device, args.folder.resolve(), args.seconds, args.tests)
        known = [stage.name for stage in planned]
        wanted = args.stages.split(",") if args.stages else known
        for name in wanted:
            if name not in known:
                parser.error(f"--stages: expected names among {', '.join(known)}, got {name!r}")
        for stage in planned:
            if stage.name not in wanted:
                continue
            print(f"{stage.name} ...", file=sys.stderr, flush=True)
            entry = run_stage(stage, log, args.limit - (time.monotonic() - start))
            entries.append(entry)
            print(f"{stage.name}: {entry['status']}, {entry['seconds']:.0f} s", file=sys.stderr, flush=True)
        report = args.folder / "tests.xml"
        if report.exists():
            tests = read_tests(report)
            shutil.move(str(report), scratch)
    result = {"environment": facts, "device": args.device, "stages": entries, "tests": tests}
    (args.folder / "gpu-check.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = summary(entries, tests)
    with log.open("a", encoding="utf-8") as out:
        out.write(f"\n{text}\n")
    print(text)
    return 1 if any(entry["status"] in ("failed", "timed out") for entry in entries) else 0


if __name__ == "__main__":
    sys.exit(main())
