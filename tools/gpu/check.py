"""All checks on a machine with a GPU: `python -m tools.gpu.check FOLDER`, or `make gpu-check OUT=FOLDER`.

Builds in place, runs the tests of CUDA tensors and of Triton's kernels, compares with float64, runs the sanitizer on a
small run, and runs the benchmark. Writes a log, one JSON file with all results, and the plots into the folder. Needs
Python with torch and triton, nvcc and CMake, but no network. Stages with missing packages are skipped, with a message.
A stage that fails or runs out of time does not stop the next, and cannot use the time reserved for later stages.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
#: Seconds for all stages together. Compiling the tests' kernels takes most of it: six minutes were enough for 2205 of
#: 2225 tests on 16 cores with an H200.
LIMIT = 1800.0
#: Tests that give Triton's kernels CPU tensors in small tiles and odd layouts; the plugin runs them on the GPU.
TRITON_TESTS = (
    "tests/backends/triton/test_triton.py",
    "tests/backends/triton/test_triton_dist.py",
    "tests/backends/triton/test_triton_looped.py",
    "tests/backends/triton/test_triton_uskd.py",
    "tests/backends/triton/test_triton_zipf.py",
)
#: The sanitizer's exit status if it found something.
FOUND = 9
#: Like `python setup.py build_ext --inplace`, with two differences: setuptools does not read pyproject.toml, which
#: versions before 77 reject, and a core without CUDA is a failure.
BUILD = """
import sys
import setup as build
from setuptools import Distribution, Extension
extension = Extension("fused_kd._native", [], optional=True)
command = build.BuildCore(Distribution({"name": "fused_kd", "packages": ["fused_kd"], "ext_modules": [extension]}))
command.inplace = command.verbose = True
command.ensure_finalized()
command.run()
from fused_kd.backends import native
reason = native.unavailable(sys.argv[1])
sys.exit(reason and f"not built: {reason}")
"""


class Stage(NamedTuple):
    """A command with a time limit.

    ``least``: seconds that earlier stages must leave for it. ``missing``: why it cannot run, or None. ``tool``: if the
    program itself does not work here, the stage is skipped, not failed.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    least: float = 0.0
    missing: str | None = None
    environment: Mapping[str, str] = {}
    tool: bool = False


def lacking(*packages: str) -> str | None:
    """A reason that names the packages that cannot be imported, or None."""
    absent = []
    for name in packages:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            continue
        absent.append(name)
    return f"not installed: {', '.join(absent)}" if absent else None


