"""Builds the C++ core with CMake and ninja; pyproject.toml holds everything else.

The core includes no PyTorch headers, so the build environment needs no PyTorch and one build serves every release.
Without a working compiler the package installs all the same: `python -m fused_kd env` then says what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MISSING_NOTE = "_native_missing.txt"  # read by fused_kd/backends/native.py


class BuildCore(build_ext):
    def run(self) -> None:
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
        # A fresh folder: a kept one remembers the ninja and pybind11 of an isolated build environment that is gone.
        with tempfile.TemporaryDirectory(prefix="fused_kd_build_") as folder:
            try:
                self._cmake(Path(folder), output)
            except FileNotFoundError as error:
                self.failure = f"the C++ core was not built: {error.filename} was not found when fused_kd was installed"
            except subprocess.CalledProcessError as error:
                self.failure = _reason(error)

    def _cmake(self, folder: Path, output: Path) -> None:
        import pybind11

        configure = [
            "cmake",
            *("-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        for command in (configure, ["cmake", "--build", str(folder)]):
            finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if self.verbose or finished.returncode:
                print(finished.stdout)
            if finished.returncode:
                raise subprocess.CalledProcessError(finished.returncode, command, output=finished.stdout)
        built = next(folder.glob("_native*"))
        # Renamed into place, since a process may be running the one that it replaces.
        beside = output.with_name(output.name + f".{os.getpid()}")
        shutil.copyfile(built, beside)
        os.replace(beside, output)


def _reason(error: subprocess.CalledProcessError) -> str:
    if "No CMAKE_CXX_COMPILER could be found" in error.output or "is not able to compile" in error.output:
        cause = "no working C++ compiler was found"
    else:
        lines = [line.strip() for line in error.output.splitlines() if "error" in line.lower()]
        cause = lines[0] if lines else f"{error.cmd[0]} ended with status {error.returncode}"
    return (
        f"the C++ core was not built when fused_kd was installed ({cause}); install a C++17 compiler such as g++ or "
        "clang++ and reinstall fused_kd"
    )


# optional: setuptools then accepts that the file may not be there after the build.
setup(ext_modules=[Extension("fused_kd._native", sources=[], optional=True)], cmdclass={"build_ext": BuildCore})
