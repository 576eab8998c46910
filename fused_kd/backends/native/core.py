"""Finds the compiled module ``fused_kd._native``, and refuses one that was built from other C++ sources than these.

Python in a source folder imports ``fused_kd/`` from there, also where fused_kd is installed besides. Such an
installation then lends its compiled module, if it was built from the same sources.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from fused_kd._version import __version__

PACKAGE = Path(__file__).resolve().parents[2]
_NOTE = "_native_missing.txt"  # setup.py leaves it where it could not build the module
_NAME = "fused_kd._native"


def source_hash(csrc: Path) -> str:
    """What csrc/CMakeLists.txt gives the module as ``sources``: of every C++ file, and of itself."""
    endings = (".cpp", ".h", ".cu", ".cuh", "CMakeLists.txt")
    names = sorted(path.relative_to(csrc).as_posix() for path in csrc.rglob("*") if path.name.endswith(endings))
    lines = [f"{hashlib.sha256((csrc / name).read_bytes()).hexdigest()} {name}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def find(package: Path = PACKAGE) -> tuple[Any, Path | None, str | None]:
    """(the module, the folder it is in, None), or (None, None, why there is none for the ``fused_kd/`` at ``package``).

    Beside an installed package it is there or nowhere. Beside one in a source folder it must be of the csrc/ there.
    """
    csrc = package.parent / "csrc"
    if not (csrc / "python" / "bindings.cpp").is_file():
        try:
            return importlib.import_module(_NAME), package, None
        except ImportError as error:
            return None, None, _note(package) or f"the C++ core is not in this installation ({error})"
    how = f"run `python -m pip install --editable .` in {package.parent}"
    wanted, reasons = source_hash(csrc), []
    for folder, version in ((package, __version__), *_installed(package)):
        reason = _note(folder)
        try:
            core = _load(folder)
        except ImportError as error:
            reasons.append(reason or f"the C++ core in {folder} cannot be loaded ({error}): {how}")
            continue
        if core is not None:
            if version == __version__ and getattr(core, "sources", None) == wanted:
                return core, folder, None
            reason = reason or _of_other_sources(package, folder, version, how)
        if reason:
            reasons.append(reason)
    return None, None, reasons[0] if reasons else f"the C++ core of the source folder {package} is not built: {how}"


def _of_other_sources(package: Path, folder: Path, version: str, how: str) -> str:
    if folder == package:
        return f"the C++ core in {package} was built from other sources than {package.parent / 'csrc'}: {how}"
    return (
        f"the source folder {package} (version {__version__}) hides the fused_kd {version} installed in "
        f"{folder.parent}, whose C++ core is not of these sources: {how}, or start Python in another folder"
    )


def _installed(package: Path) -> Iterator[tuple[Path, str]]:
    """The folder and version of every other fused_kd that is installed."""
    from importlib import metadata  # takes longer to import than an installed core takes to be found

    for distribution in metadata.distributions(name="fused_kd"):
        folder = Path(str(distribution.locate_file("fused_kd"))).resolve()
        if folder != package:
            yield folder, distribution.version


def _load(folder: Path) -> Any:
    """The compiled module in this folder, None where there is none."""
    paths = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_native{suffix}").is_file()]
    if not paths:
        return None
    specification = importlib.util.spec_from_file_location(_NAME, paths[0])
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _note(folder: Path) -> str | None:
    path = folder / _NOTE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None
