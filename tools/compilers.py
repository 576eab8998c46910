"""Builds the C++ core with all installed compilers, at -O1 to -O3 and with contraction off and on, and runs
fused_kd/check.py on every instruction set of each build: no result may depend on the compiler.

With --sanitize it builds with GCC's address and undefined-behaviour sanitizers and also runs the core's tests.

Each build uses a temporary folder with a copy of fused_kd/, which Python imports. The core in the work tree stays.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COMPILERS = ("g++", "clang++")
LEVELS = ("-O1", "-O2", "-O3")
CONTRACTIONS = ("off", "fast")
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
#: Tests of the core's memory accesses, arithmetic and ties.
TESTS = ("backends/test_native.py", "losses/test_ties.py", "losses/test_constant_rows.py", "losses/test_uskd.py")


class Build(NamedTuple):
    compiler: str
    level: str
    contraction: str
    sanitized: bool = False

    @property
    def flags(self) -> str:
        return f"-ffp-contract={self.contraction}" + (f" {SANITIZERS}" if self.sanitized else "")


class Failure(Exception):
    """What went wrong, in one line."""


def run(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        errors = [line.strip() for line in done.stdout.splitlines() if "error" in line.lower() or "FAILED" in line]
        raise Failure(f"status {done.returncode}: {(errors or [command[0]])[0]}")
    return str(done.stdout)


def make(build: Build, folder: Path) -> Path:
    """Build the core; return a folder with a copy of fused_kd/ that has it."""
    place = folder / "package"
    shutil.copytree(
        ROOT / "fused_kd", place / "fused_kd", ignore=shutil.ignore_patterns("_native*", "__pycache__", "*.pyc")
    )
    from setup import pybind11_option

    # Instruction sets that this processor cannot run are not built. The build's flags come after the core's own.
    cannot = ["-DHAVE_AVX512=OFF"] if not _runs("avx512bw") else []
    run(
        [
            *("cmake", "-S", str(ROOT / "csrc"), "-B", str(folder / "build"), "-DCMAKE_BUILD_TYPE=Release"),
            *(("-G", "Ninja") if shutil.which("ninja") else ()),
            f"-DCMAKE_CXX_COMPILER={shutil.which(build.compiler)}",
            f"-DCMAKE_CXX_FLAGS={build.flags}",
            f"-DCMAKE_CXX_FLAGS_RELEASE={build.level} -DNDEBUG",
            f"-DPython_EXECUTABLE={sys.executable}",
            pybind11_option(),
            *cannot,
        ]
    )
    run(["cmake", "--build", str(folder / "build"), "--parallel", str(os.cpu_count() or 1)])
    for module in (folder / "build").glob("_native*"):
        shutil.copy(module, place / "fused_kd")
    return place


def _runs(feature: str) -> bool:
    try:
        return feature in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True


def environment(build: Build, place: Path) -> dict[str, str]:
    found = {**os.environ, "PYTHONPATH": str(place)}
    if build.sanitized:  # Python itself is not instrumented, so the sanitizers' runtimes must be loaded before it
        names = ("libasan.so", "libubsan.so", "libstdc++.so")
        paths = [run([build.compiler, f"-print-file-name={name}"]).strip() for name in names]
        found |= {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
    return found


def check(losses: list[str], quick: bool) -> None:
    """Check the imported build; print a line of JSON for every instruction set."""
    from fused_kd import check
    from fused_kd.backends import native
    from fused_kd.core.catalogue import LOSSES

    for name in native.instruction_sets():
        native.instruction_set = name
        missed: list[str] = []
        count = 0
        for loss in losses or LOSSES:
            for case in check.cases(quick, loss):
                outcome = check.compare("native", case)
                count += 1
                if not outcome.passed:
                    missed.append(f"{name}: {case}: {outcome}")
        runtimes = native.loaded_openmp_runtimes()
        if len({Path(path).resolve() for path in runtimes}) > 1:
            missed.append(f"{name}: more than one OpenMP runtime is loaded: {', '.join(runtimes)}")
        found = {"compiler": native.compiler(), "set": name, "cases": count, "missed": missed}
        print(json.dumps(found), flush=True)


def check_in_process(build: Build, place: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run check() in a process that imports the build; return its lines."""
    chosen = [f"--loss={loss}" for loss in options.loss or ()] + ["--quick"] * options.quick
    command = [sys.executable, str(Path(__file__).resolve()), "--only-check", *chosen]
    return [json.loads(line) for line in run(command, env=environment(build, place), cwd=place).splitlines()]


def run_tests(build: Build, place: Path) -> None:
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    # Override pyproject.toml's pythonpath, which would import the package of the work tree.
    options = ["-q", "-p", "no:cacheprovider", "-o", f"pythonpath={place} {ROOT / 'tests' / 'support'}"]
    run([sys.executable, "-m", "pytest", *options, *tests], env=environment(build, place), cwd=place)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.compilers", description=__doc__)
    parser.add_argument("--compiler", action="append", help="may be repeated; default: g++ and clang++ if installed")
    parser.add_argument("--level", action="append", help="such as --level=-O2; default: -O1, -O2 and -O3")
    parser.add_argument("--contraction", action="append", choices=CONTRACTIONS, help="default: off and fast")
    parser.add_argument(
        "--sanitize", action="store_true", help="one build by g++ with sanitizers, and the core's tests"
    )
    parser.add_argument("--loss", action="append", help="may be repeated; default: all")
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--only-check", action="store_true", help=argparse.SUPPRESS)  # for check_in_process()
    options = parser.parse_args(arguments)
    if options.only_check:
        check(options.loss or [], options.quick)
        return 0

    from rich import box
    from rich.console import Console
    from rich.table import Table

    compilers = options.compiler or (COMPILERS[:1] if options.sanitize else COMPILERS)
    builds = [
        Build(compiler, level, contraction, options.sanitize)
        for compiler in compilers
        for level in options.level or (LEVELS[2:] if options.sanitize else LEVELS)
        for contraction in options.contraction or (CONTRACTIONS[:1] if options.sanitize else CONTRACTIONS)
    ]
    console = Console()
    table = Table("compiler", "level", "contraction", "instruction set", "cases", "missed", box=box.SIMPLE_HEAD)
    failures = 0
    for build in builds:
        own = [build.compiler, build.level, build.contraction]
        if not shutil.which(build.compiler):
            table.add_row(*own, "not installed")
            failures += options.compiler is not None
            continue
        with tempfile.TemporaryDirectory(prefix="fused_kd_compilers_") as folder:
            try:
                place = make(build, Path(folder))
                for found in check_in_process(build, place, options):
                    missed = found["missed"]
                    table.add_row(found["compiler"], *own[1:], found["set"], str(found["cases"]), str(len(missed)))
                    console.print(*missed, sep="\n", end="", highlight=False, markup=False, soft_wrap=True)
                    failures += len(missed)
                if build.sanitized:
                    run_tests(build, place)
                    table.add_row(*own, "the tests pass")
            except Failure as failure:
                table.add_row(*own, str(failure), style="bold")
                failures += 1
        console.print(f"{' '.join(own)}: done", highlight=False)
    console.print(table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
