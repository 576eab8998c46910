"""What is given away: the sdist has all that building and testing take, and what is built of it has its kernels."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
#: Of the repository, and of no use without it.
NOT_GIVEN = (".github/", ".gitignore")


def run(*command, **options):
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished.stdout


@pytest.fixture(scope="module")
def tracked():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("git is not here, or the repository is not")
    return run("git", "ls-files", cwd=ROOT).splitlines()


@pytest.fixture(scope="module")
def sdist(tracked, tmp_path_factory):
    """Made of the files that git tracks, in a copy: setuptools writes into the folder."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked:
        if (ROOT / name).exists():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "tree" / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=folder / "tree")
    (path,) = folder.glob("*.tar.gz")
    return path


def test_the_sdist_has_what_git_tracks(tracked, sdist):
    with tarfile.open(sdist) as archive:
        given = {member.name.partition("/")[2] for member in archive if member.isfile()}
    wanted = {name for name in tracked if not name.startswith(NOT_GIVEN)}
    assert not wanted - given
    made = {"PKG-INFO", "setup.cfg"}
    assert not {name for name in given - wanted - made if not name.startswith("fused_kd.egg-info/")}


def test_a_build_without_csrc_is_an_error(tmp_path):
    """Not a wheel without kernels, for which a compiler is blamed."""
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "fused_kd", tmp_path / "fused_kd", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path / "dist")]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("fused_kd: the sources of the C++ core are missing: expected ")
    assert not list((tmp_path / "dist").glob("*.whl"))


@pytest.mark.parametrize("lacking", ("setuptools", "cmake", "pybind11"))
def test_what_a_build_without_isolation_lacks_is_one_line(build, lacking, monkeypatch, tmp_path):
    """Not an installation without a core, nor somebody else's traceback."""

    def absent():
        raise ModuleNotFoundError("No module named 'pybind11'")

    if lacking == "pybind11":
        monkeypatch.setattr(build, "pybind11_option", absent)
    elif lacking == "cmake":
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        build.check_setuptools("76.1.0") if lacking == "setuptools" else build.check_tools()
    text = str(stopped.value)
    assert text.startswith(f"fused_kd: building takes {lacking}")
    assert "python -m pip install 'setuptools>=77' 'cmake>=3.18'" in text and "\n" not in text
    build.check_setuptools("77.0.1")


def test_the_build_requirements_named_are_those_of_pyproject(build):
    with pytest.raises(SystemExit) as stopped:
        build._need("something")
    listed = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert str(stopped.value).endswith(listed.replace('"', "'").replace(",", ""))


@pytest.mark.parametrize(
    ("program", "line"),
    (
        ("study/train.py", "train.py: not installed: torch, rich, numpy, Pillow, fonttools, safetensors; run `"),
        ("-m study.train", "train.py: not installed: torch, rich, numpy, Pillow, fonttools, safetensors; run `"),
        ("-m study.datasets", "study.datasets: not installed: torch"),
        ("-m study", "study: not installed: torch"),
        ("-m benchmarks", "benchmarks: not installed: torch, rich, numpy; run `"),
    ),
)
def test_a_program_without_its_extra_is_one_line(program, line, tmp_path):
    venv.create(tmp_path / "environment", with_pip=False)
    command = [str(tmp_path / "environment" / "bin" / "python"), *program.split()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert line in finished.stderr and len(finished.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("sdist", "wheel"))
def test_installed_in_a_clean_environment(kind, sdist, tmp_path):
    """As `pip install` of either does it, build environment included; `check` passes in another folder."""
    path = sdist
    if kind == "wheel":
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, sdist)
        (path,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "environment", with_pip=False)
    python = tmp_path / "environment" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", path)
    # PyTorch is that of this environment, but not its fused_kd.
    (packages,) = (tmp_path / "environment" / "lib").glob("python*/site-packages")
    (packages / "shared.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    elsewhere = {"cwd": tmp_path, "env": environment}
    assert f" in {packages / 'fused_kd'}" in run(python, "-m", "fused_kd", "env", **elsewhere)
    assert "missed" not in run(python, "-m", "fused_kd", "check", "--backend", "native", **elsewhere)
