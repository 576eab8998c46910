"""Finds the compiled module ``fused_kd._native``, and rejects one that was built from other C++ sources.

Python in a source folder imports ``fused_kd/`` from there, even if fused_kd is also installed. Then the installation's
compiled module is used, if it was built from the same sources.
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
_NOTE = "_native_missing.txt"  # setup.py writes it if it could not build the module
_NAME = "fused_kd._native"


def source_hash(csrc: Path) -> str:
    """Return the hash of all C++ files and CMakeLists.txt, which csrc/CMakeLists.txt stores as ``sources``."""
    endings = (".cpp", ".h", ".cu", ".cuh", "CMakeLists.txt")
    names = sorted(path.relative_to(csrc).as_posix() for path in csrc.rglob("*") if path.name.endswith(endings))
    lines = [f"{hashlib.sha256((csrc / name).read_bytes()).hexdigest()} {name}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def find(package: Path = PACKAGE) -> tuple[Any, Path | None, str | None]:
    """Return (module, its folder, None), or (None, None, reason) if the ``fused_kd/`` at ``package`` has none.

    For an installed package, only its own module counts. For a source folder, the module must match its csrc/.
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
            reason = reason or _mismatch(package, folder, version, how)
        if reason:
            reasons.append(reason)
    return None, None, reasons[0] if reasons else f"the C++ core of the source folder {package} is not built: {how}"


def _mismatch(package: Path, folder: Path, version: str, how: str) -> str:
    if folder == package:
        return f"the C++ core in {package} was built from other sources than {package.parent / 'csrc'}: {how}"
    return (
        f"the source folder {package} (version {__version__}) hides the fused_kd {version} installed in "
        f"{folder.parent}, and its C++ core was built from other sources: {how}, or start Python in another folder"
    )


def _installed(package: Path) -> Iterator[tuple[Path, str]]:
    """Yield the folder and version of every other installed fused_kd."""
    from importlib import metadata  # slow to import, and not needed for an installed core

    for distribution in metadata.distributions(name="fused_kd"):
        folder = Path(str(distribution.locate_file("fused_kd"))).resolve()
        if folder != package:
            yield folder, distribution.version


def _load(folder: Path) -> Any:
    """Load the compiled module in this folder; None if there is none."""
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
