"""Measures each kernel's time on a GPU by PyTorch's profiler: `python -m tools.gpu.times RESULT.json`.

Unlike tools/gpu/profile.py it needs no access to the GPU's counters. For every loss and backend, forward and backward
in bfloat16, it measures the kernels' times, the host's time until the call returns, and the least bytes to move over
all kernels' time, as a share of the copy bandwidth. `--table` prints Markdown, with an earlier file's times in
brackets; `--update` writes it into docs/kernels.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure.timing import FLUSH_BYTES, copy_bandwidth
from fused_kd import check
from tools.gpu.check import about
from tools.gpu.drive import big_inputs
from tools.gpu.profile import CALLS, Call, short_name

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
MARKS = "<!-- gpu-times:begin -->\n", "<!-- gpu-times:end -->\n"
#: Kernels not of the loss: they empty the L2 between calls and fill the incoming gradient of 1.
OTHERS = ("vectorized_elementwise_kernel", "Memset", "FillFunctor")


def kernel_times(call: Callable[[], object], flush: Tensor, repeats: int = 5) -> dict[str, float]:
    """Microseconds that a call spends in each kernel, over all its launches: medians over calls."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
        for _ in range(repeats):
            flush.zero_()
            call()
        torch.cuda.synchronize()
    events = [event for event in found.events() if str(event.device_type).endswith("CUDA")]
    return summed([(event.name, float(event.device_time)) for event in events], repeats)


def summed(events: Sequence[tuple[str, float]], repeats: int) -> dict[str, float]:
    """Sum (name, microseconds) by kernel, per call; several launches per call add up."""
    times: dict[str, list[float]] = defaultdict(list)
    for name, microseconds in events:
        if not any(other in name for other in OTHERS):
            times[short_name(name)].append(microseconds)
    return {
        name: len(every) // repeats * statistics.median(every) for name, every in times.items() if len(every) >= repeats
    }


def host_time(call: Callable[[], object], repeats: int = 100) -> float:
    """Median microseconds until the call returns."""
    taken = []
    for _ in range(repeats + 20):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
        torch.cuda.synchronize()
    return 1e6 * statistics.median(taken[20:])


def _cross_entropy(student: Tensor, target: Tensor) -> None:
    logits = student.detach().requires_grad_()
    F.cross_entropy(logits, target).backward()  # type: ignore[no-untyped-call]


def measure(calls: Sequence[Call]) -> dict[str, Any]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    copy, results = copy_bandwidth("cuda"), []
    for each in calls:
        case = check.Case(torch.bfloat16, each.rows, each.classes, {}, loss=each.loss)
        tensors = big_inputs(case, "cuda")
        for backend in check.runnable("cuda", each.loss):

            def call(backend: str = backend, tensors: Any = tensors, loss: str = each.loss) -> None:
                student, other, target = tensors
                check.evaluate(backend, student, other, target, {}, loss=loss)

            kernels = kernel_times(call, flush)
            host = [host_time(call), host_time(lambda tensors=tensors: _cross_entropy(tensors[0], tensors[2]))]  # type: ignore[misc]
            share = each.least_bytes / copy / (sum(kernels.values()) / 1e6)
            entry = {"loss": each.loss, "backend": backend, "rows": each.rows, "classes": each.classes}
            results.append({**entry, "kernels": kernels, "host": host, "share": share})
            print(f"{each} {backend}: {sum(kernels.values()):.1f} us, {share:.0%}", file=sys.stderr, flush=True)
        del tensors
        torch.cuda.empty_cache()
    return {"machine": about(None), "copy": copy, "results": results}


def table(now: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """The results as a Markdown table, with the earlier ones in brackets."""
    known = {_place(entry): entry for entry in (before or {"results": []})["results"]}
    lines = [
        f"Microseconds of each kernel on a machine with an {now['machine']['gpu']}, bfloat16, forward and backward,"
        f" with empty caches; a copy moves {now['copy'] / 1e12:.2f} TB/s"
        + (". In brackets: before tuning." if before else "."),
        "",
        "| loss, backend | N×C | kernels | total | share of copy bandwidth |",
        "|---|---|---|---:|---:|",
    ]
    for entry in now["results"]:
        old = known.get(_place(entry), {}).get("kernels", {})
        kernels = ", ".join(
            f"{name} {_short(took)}" + (f" ({_short(old[name])})" if name in old else "")
            for name, took in entry["kernels"].items()
        )
        everything = sum(entry["kernels"].values())
        shape = f"{entry['rows']}×{entry['classes']}"
        name = f"{entry['loss']}, {entry['backend']}"
        lines.append(f"| {name} | {shape} | {kernels} | {_short(everything)} | {entry['share']:.0%} |")
    return "\n".join(lines) + "\n"


def _place(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["loss"], entry["backend"], entry["rows"], entry["classes"]


def _short(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.times", description=__doc__.split("\n\n")[0])
    parser.add_argument("result", type=Path, help="the JSON file to write; with --table or --update, to read")
    parser.add_argument("before", type=Path, nargs="?", help="an earlier result, shown in brackets")
    parser.add_argument("--table", action="store_true", help="print the result as Markdown")
    parser.add_argument("--update", action="store_true", help="write the table into docs/kernels.md")
    args = parser.parse_args(argv)
    if not (args.table or args.update):
        if not torch.cuda.is_available():
            parser.error("this PyTorch finds no GPU")
        args.result.write_text(json.dumps(measure(CALLS), indent=1) + "\n", encoding="utf-8")
    files = [json.loads(path.read_text(encoding="utf-8")) for path in (args.result, args.before) if path]
    text = table(*files)
    if args.update:
        begin, end = MARKS
        head, rest = PAGE.read_text(encoding="utf-8").split(begin)
        PAGE.write_text(head + begin + text + end + rest.split(end)[1], encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
