"""Measures each kernel's memory traffic by the GPU's counters: `python -m tools.gpu.profile FOLDER`, or
`make gpu-profile OUT=FOLDER`.

Runs Nsight Compute (ncu) on one call of each loss after a warm-up, and writes a table and a JSON file. They have, for
every kernel, time, bytes read and written, and bytes per second, also as a share of the peak; and for each call its
bytes and the least bytes it must move. If the counters cannot be read, which usually needs an administrator, it prints
the reason and exits with status 3.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.gpu.check import about

ROOT = Path(__file__).parents[2]
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
TIME, SHARE = "gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"
METRICS = (READ, WRITTEN, TIME, SHARE)
#: ncu's units in bytes, seconds and shares; versions of ncu use different names.
UNITS = {
    **{f"{prefix}byte": factor for prefix, factor in (("", 1.0), ("K", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))},
    **{name: 1e-9 for name in ("ns", "nsecond")},
    **{name: 1e-6 for name in ("us", "usecond")},
    **{name: 1e-3 for name in ("ms", "msecond")},
    **{name: 1.0 for name in ("s", "sec", "second")},
    "%": 1e-2,
}
NOT_READABLE = 3


class Call(NamedTuple):
    """One call; ``passes``: the least number of times that forward and backward read or write the logits."""

    loss: str
    rows: int
    classes: int
    passes: int

    def __str__(self) -> str:
        return f"{self.loss} {self.rows}x{self.classes}"

    @property
    def least_bytes(self) -> int:
        return self.passes * 2 * self.rows * self.classes  # bfloat16


#: NKD and USKD at the sizes of the benchmark, the others at the middle one.
CALLS = (
    *(Call("nkd", *shape, 3) for shape in ((1024, 1000), (8192, 1000), (4096, 21841), (8192, 128256))),
    *(Call("uskd", *shape, 4) for shape in ((1024, 1000), (4096, 21841))),
    *(Call(loss, 4096, 21841, 3) for loss in ("kd", "dkd", "wsld", "js")),
    Call("tf_kd", 4096, 21841, 2),
    Call("dist", 4096, 21841, 5),  # reads both logits twice: the columns' moments need every row's softmax
    Call("zipf_ls", 512, 21841, 6),  # also reads four positions per row
)


class CountersNotReadable(Exception):
    """ncu's message."""


def find_ncu() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("ncu") or shutil.which("ncu", path=f"{home}/bin")


def command(ncu: str, call: Call) -> list[str]:
    # Profile only the range that tools/gpu/drive.py marks. Clocks stay as they are: memory traffic is what counts.
    options = ["--csv", "--print-units", "base", "--profile-from-start", "off", "--clock-control", "none"]
    options += ["--target-processes", "application-only", "--metrics", ",".join(METRICS)]
    drive = [sys.executable, "-m", "tools.gpu.drive", "--loss", call.loss]
    return [ncu, *options, *drive, "--rows", str(call.rows), "--classes", str(call.classes)]


def parse(text: str) -> list[dict[str, Any]]:
    """Kernels in ncu's output, in launch order, each with a value or None for every metric.

    Raises :class:`CountersNotReadable` with ncu's message if there are none.
    """
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if header is None:
        messages = [re.sub(r"^==\w+==\s*", "", line) for line in lines if re.match(r"==(ERROR|WARNING)==", line)]
        raise CountersNotReadable(" ".join(messages) or (lines[-1] if lines else "ncu printed nothing"))
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in lines[header:] if line.startswith('"')):
        kernel = kernels.setdefault(row["ID"], {"kernel": short_name(row["Kernel Name"]), **dict.fromkeys(METRICS)})
        name, unit, value = row["Metric Name"], row["Metric Unit"], row["Metric Value"].replace(",", "")
        if name in METRICS and re.fullmatch(r"[\d.eE+-]+", value):  # "n/a" if the chip has no such counter
            if unit not in UNITS:
                raise ValueError(f"ncu: expected a unit among {', '.join(UNITS)} for {name}, got {unit!r}")
            kernel[name] = float(value) * UNITS[unit]
    if not any(kernel[READ] is not None for kernel in kernels.values()):
        raise CountersNotReadable("ncu has no value of " + READ)
    return list(kernels.values())


