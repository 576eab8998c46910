"""Compiles the CUDA sources with nvcc to PTX and host code, and links them with the stand-in runtime into a module.

python -m tools.ptx.cuda.build FOLDER [--architecture 90] [--flag=-fmad=false]
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
MODULE = "cuda_on_cpu.so"
ARCHITECTURE = 90
#: As in tests/support/cuda_core.py: makes small tests take several passes of the sort in global memory.
DEFINES = ("-DFKD_WITH_CUDA", "-DFKD_SORTED_AT_ONCE=20000")
#: The slowest sources first, because two compile at once.
SLOW_FIRST = ("uskd_long", "uskd_short", "uskd_sorted")
Step: TypeAlias = tuple[Path, Path, list[str]]  # source, object, command


class BuildError(Exception):
    """A missing tool, or a compiler's message."""


def find_nvcc() -> Path:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if not found:
        raise BuildError("expected nvcc on the PATH or under CUDA_HOME, found none: install the CUDA toolkit")
    return Path(found).resolve()


def build(folder: Path, architecture: int = ARCHITECTURE, flags: Sequence[str] = ()) -> Path:
    """Build the module and its PTX in this folder. Objects are reused while sources and compilers are the same."""
    nvcc = find_nvcc()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # other processes of the same tests wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        common = _common_state(nvcc)
        steps = [*_kernel_steps(nvcc, folder, architecture, flags), *_host_steps(nvcc, folder)]
        with ThreadPoolExecutor(2) as pool:
            changed = list(pool.map(lambda step: _compile(common, *step), steps))
        module = folder / MODULE
        if any(changed) or not module.is_file():
            # Symbols bind within the module, as with the static runtime that the package links.
            _run([_compiler(), "-shared", "-Wl,-Bsymbolic", *(str(step[1]) for step in steps), "-o", str(module)])
        (folder / "architecture").write_text(str(architecture))
    return module


def architecture_of(folder: Path) -> int:
    return int((folder / "architecture").read_text())


def _common_state(nvcc: Path) -> str:
    """A digest of all that every step depends on, except its own source."""
    digest = hashlib.sha256()
    for path in (*sorted(CSRC.rglob("*.h")), CSRC / "python" / "bindings_cuda.cpp"):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    digest.update("\0".join((version, sys.version)).encode())
    return digest.hexdigest()


def _compile(common: str, source: Path, target: Path, command: list[str]) -> bool:
    """Compile unless the object is up to date; return whether it compiled."""
    mark = target.with_suffix(".hash")
    words = [word.replace(str(target.parent), ".") for word in command]
    state = hashlib.sha256("\0".join((common, source.read_text(), *words)).encode()).hexdigest()
    if target.is_file() and mark.is_file() and mark.read_text() == state:
        return False
    mark.unlink(missing_ok=True)
    if source.suffix == ".cu":
        keep = target.with_name(f"keep_{source.stem}")
        keep.mkdir(exist_ok=True)
        _run([*command, "--keep", "--keep-dir", str(keep)])
        shutil.move(keep / f"{source.stem}.ptx", target.with_suffix(".ptx"))
        shutil.rmtree(keep)
    else:
        _run(command)
    mark.write_text(state)
    return True


def _compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise BuildError("expected a C++ compiler, g++ or CXX, found none")
    return compiler


def _kernel_steps(nvcc: Path, folder: Path, architecture: int, flags: Sequence[str]) -> Iterator[Step]:
    compute = f"compute_{architecture}"
    sources = sorted((CSRC / "cuda").glob("*.cu"), key=lambda path: (path.stem not in SLOW_FIRST, path.stem))
    options = ("-std=c++17", "-cudart", "shared", "-Xcompiler", "-fPIC", *DEFINES, *flags)
    for source in sources:
        target = folder / f"{source.stem}.o"
        where = ("-gencode", f"arch={compute},code={compute}", "-c", str(source), "-o", str(target))
        yield source, target, [str(nvcc), *options, *where]


def _host_steps(nvcc: Path, folder: Path) -> Iterator[Step]:
    import torch  # has a copy of pybind11's headers

    (folder / "cuda_build.h").write_text('#define FKD_CUDA_ARCHITECTURES "PTX"\n#define FKD_CUDA_MISSING ""\n')
    theirs = (Path(torch.__file__).parent / "include", sysconfig.get_path("include"))
    places = [*("-I", str(folder), "-I", str(CSRC)), *(word for place in theirs for word in ("-isystem", str(place)))]
    by_host = [_compiler(), "-std=c++17", "-fPIC", "-Wall", "-Wextra", *DEFINES, *places]
    by_nvcc = [str(nvcc), "-std=c++17", "-Xcompiler", "-fPIC,-Wall,-Wextra"]  # nvcc finds CUDA's headers
    for name, command in (("module", by_host), ("runtime", by_nvcc)):
        source, target = HERE / f"{name}.cpp", folder / f"host_{name}.o"
        yield source, target, [*command, "-c", str(source), "-o", str(target)]


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise BuildError(f"{' '.join(command)}\n{(finished.stdout + finished.stderr)[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the CUDA library for the PTX interpreter.")
    parser.add_argument("folder", type=Path, help="folder for the module and its PTX")
    parser.add_argument("--architecture", type=int, default=ARCHITECTURE, metavar="90", help="90 for compute_90")
    parser.add_argument("--flag", action="append", default=[], help="a flag for nvcc, such as --flag=-fmad=false")
    options = parser.parse_args()
    try:
        print(build(options.folder, options.architecture, options.flag))
    except BuildError as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
