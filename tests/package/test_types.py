"""A user's script as type checkers read it, with the package from an editable install, which they have to find."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from pages import needs

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "typed_user.py"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A Python with an editable install of this checkout: what pip makes of pyproject.toml, built without the core."""
    needs("setuptools", "mypy")
    folder = tmp_path_factory.mktemp("editable")
    source = folder / "source"
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "fused_kd", source / "fused_kd", ignore=shutil.ignore_patterns("_native*", "__pycache__"))
    shutil.copytree(ROOT / "csrc", source / "csrc")  # without it there is no building
    build = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    cmake = folder / "cmake"  # builds nothing: the core is not what is looked at
    cmake.write_text("#!/bin/sh\nexit 1\n")
    cmake.chmod(0o755)
    environment = {**os.environ, "PATH": str(folder)}
    subprocess.run(
        [sys.executable, "-c", build, str(folder)],
        cwd=source,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    packages = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(packages)
    # PyTorch, from where it is.
    (packages / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, source


def checked(command, cwd):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def test_mypy(installed, tmp_path):
    python, _ = installed
    script = shutil.copy(SCRIPT, tmp_path / "user.py")
    options = (
        "--strict",
        "--allow-untyped-calls",
        "--config-file",
        "",
        "--cache-dir",
        str(tmp_path / "cache"),
    )  # backward
    code, text = checked([sys.executable, "-m", "mypy", *options, "--python-executable", python, script], tmp_path)
    assert code == 0, text
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import fused_kd\nreveal_type(fused_kd.NKDLoss().gamma)\nfused_kd.NKDLoss(gamma='2')\n")
    code, text = checked([sys.executable, "-m", "mypy", *options, "--python-executable", python, wrong], tmp_path)
    assert code == 1 and 'expected "float | Callable[[], float]"' in text, text


def test_pyright(installed, tmp_path):
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed")
    python, _ = installed
    script = shutil.copy(SCRIPT, tmp_path / "user.py")
    code, text = checked([pyright, "--pythonpath", str(python), str(script)], tmp_path)
    assert code == 0, text


def test_it_runs():
    result = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
