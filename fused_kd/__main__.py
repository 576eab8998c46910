"""``python -m fused_kd env`` shows versions and available backends, and why others are missing. ``check`` compares the
backends with float64 in a minute or two. ``losses`` lists the losses."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

import fused_kd
from fused_kd import backends, check
from fused_kd.backends import native
from fused_kd.backends.native import core
from fused_kd.core.catalogue import LOSSES, Loss

#: The table of `check`: its heads, and the format of a line.
_HEADS = ("device", "backend", "", "dtype", "cases", "loss", "allowed", "gradient", "allowed", "")
_LINE = "{:<8}{:<9}{:<16}{:<10}{:>5}{:>9}{:>9}{:>10}{:>9}  {}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_kd", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="versions, devices, and which backend serves each device and why")
    checker = commands.add_parser("check", help="compare every backend that runs here with a float64 reference")
    checker.add_argument("--device", action="append", help="cpu, cuda, cuda:1, ...; default: every kind that is here")
    checker.add_argument("--backend", action="append", choices=[n for n in backends.BACKENDS if n != "reference"])
    checker.add_argument("--quick", action="store_true", help="small shapes only")
    commands.add_parser("losses", help="every loss with its formula, defaults and kernels")
    parsed = parser.parse_args(arguments)
    if parsed.command == "losses":
        print("\n\n".join(_plain(loss) for loss in LOSSES.values()))
        return 0
    if parsed.command == "env":
        return env()
    try:
        return run_check(parsed.device or _devices(), parsed.backend, parsed.quick)
    except RuntimeError as error:  # no such device, or a backend that cannot run there
        print(f"python -m fused_kd check: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2


def _plain(loss: Loss) -> str:
    """Describe a loss for a terminal, in lines of 80 columns."""
    fused = [f"{device}: {', '.join(names[:-1]) or 'none'}" for device, names in loss.backends.items()]
    options = ", ".join(f"{name}={value!r}" for name, value in loss.defaults.items())
    lines = [f"{loss.title}: {loss.function}, {loss.module}. {loss.paper}"]
    for text in (loss.formula, f"defaults: {options}", f"fused on {'; '.join(fused)}"):
        lines += textwrap.wrap(text, 80, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
    return "\n".join(lines)


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpus() -> list[tuple[str, str]]:
    names = [torch.cuda.get_device_name(index) for index in range(_gpu_count())]
    if len(names) > 1:
        return [(f"GPU {index}", name) for index, name in enumerate(names)]
    return [("GPU", names[0] if names else "none that this PyTorch can use")]


def env() -> int:
    facts = [
        ("fused_kd", f"{fused_kd.__version__} in {core.PACKAGE}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("threads", str(torch.get_num_threads())),
        ("C++ core", _core_line()),
        ("OpenMP", _openmp_line()),
        ("CUDA core", native.cuda_architectures() or native.unavailable("cuda") or ""),
        *_gpus(),
    ]
    for name, value in facts:
        print(f"{name:<10} {value}")
    for device in ("cpu", *(f"cuda:{index}" for index in range(_gpu_count()))):
        for text in _explanations(device):
            print(f"\n{text}")
    return 0


def _explanations(device: str) -> list[str]:
    """Explain which backend serves each loss on a device, once for all losses with the same reasons."""
    alike: dict[tuple[tuple[str, str], ...], list[backends.Explanation]] = {}
    for loss in LOSSES:
        found = backends.explain(device, loss)
        # A reason may name its loss. That alone makes no difference.
        own = LOSSES[loss].title
        key = tuple(
            (name, reason.replace(f"kernel of {own} for", "kernel for")) for name, reason in found.reasons.items()
        )
        alike.setdefault(key, []).append(found)
    texts = []
    for reasons, members in alike.items():
        titles = ", ".join(LOSSES[member.loss].title for member in members)
        subject = f"{'every loss' if len(alike) == 1 else titles} of {members[0].device} tensors"
        texts.append(members[0]._replace(reasons=dict(reasons)).text(subject))
    return texts


def _core_line() -> str:
    if reason := native.unavailable("cpu"):
        return reason
    line = f"{', '.join(native.instruction_sets())} ({native.compiler()})"
    return line if native.folder() == core.PACKAGE else f"{line}, from the installation in {native.folder()}"


def _openmp_line() -> str:
    if native.unavailable("cpu"):
        return "not used: there is no C++ core"
    if not (used := native.openmp_runtime()):
        return "none that this PyTorch has loaded: the C++ core uses one thread"
    others = [path for path in native.loaded_openmp_runtimes() if Path(path).resolve() != Path(used).resolve()]
    return f"PyTorch's, {used}" + (f"; loaded besides: {', '.join(others)}" if others else "")


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def run_check(devices: list[str], only: list[str] | None, quick: bool) -> int:
    jobs: list[tuple[str, str, str]] = []
    for device in devices:
        here = [(device, name, loss) for loss in LOSSES for name in check.runnable(device, loss)]
        jobs += [job for job in here if not only or job[1] in only]
        for name in set(only or ()) - {job[1] for job in here}:
            backends.choose(name, device)  # raises an error with the reason
    if not jobs:
        print("no fused backend runs here; `python -m fused_kd env` says why")
        return 1
    print("Largest relative error against float64, and the allowed error:\nthat of the eager form, plus a few ulp\n")
    print(_LINE.format(*_HEADS).rstrip())
    failures = 0
    for device, name, loss_name in jobs:
        # Large shapes would take Triton's interpreter minutes.
        plan = [*check.cases(quick or (device, name) == ("cpu", "triton"), loss_name)]
        for dtype in check.DTYPES:
            outcomes = [check.compare(name, case, device) for case in plan if case.dtype == dtype]
            missed = sum(not outcome.passed for outcome in outcomes)
            failures += missed
            loss = max(outcomes, key=lambda outcome: outcome.loss / outcome.loss_budget)
            gradient = max(outcomes, key=lambda outcome: outcome.gradient / outcome.gradient_budget)
            cells = (
                *(device, name, LOSSES[loss_name].title, str(dtype).removeprefix("torch."), len(outcomes)),
                *(f"{loss.loss:.1e}", f"{loss.loss_budget:.1e}"),
                *(f"{gradient.gradient:.1e}", f"{gradient.gradient_budget:.1e}"),
                f"{missed} missed" if missed else "ok",
            )
            print(_LINE.format(*cells), flush=True)  # the next line can take seconds
    if failures:
        print(f"{failures} cases are outside the budget")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        status = 1
    sys.exit(status)
