"""Builds the C++ core with CMake and ninja; pyproject.toml holds everything else.

The core includes no PyTorch headers, so the build environment needs no PyTorch and one build serves every release.
Without a working compiler the package installs all the same: `python -m fused_kd env` then says what is missing.

The CUDA kernels are built too where there is an nvcc and either TORCH_CUDA_ARCH_LIST names architectures or a GPU is
visible. Where not, or where nvcc fails, the core is built without them and keeps the reason.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MISSING_NOTE = "_native_missing.txt"  # read by fused_kd/backends/native/__init__.py
OLDEST = 80  # cuda/arrangements.h counts on the shared memory of compute capability 8.0
HOW = (
    "reinstall fused_kd with the CUDA toolkit's nvcc on the PATH and, where no GPU is visible, "
    "TORCH_CUDA_ARCH_LIST, such as '8.0;9.0+PTX'"
)


class NoCuda(Exception):
    """Why the CUDA kernels are not built."""


def parse_architectures(text: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, such as "8.0 8.6;9.0+PTX", as CMake's CUDA_ARCHITECTURES; those before 8.0 are left out."""
    found: list[str] = []
    for name in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise NoCuda(f"TORCH_CUDA_ARCH_LIST: expected architectures such as '8.0;9.0+PTX', got {name!r}")
        major, minor, variant, ptx = match.groups()
        number = int(major + minor)
        if number >= OLDEST:
            entries = [f"{number}{variant}-real", *([f"{number}{variant}-virtual"] if ptx else [])]
            found += [entry for entry in entries if entry not in found]
    if not found:
        raise NoCuda(f"TORCH_CUDA_ARCH_LIST is {text!r}, and the kernels need compute capability 8.0")
    return found


def visible_architectures() -> list[str]:
    """Of the GPUs that the driver sees, as CMake has them."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, value = ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = set()
    for device in range(count.value):
        numbers = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        found.add(10 * numbers[0] + numbers[1])
    return [f"{number}-real" for number in sorted(found) if number >= OLDEST]


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if not nvcc:
        raise NoCuda("no nvcc was found")
    return nvcc


def cuda_options() -> list[str]:
    """What CMake is told to build the CUDA kernels; raises :class:`NoCuda` with the reason why it should not."""
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    architectures = parse_architectures(names) if names else visible_architectures()
    if not architectures:
        raise NoCuda("no GPU of compute capability 8.0 or later was visible and TORCH_CUDA_ARCH_LIST was not set")
    nvcc = find_nvcc()
    try:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoCuda(f"{nvcc} does not run ({error})") from error
    known = set(re.findall(r"compute_(\d+)", listed))
    for entry in architectures:
        if re.sub(r"\D.*", "", entry) not in known:
            raise NoCuda(f"{nvcc} does not know the architecture {entry}")
    return [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DFKD_CUDA_ARCHITECTURES={';'.join(architectures)}"]


def pybind11_option() -> str:
    """Where CMake finds pybind11, of which a build without isolation may have no more than the headers in PyTorch."""
    try:
        import pybind11
    except ImportError:
        torch = importlib.util.find_spec("torch")
        for folder in (torch.submodule_search_locations if torch else None) or ():
            include = Path(folder) / "include"
            if (include / "pybind11").is_dir():
                return f"-DFKD_PYBIND11_INCLUDE={include}"
        raise
    return f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"


def _need(what: str) -> NoReturn:
    raise SystemExit(
        f"fused_kd: building takes {what}; without --no-build-isolation pip brings it along, with it first run: "
        "python -m pip install 'setuptools>=77' 'cmake>=3.18' 'ninja>=1.10' 'pybind11>=2.13'"
    )


def check_setuptools(version: str) -> None:
    """One before 77 does not know pyproject.toml's licence, one before 61 none of it, and installs "UNKNOWN"."""
    if int(version.partition(".")[0]) < 77:
        _need(f"setuptools 77 or newer, and here is {version}")


