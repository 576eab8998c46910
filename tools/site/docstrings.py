"""Docstrings for mkdocstrings: as completed at import, and converted from reStructuredText to Markdown."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import reduce
from typing import Any

import griffe

import fused_kd

_ROLE = re.compile(r":(\w+):`([^`]+)`")
_MATH_BLOCK = re.compile(r"^( *)\.\. math::\n((?:\1 +\S.*\n?|\n(?=\1 +\S))+)", re.M)
_TERM = re.compile(r"^(``\w+``)\n {4}(\S.*(?:\n {4}.*)*)", re.M)


def markdown(text: str) -> str:
    """Convert the roles and directives that the package's docstrings use; the rest is the same in Markdown."""
    text = _MATH_BLOCK.sub(lambda found: f"\n{found[1]}$${_one_line(found[2])}$$\n\n", text)
    text = _ROLE.sub(_role, text)
    text = _TERM.sub(r"\1\n:   \2\n", text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.M)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _role(found: re.Match[str]) -> str:
    kind, target = found[1], _one_line(found[2])
    if kind == "math":
        return f"${target}$"
    name = target.removeprefix("fused_kd.").removeprefix("sources.")
    return f"[`{name}`][fused_kd.{name}]" if name in fused_kd.__all__ else f"`{target}`"


class Docstrings(griffe.Extension):
    """Shows the same text as `help`: ``fused_kd/losses/_docs.py`` completes docstrings at import."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if pkg.path == fused_kd.__name__:
            self._visit(pkg)
            # For this name griffe takes the module; Python takes the function that the package imports from it.
            pkg.set_member("decompose", griffe.Alias("decompose", pkg["losses.decompose.decompose"]))

    def _visit(self, found: griffe.Object) -> None:
        if isinstance(found, griffe.Function):
            found.overloads = None  # variants of one signature, for type checkers only
        if found.docstring and isinstance(found, (griffe.Function, griffe.Class)):
            names = found.path.removeprefix(f"{found.module.path}.").split(".")
            given: Any = reduce(getattr, names, importlib.import_module(found.module.path))
            found.docstring.value = markdown(inspect.getdoc(given) or found.docstring.value)
            if fields := getattr(given, "_fields", None):
                found.docstring.value += f" Its fields are {', '.join(f'`{name}`' for name in fields)}."
        for member in found.members.values():
            if isinstance(member, griffe.Object):
                self._visit(member)
