"""Python in a source folder, which hides an installed fused_kd: which C++ core runs, and the message without one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fused_kd
from fused_kd.backends import native
from fused_kd.backends.native import core

ROOT = Path(__file__).resolve().parents[2]
VERSION = fused_kd.__version__
LIBRARY = Path(native._core.__file__)


@pytest.fixture
def source(tmp_path):
    """A source folder without a build."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(
        ROOT / "fused_kd", folder / "fused_kd", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.txt")
    )
    return folder


def install(tmp_path, version=VERSION, library=True):
    """A folder like site-packages, with an installed fused_kd."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "fused_kd", site / "fused_kd", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library:
        shutil.copy(LIBRARY, site / "fused_kd")
    information = site / f"fused_kd-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fused_kd\nVersion: {version}\n")
    return site


def find(source, monkeypatch, *site):
    """Find a core from the source folder, with only these installations of fused_kd."""
    monkeypatch.setattr(sys, "path", [str(source), *map(str, site)])
    return core.find(source / "fused_kd")


def python(source, site, *arguments, **options):
    """Run Python in the source folder, with these site-packages."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def change(csrc):
    with (csrc / "common" / "row_math.h").open("a") as file:
        file.write("// changed\n")


def test_the_core_says_what_it_was_built_from():
    assert native._core.sources == core.source_hash(ROOT / "csrc")


def test_the_installed_core_is_found(tmp_path, source, monkeypatch):
    site = install(tmp_path)
    found, folder, reason = find(source, monkeypatch, site)
    assert reason is None
    assert folder == site / "fused_kd"
    assert found.instruction_sets() == native.instruction_sets()


def test_the_one_beside_comes_first(tmp_path, source, monkeypatch):
    shutil.copy(LIBRARY, source / "fused_kd")
    assert find(source, monkeypatch, install(tmp_path))[1] == source / "fused_kd"


@pytest.mark.parametrize("version", (VERSION, "0.0.9"))
def test_an_installed_core_of_other_sources_is_refused(tmp_path, source, monkeypatch, version):
    if version == VERSION:
        change(source / "csrc")
    site = install(tmp_path, version)
    found, folder, reason = find(source, monkeypatch, site)
    assert found is folder is None
    assert f"the source folder {source / 'fused_kd'}" in reason
    assert f"hides the fused_kd {version} installed in {site}" in reason
    assert f"run `python -m pip install --editable .` in {source}" in reason
    assert "\n" not in reason


def test_a_core_beside_that_is_older_than_csrc_is_refused(tmp_path, source, monkeypatch):
    shutil.copy(LIBRARY, source / "fused_kd")
    assert find(source, monkeypatch)[2] is None
    change(source / "csrc")
    assert "was built from other sources than" in find(source, monkeypatch)[2]
    monkeypatch.setattr(core, "_load", lambda folder: object())  # built by a version that kept no hash
    assert "was built from other sources than" in find(source, monkeypatch)[2]


def test_a_core_that_cannot_be_loaded(tmp_path, source, monkeypatch):
    (source / "fused_kd" / LIBRARY.name).write_bytes(b"no library")
    assert "cannot be loaded" in find(source, monkeypatch)[2]
    assert find(source, monkeypatch, install(tmp_path))[2] is None


def test_nothing_is_built(tmp_path, source, monkeypatch):
    reason = find(source, monkeypatch)[2]
    assert reason.startswith(f"the C++ core of the source folder {source / 'fused_kd'} is not built: run ")
    site = install(tmp_path, library=False)
    assert find(source, monkeypatch, site)[2] == reason
    (site / "fused_kd" / "_native_missing.txt").write_text("the C++ core was not built: no compiler\n")
    assert find(source, monkeypatch, site)[2] == "the C++ core was not built: no compiler"


def test_an_installation_without_a_core_does_not_look_elsewhere(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'fused_kd._native'")

    monkeypatch.setattr(core.importlib, "import_module", absent)
    site = install(tmp_path, library=False)
    assert core.find(site / "fused_kd")[2].startswith("the C++ core is not in this installation (No module named")


def test_commands_in_the_source_folder(tmp_path, source):
    """As after `pip install .`: `env` and a loss use the installed core."""
    site = install(tmp_path)
    finished = python(source, site, "-m", "fused_kd", "env")
    assert finished.returncode == 0, finished.stderr
    assert f"fused_kd   {VERSION} in {source / 'fused_kd'}" in finished.stdout
    assert f"from the installation in {site / 'fused_kd'}" in finished.stdout
    assert "auto takes 'native'" in finished.stdout
    change(source / "csrc")
    finished = python(source, site, "-m", "fused_kd", "env")
    assert "hides the fused_kd" in finished.stdout
    assert "auto takes 'reference'" in finished.stdout


def test_what_names_fused_kd_fails_without_its_core(tmp_path, source):
    """The benchmark, the cost of a step and the tests fail, rather than time the reference or skip tests."""
    for name in ("benchmarks", "study", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", source)
    change(source / "csrc")  # so that what may be installed in this environment is of no use
    commands = {
        "benchmark": ("-m", "benchmarks", "--cases", "6x11", "--output", str(tmp_path / "results")),
        "cost": ("-m", "study.comparison.cost", "--loss", "nkd", "--teacher-model", "cnn-tiny"),
        "tests": ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/backends/test_native.py"),
    }
    for name, command in commands.items():
        finished = python(source, tmp_path / "none", *command)
        assert finished.returncode not in (0, 5), name
        assert f"run `python -m pip install --editable .` in {source}" in finished.stderr, (name, finished.stderr)
        assert "passed" not in finished.stdout and "skipped" not in finished.stdout
    assert not (tmp_path / "results").exists()
