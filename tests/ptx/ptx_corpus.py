"""The instructions in PTX files, one per line: python tests/ptx/ptx_corpus.py FOLDER... >
tests/ptx/instructions.txt."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

LIST = Path(__file__).parent / "instructions.txt"
HEADER = """\
# Which instructions the kernels have: Triton's for sm_80, sm_90 and sm_100 and nvcc's for sm_90, CUB's among them.
# "-> {}" marks a vector that is unpacked by mov, "<- {}" one that is packed, "|" two destinations, "?" a guard.
# To make it again, from PTX that has been kept (TRITON_CACHE_DIR of a run of the kernels, nvcc --keep):
#   python tests/ptx/ptx_corpus.py FOLDER... > tests/ptx/instructions.txt
"""
NAME = re.compile(r"[a-z]\w*(?:(?:\.|::)\w+)*$")


def statements(text: str) -> Iterator[str]:
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*\.section[^{]*\{.*?\}", "", text, flags=re.MULTILINE | re.DOTALL)
    for statement in text.split(";"):
        yield re.sub(r"^([{}]|[\w$]+ ?:(?!:)|\s)+", "", " ".join(statement.split()))  # scopes and labels before it


def forms(text: str) -> Iterator[str]:
    for statement in statements(text):
        found = re.match(r"(@!?%?\w+ )?(\S+)(.*)$", statement)
        if not found or not NAME.match(found[2]):
            continue
        name, rest = found[2], found[3].strip()
        base = name.split(".")[0]
        marks = ""
        if base == "mov" and "{" in rest:
            marks = " -> {}" if rest.startswith("{") else " <- {}"
        elif "|" in rest:
            marks = " |"
        if found[1] and base not in ("bra", "ret", "exit", "ld", "st", "mov", "trap"):
            marks += " ?"
        yield name + marks


def entries() -> list[str]:
    return [line for line in LIST.read_text().splitlines() if line and not line.startswith("#")]


if __name__ == "__main__":
    found: set[str] = set()
    for folder in sys.argv[1:]:
        for path in Path(folder).rglob("*.ptx"):
            found |= set(forms(path.read_text()))
    print(HEADER + "\n".join(sorted(found)))