def short_name(name: str) -> str:
    """A kernel's name without namespaces, template arguments and parameters."""
    while (shorter := re.sub(r"<[^<>]*>|\([^()]*\)", "", name)) != name:
        name = shorter
    return name.split()[-1].split("::")[-1] if name.split() else name


def measure(call: Call, ncu: str, run: Callable[..., Any] = subprocess.run) -> dict[str, Any]:
    """Profile one call; return its entry of the JSON file."""
    finished = run(command(ncu, call), cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    try:
        kernels = parse(finished.stdout)
    except CountersNotReadable as error:
        drive = finished.stderr.strip().splitlines()
        message = str(error) if "==ERROR==" in finished.stdout or not drive else f"{error} {drive[-1]}"
        raise CountersNotReadable(message) from None
    moved = sum((kernel[READ] or 0.0) + (kernel[WRITTEN] or 0.0) for kernel in kernels)
    return {**call._asdict(), "least_bytes": call.least_bytes, "moved_bytes": moved, "kernels": kernels}


COLUMNS = ("call", "kernel", "time µs", "read MB", "written MB", "GB/s", "of the peak")


def table(entries: Iterable[dict[str, Any]]) -> str:
    """The table as plain text: this must run with no package but PyTorch."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for entry in entries:
        name = str(Call(*(entry[key] for key in Call._fields)))
        for kernel in entry["kernels"]:
            read, written, seconds, share = (kernel[metric] for metric in METRICS)
            speed = None if None in (read, written) or not seconds else (read + written) / seconds / 1e9
            cells = (_text(seconds, 1e6), _text(read, 1e-6), _text(written, 1e-6), _text(speed, 1.0))
            rows.append((name, kernel["kernel"], *cells, "–" if share is None else f"{share:.0%}"))
            name = ""
        times = entry["moved_bytes"] / entry["least_bytes"]
        rows.append(("", f"total: {times:.2f} times the minimum of {entry['least_bytes'] / 1e6:.4g} MB", *[""] * 5))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([*map(str.ljust, row[:2], widths), *map(str.rjust, row[2:], widths[2:])]).rstrip() for row in rows
    )


def _text(value: float | None, factor: float) -> str:
    return "–" if value is None else f"{value * factor:.4g}"


def main(argv: Sequence[str] | None = None, calls: Sequence[Call] = CALLS) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.profile", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder for gpu-profile.json")
    parser.add_argument("--loss", metavar="NAME,...", help="profile only these losses")
    parser.add_argument("--commit", help="the commit, if git cannot tell")
    args = parser.parse_args(argv)
    known = dict.fromkeys(call.loss for call in calls)
    wanted = args.loss.split(",") if args.loss else list(known)
    for name in wanted:
        if name not in known:
            parser.error(f"--loss: expected names among {', '.join(known)}, got {name!r}")
    ncu, facts = find_ncu(), about(args.commit)
    if facts["gpu"] is None:
        parser.error("this PyTorch finds no GPU, which the counters need")
    if ncu is None:
        parser.error("ncu not found: it is Nsight Compute, part of the CUDA toolkit")
    from fused_kd import check

    entries, failed = [], {}
    for call in calls:
        if call.loss not in wanted:
            continue
        if not check.runnable("cuda", call.loss):
            print(f"{call}: no fused backend runs it here", file=sys.stderr)
            continue
        print(f"{call} ...", file=sys.stderr, flush=True)
        try:
            entries.append(measure(call, ncu))
        except (CountersNotReadable, subprocess.TimeoutExpired) as error:
            failed[str(call)] = str(error)
            if not entries:
                print(f"the counters cannot be read here: {error}", file=sys.stderr)
                return NOT_READABLE
            print(f"{call}: {error}", file=sys.stderr)
    result = {"environment": facts, "dtype": "bfloat16", "metrics": METRICS, "calls": entries, "failed": failed}
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / "gpu-profile.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{facts['gpu']}\n\n{table(entries)}\n\n{path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
