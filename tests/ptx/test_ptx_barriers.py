"""Three real kernels, with each of their barriers removed in turn: the interpreter must find each removal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from ptx_kernels import CLASSES
from ptx_programs import pack_parameters

from tools.ptx import Fault, Memory, Module, Options, launch

BARRIER = re.compile(r"^\s*bar\.sync\s+0\s*;[^\n]*\n", re.MULTILINE)
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    script, root = Path(__file__).with_name("ptx_kernels.py"), Path(__file__).parents[2]
    environment["PYTHONPATH"] = str(root)
    command = [sys.executable, str(script), str(folder / "kernels.json")]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return {kernel["name"]: kernel for kernel in json.loads((folder / "kernels.json").read_text())}


def filled(kind: str, size: int, rng) -> np.ndarray:
    """The bytes of a tensor; integers are class indices."""
    if kind[0] == "i":
        return rng.integers(0, CLASSES, size * 8 // int(kind[1:]), f"i{int(kind[1:]) // 8}").view(np.uint8)
    return rng.standard_normal(size * 8 // int(kind[2:])).astype(f"f{int(kind[2:]) // 8}").view(np.uint8)


def outcome(kernel: dict, text: str, options: Options) -> tuple[list[str], list[bytes]]:
    """Run one block. Return the problems, and the memory afterwards."""
    rng, memory, module = np.random.default_rng(3), Memory(), Module(text)
    arrays, values = [], []
    for kind, value, _ in kernel["values"]:
        if isinstance(value, str):
            values.append(bytes.fromhex(value))
            continue
        arrays.append(filled(kind, value, rng))
        values.append(memory.add(arrays[-1]) if value else 0)
    data = pack_parameters(module.functions[kernel["name"]], [*values, 0, 0])
    result = launch(
        module, kernel["name"], memory, (1, 1, 1), (kernel["threads"], 1, 1), kernel["shared"], data, options
    )
    return list(result.problems), [a.tobytes() for a in arrays]


def without(text: str, number: int) -> str:
    found = list(BARRIER.finditer(text))[number]
    return text[: found.start()] + text[found.end() :]


def flagged(kernel: dict, number: int, right: list[bytes]) -> str:
    """The symptom of the removal; "" if there is none."""
    try:
        problems, after = outcome(kernel, without(kernel["ptx"], number), Options())
    except Fault as fault:
        return str(fault)
    return "; ".join(problems) or ("another result" if after != right else "")


#: Barriers whose removal is found by nothing, in the order of the text, and why. There is none: each of them stands
#: between a write and a read of the same bytes by two warps, or between that read and the next write.
UNSEEN: dict[str, dict[int, str]] = {"column_moments": {}, "reduce_parts": {}, "rows_on_chip": {}}


@pytest.mark.parametrize("name", UNSEEN)
def test_each_barrier(kernels, name):
    kernel = kernels[name]
    problems, right = outcome(kernel, kernel["ptx"], Options())
    assert not problems
    found = [flagged(kernel, number, right) for number in range(len(BARRIER.findall(kernel["ptx"])))]
    assert len(found) >= 8
    assert {number for number, text in enumerate(found) if not text} == set(UNSEEN[name])
    assert all("race" in text for text in found if text)  # which says where, as another result would not


@pytest.mark.parametrize("name", UNSEEN)
def test_order_of_warps(kernels, name):
    """In replicated layouts several warps write the same value: that is no race, in any order."""
    kernel = kernels[name]
    _, right = outcome(kernel, kernel["ptx"], Options())
    assert outcome(kernel, kernel["ptx"], Options(schedule="backward")) == ([], right)