def check_tools() -> None:
    """What a build without isolation may lack is an error; a compiler, which pip cannot bring, is not."""
    if shutil.which("cmake") is None:
        _need("cmake, which is not here")
    try:
        pybind11_option()
    except ImportError:
        _need("pybind11, which is not here")


class BuildCore(build_ext):  # type: ignore[misc]
    def run(self) -> None:
        if not (ROOT / "csrc" / "CMakeLists.txt").is_file():
            raise SystemExit(f"fused_kd: the sources of the C++ core are missing: expected {ROOT / 'csrc'}")
        check_tools()
        self.failure: str | None = None
        super().run()
        package = (ROOT if self.inplace else Path(self.build_lib)) / "fused_kd"
        note = package / MISSING_NOTE
        note.unlink(missing_ok=True)
        if self.failure is not None:
            print(f"fused_kd: installing without the C++ core: {self.failure}", file=sys.stderr)
            package.mkdir(parents=True, exist_ok=True)
            note.write_text(self.failure + "\n", encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            try:
                self._cmake(output, cuda_options())
            except NoCuda as reason:
                self._cmake(output, [_without_cuda(str(reason))])
            except subprocess.CalledProcessError as error:
                if not any("CUDA" in option for option in error.cmd):
                    raise
                # Whoever is at fault, nvcc or the core itself, a build without nvcc will tell.
                self._cmake(output, [_without_cuda(f"nvcc failed: {_first_error(error)}")])
        except FileNotFoundError as error:
            self.failure = f"the C++ core was not built: {error.filename} was not found when fused_kd was installed"
        except subprocess.CalledProcessError as error:
            self.failure = _reason(error)

    def _cmake(self, output: Path, options: Sequence[str]) -> None:
        # A fresh folder: a kept one remembers the ninja and pybind11 of an isolated build environment that is gone.
        with tempfile.TemporaryDirectory(prefix="fused_kd_build_") as folder:
            self._configure_and_build(Path(folder), output, options)

    def _configure_and_build(self, folder: Path, output: Path, options: Sequence[str]) -> None:
        configure = [
            "cmake",
            *("-S", str(ROOT / "csrc"), "-B", str(folder)),
            *(("-G", "Ninja") if shutil.which("ninja") else ()),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            pybind11_option(),
            *options,
        ]
        for command in (configure, ["cmake", "--build", str(folder), "--parallel"]):
            finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if self.verbose or finished.returncode:
                print(finished.stdout)
            if finished.returncode:
                raise subprocess.CalledProcessError(finished.returncode, configure, output=finished.stdout)
        built = next(folder.glob("_native*"))
        # Renamed into place, since a process may be running the one that it replaces.
        beside = output.with_name(output.name + f".{os.getpid()}")
        shutil.copyfile(built, beside)
        os.replace(beside, output)


def _without_cuda(reason: str) -> str:
    return f"-DFKD_CUDA_MISSING=the C++ core was built without CUDA: {reason}; {HOW}"


def _first_error(error: subprocess.CalledProcessError) -> str:
    lines = [line.strip() for line in error.output.splitlines() if "error" in line.lower()]
    lines.sort(key=lambda line: "error:" not in line.lower())  # a compiler's before CMake's, which only names a file
    return lines[0] if lines else f"{error.cmd[0]} ended with status {error.returncode}"


def _reason(error: subprocess.CalledProcessError) -> str:
    if "No CMAKE_CXX_COMPILER could be found" in error.output or "is not able to compile" in error.output:
        cause = "no working C++ compiler was found"
    else:
        cause = _first_error(error)
    return (
        f"the C++ core was not built when fused_kd was installed ({cause}); install a C++17 compiler such as g++ or "
        "clang++ and reinstall fused_kd"
    )


if __name__ == "__main__":
    check_setuptools(setuptools.__version__)
    # optional: setuptools then accepts that the file may not be there after the build.
    setup(ext_modules=[Extension("fused_kd._native", sources=[], optional=True)], cmdclass={"build_ext": BuildCore})
