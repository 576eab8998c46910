"""What documents and comments name is there, and what is told twice is told alike."""

import ast
import re

import pytest
from tree import FOLDERS, ROOT, SOURCES

from fused_kd.backends.native.staged import FIELDS
from fused_kd.core.catalogue import BITS, KIND_SHIFT, LOSSES, REST_NUMBERS, ROW_LOSSES
from fused_kd.core.options import HyperParameters
from fused_kd.core.rows import STAGES, TOPK_FIELDS
from fused_kd.losses import _options

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile", *(ROOT / "benchmarks").glob("*.md")]
)
#: A path from the root, perhaps with a pattern; no part of a longer one, and of no URL.
PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w/.*+-]*[\w*/]")
#: What a build makes, and the loss that CONTRIBUTING adds as an example.
MADE_UP = {
    *("fused_kd/_native*.so", "fused_kd/_native_missing.txt"),
    *("fused_kd/losses/trusted_kd.py", "fused_kd/reference/trusted_kd.py"),
}
MODULE = re.compile(r"python3? -m ((?:benchmarks|study|tools|fused_kd)[\w.]*\w)")


def missing(text):
    """Paths and modules that a text names and that are not there."""
    for name in sorted({*PATH.findall(text)} - MADE_UP):
        if not any(ROOT.glob(name.rstrip("/"))):
            yield name
    for name in sorted({*MODULE.findall(text)}):
        path = ROOT / name.replace(".", "/")
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
            yield f"python -m {name}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(path):
    assert not list(missing(path.read_text(encoding="utf-8")))


def test_what_sources_name_is_there():
    found = {path.relative_to(ROOT).as_posix(): [*missing(path.read_text(encoding="utf-8"))] for path in SOURCES}
    assert not {path: names for path, names in found.items() if names}


def test_a_row_loss_has_one_number():
    """In the catalogue, in C++ and in Triton."""
    kinds = {name: loss.kind for name, loss in ROW_LOSSES.items()}
    (enum,) = re.findall(r"enum RowLoss[^{]*\{([^}]*)\}", (ROOT / "csrc/losses/row_losses.h").read_text())
    numbers = {name.lower(): int(number) for name, number in re.findall(r"k(\w+) = (\d+)", enum)}
    assert numbers == {name.replace("_", ""): kind for name, kind in kinds.items()}
    folder = ROOT / "fused_kd/backends/triton/kernels"
    kernels = "".join((folder / name).read_text() for name in ("losses.py", "pointwise.py"))
    for name in kinds:
        assert f'{name.upper()} = tl.constexpr(NUMBERS["{name}"])' in kernels, name


def test_what_a_row_loss_needs_has_one_bit():
    """In the catalogue, where Triton's kernels have it from, and in C++."""
    header = (ROOT / "csrc/losses/row_losses.h").read_text()
    (enum,) = re.findall(r"enum RowNeed[^{]*\{([^}]*)\}", header)
    bits = {name.lower(): int(number) for name, number in re.findall(r"k(\w+) = (\d+)", enum)}
    assert bits == {name.replace("_", ""): bit for name, bit in BITS.items()}
    assert f"kKindShift = {KIND_SHIFT};" in header
    assert max(bits.values()) < 1 << KIND_SHIFT


def test_hyper_parameters_have_one_order():
    """In Python, in C++, and where C++ takes them from Python."""
    header = re.sub(r"//.*", "", (ROOT / "csrc/common/hyper_parameters.h").read_text())
    fields = [name for names in re.findall(r"double ([^;]+);", header) for name in re.split(r",\s*", names)]
    assert tuple(fields) == HyperParameters._fields
    boundary = (ROOT / "csrc/python/boundary.h").read_text()
    assert f"Fields x(given, {len(fields)});" in boundary and boundary.count("x.number()") == len(fields)


def test_what_becomes_of_a_teachers_rest_has_one_number():
    """In Python and C++; and what the Triton kernels are asked for beside, in the kernels and their plan."""
    header = (ROOT / "csrc/losses/topk_losses.h").read_text()
    (enum,) = re.findall(r"enum TopKRest[^{]*\{([^}]*)\}", header)
    numbers = {name.lower(): int(number) for name, number in re.findall(r"k(\w+) = (\d+)", enum)}
    assert numbers == REST_NUMBERS
    folder = ROOT / "fused_kd/backends/triton"
    kernels = re.search(r"^SHARP, LINEAR = tl.constexpr\((\d+)\), tl.constexpr\((\d+)\)$",
                        (folder / "kernels/topk.py").read_text(), re.MULTILINE)  # fmt: skip
    plan = re.search(r"^SHARP, LINEAR = (\d+), (\d+)$", (folder / "plans/topk.py").read_text(), re.MULTILINE)
    assert kernels.groups() == plan.groups()


def test_what_a_stage_ends_with_has_one_number():
    """In Python and in C++; Triton's kernels have it from their own statistics."""
    header = (ROOT / "csrc/cpu/kernels.h").read_text()
    fields = {name.lower(): int(number) for name, number in re.findall(r"k(\w+)Fields = (\d+);", header)}
    assert fields.pop("topk") == TOPK_FIELDS
    assert {**fields, "gradient": 0} == FIELDS
    (enum,) = re.findall(r"enum Stage \{([^}]*)\}", header)
    assert {name.lower(): int(number) for name, number in re.findall(r"k(\w+) = (\d+)", enum)} == STAGES


def test_a_row_loss_names_its_own():
    """As its function does, so that a hyper-parameter has one name from the call to the kernels' door."""
    for name, loss in ROW_LOSSES.items():
        shared = {"temperature", "ce_weight", "label_smoothing", "logit_standardization"}
        assert {*loss.own} == {*LOSSES[name].defaults} - shared


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_overloads_have_the_arguments_of_the_function(loss):
    """Those of many losses through a TypedDict, which mypy does not compare with the function."""
    tree = ast.parse((ROOT / "fused_kd" / "losses" / f"{loss.name}.py").read_text(encoding="utf-8"))
    *overloads, function = [
        node.args for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == loss.function
    ]
    names = [each.arg for each in (*function.args, *function.kwonlyargs)]
    assert len(overloads) == 3
    for arguments in overloads:
        shared = re.fullmatch(r"Unpack\[(\w+)\]", ast.unparse(arguments.kwarg.annotation))[1]
        keys = getattr(_options, shared).__optional_keys__
        assert sorted([*(each.arg for each in (*arguments.args, *arguments.kwonlyargs)), *keys]) == sorted(names)
