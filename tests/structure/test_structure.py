"""Where things are: a loss has one address, and imports run one way."""

import ast

import pytest
from tree import ROOT, SOURCES

from fused_kd.core.catalogue import LOSSES

PACKAGE = ROOT / "fused_kd"
#: From the top: each imports of those after it alone, and of its own kind.
LAYERS = (
    "losses", "direct", "repeated", "sources", "source_autograd", "autograd", "source_ops", "ops", "backends", "core",
    "reference",
)  # fmt: skip
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
            module = node.module.removeprefix("fused_kd.")
            yield from (module, *(f"{module}.{name.name}" for name in node.names))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path):
    own = layer(path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."))
    above = [name for name in imported(path) if layer(name) is not None and layer(name) < own]
    assert not above


@pytest.mark.parametrize("folder", ("native", "triton"))
def test_a_backend_imports_none_of_the_runs_around_it(folder):
    runs = {f"backends.{name}" for name in ("heads", "shards", "sources", "staged", "topk")}
    for path in (PACKAGE / "backends" / folder).rglob("*.py"):
        assert not runs & {*imported(path)}, path


@pytest.mark.parametrize("folder", ("losses", "reference"))
def test_a_loss_is_one_file(folder):
    """Each name of the catalogue has a file, and the reverse. decompose is their study, and topk has all that have a
    teacher."""
    files = {path.stem for path in (PACKAGE / folder).glob("*.py") if not path.stem.startswith("_")}
    assert files - {"decompose", "rows", "topk"} == set(LOSSES)


def test_a_file_has_the_function_and_the_module():
    for name, loss in LOSSES.items():
        tree = ast.parse((PACKAGE / "losses" / f"{name}.py").read_text(encoding="utf-8"))
        made = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert {loss.function, loss.module} <= made


def test_files_are_short():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in [*SOURCES, ROOT / "setup.py"]
    }
    assert not {path: length for path, length in lengths.items() if length > 400}


@pytest.mark.parametrize("folder", ("fused_kd", "examples", "benchmarks"))
def test_nothing_imports_what_is_around_it(folder):
    """Users copy from examples/, and have fused_kd alone; a benchmark needs no more."""
    around = {"benchmarks", "examples", "study", "tests", "tools"} - {folder}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in modules if name.partition(".")[0] in around], path


def test_no_circle_of_imports():
    """Of what is imported when a module is."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    wanted = {}
    for name, path in names.items():
        wanted[name] = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            found = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                inner = [f"{node.module}.{each.name}" for each in node.names]
                found = inner if {*inner} <= {*names} else [*inner, node.module]
            wanted[name] |= {each for each in found if each in names} - {name}
    while leaves := [name for name, others in wanted.items() if not others]:
        for name in leaves:
            del wanted[name]
        for others in wanted.values():
            others -= {*leaves}
    assert not wanted
