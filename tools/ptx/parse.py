"""Parses PTX text into functions: instructions, labels and declarations."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from pathlib import PurePath

from tools.ptx.types import BITS, Unsupported, is_float

_VARIABLE = re.compile(
    r"\.(shared|global|const|local)\b(?P<words>.*?)\.(?P<type>[bsuf]\d+)\s+(?P<name>[\w$]+)\s*(?P<array>\[(?P<size>\d*)\])?"
    r"\s*(?:=\s*(?P<values>.*))?$",
    re.DOTALL,
)


@dataclass(slots=True)
class Instruction:
    """``@!%p1 add.rn.f32 %f1, %f2, %f3``: guard, negated, opcode, modifiers (rn, f32) and operands."""

    text: str
    guard: str | None
    negated: bool
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    types: list[str]  # among the modifiers
    where: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.where})" if self.where else self.text


@dataclass
class Variable:
    align: int
    size: int | None  # None: dynamic, the launch decides
    value: bytes = b""


@dataclass
class Function:
    name: str
    params: list[tuple[str, int, int]] = field(default_factory=list)  # name, offset, size
    param_bytes: int = 0
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # name: type
    families: dict[str, tuple[str, int]] = field(default_factory=dict)  # "%r": type and count
    local: dict[str, Variable] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # branch targets of brx.idx
    maxntid: int | None = None
    known: bool = False  # whether all of its instructions have compiled once

    def register_type(self, name: str) -> str | None:
        if name not in self.registers:
            family = name.rstrip("0123456789")
            kind, number = self.families.get(family, ("", 0))
            if family == name or int(name[len(family) :]) >= number:
                return None
            self.registers[name] = kind
        return self.registers[name]


class Module:
    """The entry functions of a PTX text, and the variables outside them."""

    def __init__(self, text: str) -> None:
        self.functions: dict[str, Function] = {}
        self.shared: dict[str, Variable] = {}
        self.globals: dict[str, Variable] = {}
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE))
        text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
        text = re.sub(r"//[^\n]*", "", text)
        text = re.sub(r"\.section[^{]*\{.*?\n\s*\}", "", text, flags=re.DOTALL)
        text = re.sub(r"^\s*\.file\b[^\n]*$", "", text, flags=re.MULTILINE)
        # The only statement without a semicolon that is kept: it gives instructions their source lines.
        text = re.sub(r"^\s*\.loc\s+(\d+)\s+(\d+)[^\n]*$", r".loc \1 \2;", text, flags=re.MULTILINE)
        self._parse(text)

    def _parse(self, text: str) -> None:
        header = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\b")
        outside, at = [], 0
        while found := header.search(text, at):
            outside.append(text[at : found.start()])
            brace, semicolon = text.find("{", found.end()), text.find(";", found.end())
            if brace == -1 or -1 < semicolon < brace:  # a declaration
                at = semicolon + 1
                continue
            at = _matching(text, brace) + 1
            if found[1] == "entry":
                function = self._function(text[found.end() : brace], text[brace + 1 : at - 1])
                self.functions[function.name] = function
        outside.append(text[at:])
        for statement in ";".join(outside).split(";"):
            self._declare(statement.strip(), None)

    def _declare(self, statement: str, function: Function | None) -> None:
        found = _VARIABLE.search(statement)
        if not found:
            return
        width = BITS[found["type"]] // 8
        align = re.search(r"\.align\s+(\d+)", found["words"])
        size = None if found["array"] == "[]" else width * int(found["size"] or 1)
        value = b""
        if found["values"]:
            words = filter(None, re.split(r"[{},\s]+", found["values"]))
            value = b"".join(pack(number(word), found["type"]) for word in words)
        variable = Variable(int(align[1]) if align else width, size, value.ljust(size or 0, b"\0"))
        if found[1] == "local" and function is not None:
            function.local[found["name"]] = variable
        else:
            (self.shared if found[1] == "shared" else self.globals)[found["name"]] = variable

    def _function(self, head: str, body: str) -> Function:
        name = re.search(r"([\w$]+)\s*\(", head)
        assert name, head
        function = Function(name[1])
        for param in filter(None, map(str.strip, head[head.index("(") + 1 : head.rindex(")")].split(","))):
            found = re.fullmatch(r"\.param\s+(.*?)([\w$]+)\s*(?:\[(\d+)\])?", param, re.DOTALL)
            kind = re.search(r"\.([bsuf]\d+)\b", found[1]) if found else None
            if not found or not kind:
                raise Unsupported(param)
            size = BITS[kind[1]] // 8 * int(found[3] or 1)
            align = re.match(r"\s*\.align\s+(\d+)", found[1])
            step = int(align[1]) if align else BITS[kind[1]] // 8
            offset = -(-function.param_bytes // step) * step
            function.params.append((found[2], offset, size))
            function.param_bytes = offset + size
        threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head)
        if threads:
            function.maxntid = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
        where = ""
        for statement in body.split(";"):
            where = self._statement(function, statement.strip(), where)
        return function

    def _statement(self, function: Function, statement: str, where: str) -> str:
        """Add a statement to the function; return the source line for the next one."""
        while True:
            statement = statement.lstrip("{} \t\n")  # braces of scopes; those of operands come later in a statement
            label = re.match(r"([\w$]+)\s*:(?!:)", statement)
            if not label:
                break
            function.labels[label[1]] = len(function.code)
            statement = statement[label.end() :]
        if not statement or statement.startswith(".pragma"):
            return where
        if statement.startswith(".loc "):
            _, file, line = statement.split()
            return f"{PurePath(self.files.get(file, '?')).name}:{line}"
        if statement.startswith(".branchtargets"):
            function.tables[next(reversed(function.labels))] = re.findall(r"[\w$]+", statement)[1:]
        elif statement.startswith(".reg"):
            words = statement.split(None, 2)
            for name in map(str.strip, words[2].split(",")):
                family = re.fullmatch(r"(.*?)<(\d+)>", name)
                if family:
                    function.families[family[1]] = words[1][1:], int(family[2])
                else:
                    function.registers[name] = words[1][1:]
        elif statement.startswith((".local", ".shared")):
            self._declare(statement, function)
        elif statement.startswith("."):
            raise Unsupported(f"directive {statement.split()[0]}")
        else:
            function.code.append(_instruction(statement, where))
        return where


def _matching(text: str, brace: int) -> int:
    depth = 0
    for found in re.compile(r"[{}]").finditer(text, brace):
        depth += 1 if found[0] == "{" else -1
        if not depth:
            return found.start()
    raise Unsupported("an unmatched brace")


def _instruction(statement: str, where: str) -> Instruction:
    text = " ".join(statement.split())
    found = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?(\S+)(?:\s+(.*))?", text)
    assert found, text
    # ".shared::cta" is one word.
    opcode, *modifiers = found[3].replace("::", "__").split(".")
    operands = split_operands(found[4]) if found[4] else ()
    types = [word for word in modifiers if word in BITS]
    return Instruction(text, found[2], found[1] == "!", opcode, tuple(modifiers), operands, types, where)


def split_operands(text: str) -> tuple[str, ...]:
    """Split at the commas outside braces and brackets."""
    return tuple(part.strip() for part in re.split(r",(?![^{\[(]*[}\])])", text))


def number(text: str) -> int | float:
    """Parse a literal, such as -3, 0x1F, 0f3F800000 or 1.5."""
    text = text.strip()
    if text.startswith("-"):
        return -number(text[1:])
    if text[:2] in ("0f", "0F"):
        return float(struct.unpack(">f", bytes.fromhex(text[2:]))[0])
    if text[:2] in ("0d", "0D"):
        return float(struct.unpack(">d", bytes.fromhex(text[2:]))[0])
    if re.fullmatch(r"\d*\.\d*(?:[eE][-+]?\d+)?", text):
        return float(text)
    text = text.rstrip("U")
    return int(text, 8) if re.fullmatch(r"0[0-7]+", text) else int(text, 0)


def bits_of(text: str, kind: str) -> int:
    """The bits of a literal operand of a type; a float literal has its float's bits, whatever the type."""
    if text[:2].lower() in ("0f", "0d"):
        return int(text[2:], 16)
    value = number(text)
    if isinstance(value, float):
        kind = "f" + kind[1:] if kind in ("b32", "b64", "u32", "u64") else kind
    elif is_float(kind):
        kind = f"b{BITS[kind]}"
    return int.from_bytes(pack(value, kind), "little")


def pack(value: int | float, kind: str) -> bytes:
    width = BITS[kind] // 8
    if kind in ("f16", "f32", "f64"):
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[width], value)
    if isinstance(value, float):
        raise Unsupported(f"{value} for {kind}")
    return (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
