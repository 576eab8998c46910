"""The CUDA sources compiled as C++ with stand-ins for CUDA's headers (tests/cuda_on_cpu), as a Python module."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
STAND_INS = ROOT / "tests" / "cuda_on_cpu"
CUDA = ROOT / "csrc" / "cuda"
#: Rows sorted in global memory go in passes of so many classes here, so that small tests take several.
SORTED_AT_ONCE = 20000


def load(folder: Path) -> Any:
    """The module, built in this folder. tools/ptx/cuda/plugin.py puts another in its place."""
    specification = importlib.util.spec_from_file_location("cuda_on_cpu", build(folder))
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def build(folder: Path) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("there is no C++ compiler")
    includes = [STAND_INS, CUDA, ROOT / "csrc", Path(torch.__file__).parent / "include", sysconfig.get_path("include")]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("Python's headers are not installed")
    sources = [ROOT / "csrc" / "python" / "bindings_cuda.cpp", STAND_INS / "module.cpp"]
    for kernels in sorted(CUDA.glob("*.cu")):
        text = kernels.read_text()
        sources.append(folder / f"{kernels.stem}.cpp")
        sources[-1].write_text(f'#line 1 "{kernels}"\n{text}')
    # Some compilers fortify by themselves, and take a jump between two stacks for an attack.
    flags = [
        "-U_FORTIFY_SOURCE",
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    defines = ["-DFKD_WITH_CUDA", f"-DFKD_SORTED_AT_ONCE={SORTED_AT_ONCE}"]

    def compiled(source: Path) -> Path:
        result = folder / f"{source.stem}.o"
        places = [argument for place in includes[:3] for argument in ("-I", str(place))]
        places += [argument for place in includes[3:] for argument in ("-isystem", str(place))]
        run([compiler, *flags, *defines, *places, "-c", str(source), "-o", str(result)])
        return result

    module = folder / "cuda_on_cpu.so"
    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compiled, sources)]
    run([compiler, "-shared", *objects, "-o", str(module)])
    return module


def run(command):
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
