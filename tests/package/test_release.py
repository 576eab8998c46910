"""What `make wheel` and `make release-check` refuse, on made-up trees and wheels; and the core without OpenMP."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from fused_kd.backends import native
from tools.release import check, wheel

ROOT = Path(__file__).resolve().parents[2]
CORE = "/".join(("fused_kd", "_native.cpython-311.so"))
WHEEL = "fused_kd-1.0-cp311-cp311-linux_x86_64.whl"


def made(folder, *more, without=()):
    """A wheel of empty files."""
    sources = [path.relative_to(ROOT).as_posix() for path in (ROOT / "fused_kd").rglob("*.py")]
    names = {*sources, CORE, "fused_kd-1.0.dist-info/METADATA", *more} - {*without}
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return folder / WHEEL


def test_a_wheel_has_the_package_and_no_library(tmp_path):
    wheel.check_contents(made(tmp_path))
    for more, without, message in (
        (("fused_kd.libs/libgomp.so.1",), (), "expected the package alone, got fused_kd.libs/libgomp.so.1"),
        ((CORE.replace("_native.cpython-311", "libgomp"),), (), "the C\\+\\+ core and no other library, got .*libgomp"),
        ((), (CORE,), "the C\\+\\+ core and no other library, got none"),
        (("tests/conftest.py",), (), "expected the package alone, got tests/conftest.py"),
        ((), ("fused_kd/core/checks.py",), "not in it: fused_kd/core/checks.py"),
    ):
        with pytest.raises(wheel.Failure, match=message):
            wheel.check_contents(made(tmp_path, *more, without=without))


def test_one_version_in_three_places(tmp_path):
    here = check.version()
    for name in ("CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    log = (tmp_path / "CHANGELOG.md").read_text()
    with pytest.raises(check.Failure, match=f"the tag is v9, and the version {here}"):
        check.check_version(tmp_path, "v9")
    for changed in (log.replace(f"## {here} (", "## 9.9 ("), re.sub(r"(?m)^## ", "## Unreleased\n\n## ", log, count=1)):
        (tmp_path / "CHANGELOG.md").write_text(changed)
        with pytest.raises(check.Failure, match=rf"CHANGELOG.md: expected its first heading to be {here} and a date"):
            check.check_version(tmp_path, None)
    (tmp_path / "CITATION.cff").write_text("version: 9.9\n")
    with pytest.raises(check.Failure, match=f"CITATION.cff: expected version {here}, got 9.9"):
        check.check_version(tmp_path, None)


def test_the_citation_is_of_this_version():
    assert f"\nversion: {check.version()}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_links_lead_to_files(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "README.md").write_text(
        "[a](there.md#part) [b](https://example.org) [c](#here) ![d](../../actions/x.svg) [e](gone.md)\n"
        "```\n[f](code.md)\n```\n"
    )
    (tmp_path / "there.md").write_text("![g](picture.png)")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[h](api/nkd.md) [i](api/none.md) [j](../there.md)")
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    expected = ["README.md: gone.md", "docs/index.md: api/none.md", "there.md: picture.png"]
    assert sorted(check.broken_links(tmp_path)) == expected


def test_the_links_of_this_repository():
    assert check.check_links(ROOT).startswith("every link between files works")


def test_docs_are_built_where_there_is_a_target(tmp_path):
    """A folder docs/ alone would be up to date for make."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "Makefile").write_text("all:\n\ttrue\n")
    assert check.check_docs(tmp_path) == "not built: the Makefile has no target docs"
    (tmp_path / "Makefile").write_text(".PHONY: docs\ndocs:\n\ttouch built\n")
    assert check.check_docs(tmp_path) == "make docs builds them" and (tmp_path / "built").is_file()
    (tmp_path / "Makefile").write_text(".PHONY: docs\ndocs:\n\tfalse\n")
    with pytest.raises(check.Failure, match="make docs: status 2"):
        check.check_docs(tmp_path)


def test_one_failed_check_does_not_hide_the_next(monkeypatch, capsys):
    def fails(*_):
        raise check.Failure("no")

    for name in ("check_version", "check_tree", "check_readme", "check_sdist", "check_docs"):
        monkeypatch.setattr(check, name, fails if name == "check_tree" else lambda *_: "yes")
    monkeypatch.setattr(check, "check_links", fails)
    assert check.main(["--tag", "v1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["ok", "failed", "failed", "ok", "ok", "ok"]


WITHOUT_OPENMP = """
import torch, fused_kd
from fused_kd import __main__, check
print(__main__._openmp_line())
torch.set_num_threads(4)
losses = [name for name in check.OPTIONS if "native" in check.LOSSES[name].backends["cpu"]]
cases = [check.Case(dtype, 70, 1000, check.OPTIONS[loss][-1], loss=loss) for loss in losses for dtype in check.DTYPES]
print(all(check.compare("native", case).passed for case in cases))
"""


@pytest.mark.skipif(native.unavailable("cpu") is not None, reason=str(native.unavailable("cpu")))
def test_without_openmp_the_core_runs_on_one_thread(tmp_path):
    """As on a Mac, whose OpenMP has no such function: here in a core that asks for one that nobody has."""
    shutil.copytree(ROOT / "fused_kd", tmp_path / "fused_kd", ignore=shutil.ignore_patterns("_native*", "__pycache__"))
    (core,) = (path for suffix in EXTENSION_SUFFIXES if (path := native.folder() / f"_native{suffix}").is_file())
    code = core.read_bytes()
    assert code.count(b"\0GOMP_parallel\0") == 1
    (tmp_path / "fused_kd" / core.name).write_bytes(code.replace(b"\0GOMP_parallel\0", b"\0GOMP_parallax\0"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_OPENMP],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["none that this PyTorch has loaded: the C++ core uses one thread", "True"]
