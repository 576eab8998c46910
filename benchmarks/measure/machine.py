"""The machine that ran the benchmark: hardware, software and commit, without host name or paths."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def without_paths(text: str) -> str:
    """First line of a message with absolute paths replaced: results are published."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return re.sub(r"(?<![\w.])(?:/[\w.+@~-]+){2,}/?|[A-Za-z]:\\\S+", "<path>", line)


def describe(error: Exception) -> str:
    """Type and message of an error, short and without paths, for a result."""
    return f"{type(error).__name__}: {without_paths(str(error))}"[:300]


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return result.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_info() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
    }


def _compiler() -> str | None:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        first_line = _output(name, "--version") if name else None
        if first_line:
            return without_paths(first_line)
    return None


def machine() -> dict[str, Any]:
    info = _cpu_info()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cpu_family_model": f"{info['cpu family']}/{info['model']}" if "cpu family" in info else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "load_average_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": _gpu(),
        "system": platform.system(),
        "architecture": platform.machine(),
    }


def software() -> dict[str, Any]:
    # Results of earlier runs do not change the measured code.
    status = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "liger_kernel": _version("liger-kernel"),
        "numpy": _version("numpy"),
        "compiler": _compiler(),
        "fused_kd": _fused_kd_version(),
        "git_commit": _output("git", "rev-parse", "--verify", "HEAD"),
        "git_dirty": None if status is None else bool(status),
    }


def _fused_kd_version() -> str | None:
    try:
        import fused_kd
    except ImportError:
        return None
    return str(getattr(fused_kd, "__version__", None) or _version("fused_kd"))


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