def stages(args: argparse.Namespace, capability: int, scratch: Path) -> list[Stage]:
    python, device = sys.executable, args.device
    check = (python, "-m", "fused_kd", "check", "--quick", "--device", device)
    # Tests of CPU tensors need no GPU machine.
    marks = "not large and not slow" if device == "cpu" else "gpu and not large and not slow"
    tests = ("-m", "tools.gpu.tests", *args.tests, "--marks", marks, "--json", str(scratch / "tests.json"))
    drive = (python, "-m", "tools.gpu.drive", "--device", device)
    planned = [
        Stage("environment", (python, "-m", "fused_kd", "env"), 40, 5),
        Stage("build", (python, "-c", BUILD, device), 150, 60, lacking("setuptools")),
        Stage("tests", (python, *tests, "--seconds", "{seconds}"), 900, 60, lacking("pytest", "xdist")),
        _triton_tests(device, str(scratch / "triton-tests.json")),
        # After the tests: it is one process, and by now most of its kernels are compiled.
        Stage("check", check, 300, 15),
        Stage("small run", drive, 90, 15),
        *(_sanitizer(tool, drive, device) for tool in ("memcheck", "racecheck")),
    ]
    for loss, most, least in (("nkd", 150, 100), ("uskd", 150, 60)):
        options = ("--device", device, "--dtype", args.dtype, "--seconds", f"{args.seconds:g}")
        command = (python, "-m", "benchmarks", "--quick", "--loss", loss, *options, "--output", str(scratch / loss))
        # Its own caches, so that the time of a first call includes the compilation.
        caches = {"TRITON_CACHE_DIR": str(scratch / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
        planned.append(Stage(f"benchmark {loss}", command, most, least, lacking("numpy", "rich"), caches))
    table = (python, "-m", "tools.compile_matrix", "--arch", str(capability), "--json", str(scratch / "kernels.json"))
    return [*planned, Stage("kernels", table, 120, 0, lacking("triton", "rich"))]


def _triton_tests(device: str, found: str) -> Stage:
    missing = lacking("pytest", "xdist", "triton") or (
        "on a CPU the ordinary tests run them by Triton's interpreter" if device == "cpu" else None
    )
    command = (sys.executable, "-m", "tools.gpu.tests", *TRITON_TESTS, "--json", found, "--seconds", "{seconds}")
    return Stage("Triton's tests", command, 500, 60, missing, {"PYTEST_PLUGINS": "tools.gpu.plugin"})


def _sanitizer(tool: str, drive: tuple[str, ...], device: str) -> Stage:
    """compute-sanitizer on the small run, for our kernels alone: instrumenting PyTorch's many kernels takes long."""
    program = shutil.which("compute-sanitizer") or _beside_nvcc("compute-sanitizer")
    missing = None if program else "compute-sanitizer not found"
    if device == "cpu":
        missing = "it checks kernels on a GPU"
    names = ["fused_kd"]  # part of the CUDA kernels' mangled names
    if missing is None and lacking("triton") is None:
        from fused_kd.backends.triton.launch import kernels

        names += kernels()
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    options += ["--launch-timeout", "60", "--report-api-errors", "no", "--print-limit", "20"]
    options += [word for name in names for word in ("--kernel-name", f"kns={name}")]
    # Without PyTorch's caching every tensor is an allocation of its own, with bounds that the sanitizer knows.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(tool, (program or tool, *options, *drive), 120, 20, missing, uncached, tool=True)


def _beside_nvcc(name: str) -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(name, path=f"{home}/bin") or shutil.which(name, path=f"{home}/compute-sanitizer")


def run_stage(stage: Stage, log: Path, seconds: float) -> dict[str, Any]:
    """Run a stage in a process group of its own, so that the time limit ends its children too."""
    seconds = min(seconds, stage.seconds)
    # A stage with its own time limit ends a little earlier, to report its results.
    command = [word.format(seconds=f"{seconds - 5:.0f}") if word == "{seconds}" else word for word in stage.command]
    entry: dict[str, Any] = {"name": stage.name, "status": "skipped", "reason": stage.missing, "seconds": 0.0}
    if stage.missing or seconds < 5:
        return entry | {"reason": stage.missing or "no time was left"}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Git refuses to work for root in another user's checkout.
    trust = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    environment |= {"PYTHONUNBUFFERED": "1", **trust, **stage.environment}
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as out:
        shown = [Path(command[0]).name, *("..." if "\n" in word else word for word in command[1:])]
        out.write(f"\n===== {stage.name}: {' '.join(shown)}\n")
        out.flush()
        begin = out.tell()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return entry | {"status": "failed", "reason": f"could not be started: {error.strerror}"}
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a hanging driver keeps even a killed process alive
                process.wait(5)
            code = None
    took = time.monotonic() - start
    status, reason = "passed", None
    if code is None:
        status, reason = "timed out", f"not done after {took:.0f} s"
    elif code:
        status, reason = "failed", f"exit status {code}"
        if stage.tool:
            status, reason = _of_tool(code, log.read_bytes()[begin:].decode(errors="replace"), reason)
    return entry | {"status": status, "reason": reason, "seconds": round(took, 1)}


def _of_tool(code: int, text: str, reason: str) -> tuple[str, str]:
    """Status and reason: the sanitizer found errors, or does not work with this driver or container."""
    if code == FOUND:
        return "failed", "it found errors; see the log"
    own = [line.strip("= ") for line in text.splitlines() if line.startswith("========= Error: ")]
    return ("skipped", f"it does not work here: {own[0]}") if own else ("failed", reason)


def _ask(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def about(commit: str | None) -> dict[str, Any]:
    """Facts about the machine and the versions."""
    import torch

    here = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if here else None
    nvcc = _ask(shutil.which("nvcc") or _beside_nvcc("nvcc") or "nvcc", "--version")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": nvcc.splitlines()[-1] if nvcc else None,
        "driver": _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "gpu": properties.name if properties else None,
        "capability": list(torch.cuda.get_device_capability()) if here else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "memory_bytes": properties.total_memory if properties else None,
        "commit": _ask("git", "-c", "safe.directory=*", "rev-parse", "HEAD") or commit,
    }


def collect(scratch: Path, folder: Path) -> dict[str, Any]:
    """Read the stages' results from the scratch folder; copy the plots to ``folder``.

    The benchmark's results are at the top level, so `python -m benchmarks table` and `plot` can read the JSON file.
    """
    results = []
    for loss in ("nkd", "uskd"):
        results += [json.loads(path.read_text(encoding="utf-8")) for path in (scratch / loss).glob("*.json")]
        for path in (scratch / loss).glob("*.png"):
            shutil.copyfile(path, folder / path.name)
    found: dict[str, Any] = _together(results)
    for name in ("tests", "triton-tests", "kernels"):
        path = scratch / f"{name}.json"
        found[name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def _together(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the results of several benchmark runs; all shares are of the best copy bandwidth among them."""
    if not results:
        return {}
    best: dict[str, float] = {}
    for result in results:
        for device, speed in result["copy_bytes_per_second"].items():
            best[device] = max(speed, best.get(device, 0.0))
    for result in results:
        for case in (case for part in result["losses"] for case in part["cases"]):
            slower = result["copy_bytes_per_second"][case["device"]] / best[case["device"]]
            for entry in case["providers"]:
                for own in entry.get("times", {}).values():
                    if "share_of_copy_bandwidth" in own:
                        own["share_of_copy_bandwidth"] *= slower
    lists = {name: [item for result in results for item in result[name]] for name in ("losses", "warnings")}
    return {**results[0], **lists, "copy_bytes_per_second": best}


def summary(entries: list[dict[str, Any]], *tests: dict[str, Any] | None) -> str:
    lines = [f"{'stage':<15} {'status':<10} {'seconds':>8}  reason"]
    lines += [f"{e['name']:<15} {e['status']:<10} {e['seconds']:>8.1f}  {e['reason'] or ''}".rstrip() for e in entries]
    for each in filter(None, tests):
        from tools.gpu.tests import as_text

        lines += as_text(each)
    bad = [entry["name"] for entry in entries if entry["status"] in ("failed", "timed out")]
    lines.append(f"failed: {', '.join(bad)}" if bad else "nothing failed")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, plan: Callable[..., list[Stage]] = stages) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.check", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder for the log, the JSON file and the plots")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries this script out")
    parser.add_argument("--stages", metavar="NAME,...", help="run only these stages")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="arguments for pytest, default: tests")
    parser.add_argument("--dtype", default="bfloat16", metavar="DTYPE,...", help="of the benchmark, default: bfloat16")
    parser.add_argument("--seconds", type=float, default=1.0, help="timing per case of the benchmark")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything, default: %(default)g")
    parser.add_argument("--commit", help="the commit, if git cannot tell")
    args = parser.parse_args(argv)
    start = time.monotonic()
    facts = about(args.commit)
    if args.device == "cuda" and facts["gpu"] is None:
        parser.error("this PyTorch finds no GPU; --device cpu tries the script out")
    major, minor = facts["capability"] or (9, 0)
    args.folder.mkdir(parents=True, exist_ok=True)
    log = args.folder / "gpu-check.log"
    log.write_text(f"{json.dumps(facts)}\n", encoding="utf-8")
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        planned = plan(args, 10 * major + minor, Path(scratch))
        known = [stage.name for stage in planned]
        wanted = args.stages.split(",") if args.stages else known
        for name in wanted:
            if name not in known:
                parser.error(f"--stages: expected names among {', '.join(known)}, got {name!r}")
        planned = [stage for stage in planned if stage.name in wanted]
        for number, stage in enumerate(planned):
            print(f"{stage.name} ...", file=sys.stderr, flush=True)
            later = sum(other.least for other in planned[number + 1 :] if not other.missing)
            entry = run_stage(stage, log, args.limit - (time.monotonic() - start) - later)
            entries.append(entry)
            print(f"{stage.name}: {entry['status']}, {entry['seconds']:.0f} s", file=sys.stderr, flush=True)
        found = collect(Path(scratch), args.folder)
    result = {"environment": facts, "device": args.device, "stages": entries, **found}
    (args.folder / "gpu-check.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = summary(entries, found["tests"], found["triton-tests"])
    with log.open("a", encoding="utf-8") as out:
        out.write(f"\n{text}\n")
    print(text)
    return 1 if any(entry["status"] in ("failed", "timed out") for entry in entries) else 0


if __name__ == "__main__":
    sys.exit(main())
