"""Where things are: a loss has one address, and imports run one way."""

import ast
from pathlib import Path

import pytest

from fused_kd.core.catalogue import LOSSES

PACKAGE = Path(__file__).resolve().parents[2] / "fused_kd"
#: From the top: each imports of those after it alone, and of its own kind.
LAYERS = ("losses", "autograd", "ops", "backends", "core", "reference")
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0].split(".")[0] in LAYERS)


def layer(name):
    """Of a module's dotted name without fused_kd; None where it is of none."""
    first = name.partition(".")[0]
    return LAYERS.index(first) if first in LAYERS else None


def imported(path):
    """The modules of fused_kd that a file names in imports, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.removeprefix("fused_kd.") for name in node.names if name.name.startswith("fused_kd."))
        elif isinstance(node, ast.ImportFrom) and node.module == "fused_kd":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fused_kd."):
            yield node.module.removeprefix("fused_kd.")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path):
    own = layer(path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."))
    above = [name for name in imported(path) if layer(name) is not None and layer(name) < own]
    assert not above


@pytest.mark.parametrize("folder", ("losses", "reference"))
def test_a_loss_is_one_file(folder):
    """Each name of the catalogue has a file, and the reverse; decompose is their study."""
    files = {path.stem for path in (PACKAGE / folder).glob("*.py") if not path.stem.startswith("_")}
    assert files - {"decompose", "rows"} == set(LOSSES)


def test_a_file_has_the_function_and_the_module():
    for name, loss in LOSSES.items():
        tree = ast.parse((PACKAGE / "losses" / f"{name}.py").read_text(encoding="utf-8"))
        made = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert {loss.function, loss.module} <= made
