"""Builds the wheel and tries it as a user would: `python -m tools.release.wheel`, which `make wheel` runs.

Builds the sdist, and the wheel from it. auditwheel reports which systems the wheel fits, and must find nothing to
bundle: the core uses the OpenMP runtime that PyTorch has loaded, and a bundled one would be a second. Then the wheel is
installed and used away from the sources, in an environment with PyTorch alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: A first loss, as in the README. Prints the backend, the loaded OpenMP runtimes, and the number of threads before and
#: after a call with more threads.
FIRST_LOSS = """
import time; began = time.perf_counter()
import torch, fused_kd
from fused_kd.backends import native
student, teacher = torch.randn(256, 1000, requires_grad=True), torch.randn(256, 1000)
loss = fused_kd.nkd_loss(student, teacher, torch.randint(1000, (256,)), ce_weight=1.0)
loss.backward()
seconds = time.perf_counter() - began
print(f"{fused_kd.explain(student).chosen}|{native.openmp_runtime()}|{seconds:.2f}")
print(*native.loaded_openmp_runtimes(), sep="|")
import os
def tasks(): return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
before = tasks(); torch.set_num_threads(before + 5)
fused_kd.nkd_loss(torch.randn(256, 1000), torch.randn(256, 1000), torch.randint(1000, (256,)), backend="native")
print(f"{before}|{tasks()}")
"""


class Failure(Exception):
    """What went wrong, in one line."""


def run(*command: object, cwd: Path | None = None) -> str:
    """Run a command and return its output.

    PYTHONPATH is removed, because it would import the sources. auditwheel looks for patchelf on the PATH.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    given = list(map(str, command))
    done = subprocess.run(
        given, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise Failure(f"{' '.join(given)}: status {done.returncode}")
    return done.stdout


def build(out: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it, each in a build environment of its own."""
    with tempfile.TemporaryDirectory(prefix="fused_kd_dist_") as folder:
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
        (sdist,), (wheel,) = Path(folder).glob("*.tar.gz"), Path(folder).glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return sdist.replace(out / sdist.name), wheel.replace(out / wheel.name)


def check_contents(wheel: Path) -> None:
    """Check that the wheel has the package, one compiled module, and no other library."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    strange = [name for name in names if not re.match(r"fused_kd(/|-[^/]*\.dist-info/)", name)]
    if strange:
        raise Failure(f"{wheel.name}: expected the package alone, got {', '.join(strange)}")
    cores = [name for name in names if re.search(r"\.(so|pyd|dylib)\b", name)]
    if len(cores) != 1 or not cores[0].removeprefix("fused_kd/").startswith("_native."):
        raise Failure(f"{wheel.name}: expected the C++ core and no other library, got {', '.join(cores) or 'none'}")
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fused_kd").rglob("*.py")}
    if lacking := sorted(sources - {*names}):
        raise Failure(f"{wheel.name}: not in it: {', '.join(lacking)}")


def repair(wheel: Path) -> tuple[Path, str]:
    """Rename the wheel for the oldest system that it fits; return it and the platform. For Linux alone."""
    platform = re.search(r'platform tag:\s+"(\S+)"', run(sys.executable, "-m", "auditwheel", "show", wheel))
    if platform is None:
        raise Failure(f"{wheel.name}: auditwheel names no platform that it fits")
    with tempfile.TemporaryDirectory(prefix="fused_kd_repaired_") as folder:
        run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, wheel)
        (repaired,) = Path(folder).glob("*.whl")
        check_contents(repaired)
        wheel.unlink()
        return repaired.replace(wheel.with_name(repaired.name)), platform[1]


def clean_environment(folder: Path) -> Path:
    """Python of a new environment with this one's PyTorch, but without its editable packages."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise Failure("PyTorch is not installed; the installed wheel is tried with it")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(f"{Path(torch.origin).parents[1]}\n", encoding="utf-8")
    return folder / "bin" / "python"


def try_installed(wheel: Path) -> list[str]:
    """Install the wheel into a clean environment and use it; return lines about it."""
    with tempfile.TemporaryDirectory(prefix="fused_kd_clean_") as text:
        folder = Path(text)
        python = clean_environment(folder / "environment")
        began = time.perf_counter()
        run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
        installed = time.perf_counter()
        first, loaded, threads = run(python, "-c", FIRST_LOSS, cwd=folder).splitlines()[-3:]
        ended = time.perf_counter()
        backend, used, _ = first.split("|")
        if backend != "native":
            raise Failure(f"{wheel.name}: auto takes {backend!r} on a CPU")
        others = {os.path.realpath(path) for path in loaded.split("|") if path} - {os.path.realpath(used)}
        if sys.platform == "linux" and (not used or others):
            raise Failure(f"OpenMP: expected PyTorch's alone, got {used or 'none'} and {', '.join(others) or 'none'}")
        before, after = threads.split("|")
        if sys.platform == "linux" and int(after) <= int(before):
            raise Failure(f"threads: expected more than {before} after torch.set_num_threads, got {after}")
        table = run(python, "-m", "fused_kd", "check", "--quick", "--backend", "native", cwd=folder)
    return [
        f"OpenMP runtimes loaded: {loaded.replace('|', ', ') or 'unknown on this system'}",
        f"threads of the process before and after a call with more: {before}, {after}",
        f"check --quick: {table.count(' ok')} lines ok",
        f"pip install {installed - began:.1f} s, a first loss {ended - installed:.1f} s: {ended - began:.1f} s",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.release.wheel", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist/")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="try this wheel; build nothing")
    parsed = parser.parse_args(arguments)
    try:
        if parsed.wheel:
            files, wheel = [parsed.wheel], parsed.wheel
        else:
            sdist, wheel = build(parsed.out)
            files = [sdist]
        check_contents(wheel)
        if sys.platform == "linux" and not parsed.wheel:
            wheel, platform = repair(wheel)
            print(f"auditwheel: {platform}, and nothing to bundle")
        files = [*{*files, wheel}]
        run(sys.executable, "-m", "twine", "check", "--strict", *files)
        print(f"twine check --strict: {', '.join(sorted(path.name for path in files))}")
        print(*try_installed(wheel), sep="\n")
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    print(wheel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
