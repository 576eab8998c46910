"""Calls losses once, forward and backward, for a profiler or sanitizer: tools/gpu/profile.py and tools/gpu/check.py run
`python -m tools.gpu.drive` under one. Needs only PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence

import torch

from fused_kd import check
from fused_kd.core.catalogue import LOSSES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def small_cases(device: str) -> Iterator[tuple[str, check.Case]]:
    """(backend, case) pairs that run every kernel in each layout: several rows per program, one row of odd length, and
    one row too long to stay on chip."""
    for loss in LOSSES:
        for backend in check.runnable(device, loss):
            for classes in (10, 1001, 9001):
                yield backend, check.Case(torch.bfloat16, 5, classes, {"ce_weight": 1.0}, loss=loss)
                yield backend, check.Case(torch.bfloat16, 5, classes, {}, loss=loss, weighted=True)
            yield backend, check.Case(torch.float16, 5, 300, {"ce_weight": 1.0}, soft=True, loss=loss)
            yield backend, check.Case(torch.float64, 5, 300, {"reduction": "sum"}, loss=loss)
        for backend in check.runnable(device, loss):  # rows are counted and reduced in chunks
            yield backend, check.Case(torch.float32, 17000, 4, {}, loss=loss)


def run(backend: str, case: check.Case, device: str, grad_output: float) -> None:
    """Run one call; an incoming gradient other than 1 makes backward scale the stored gradient."""
    student, other, target = case.inputs(device)
    incoming = torch.tensor(grad_output, device=device, dtype=torch.float64 if case.dtype == torch.float64 else None)
    check.evaluate(backend, student, other, target, case.options, incoming, case.loss)


def big_inputs(case: check.Case, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random inputs made on the device, as the CPU would take long for large sizes."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(case.rows, case.classes)] * 2
    if case.loss == "zipf_ls":
        shapes[1] = (case.rows, 4, case.classes)  # type: ignore[assignment]
    student, other = (torch.randn(shape, device=device, dtype=case.dtype, generator=generator) for shape in shapes)
    return student, other, torch.randint(case.classes, (case.rows,), device=device, generator=generator)


@contextlib.contextmanager
def _profiler_range() -> Iterator[None]:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    runtime.cudaProfilerStart()
    yield
    torch.cuda.synchronize()
    runtime.cudaProfilerStop()


def profile_once(backend: str, case: check.Case, device: str) -> None:
    """Warm up, then make one call inside the profiler's range."""
    tensors = big_inputs(case, device)
    for _ in range(2):
        check.evaluate(backend, *tensors, case.options, loss=case.loss)
    with _profiler_range() if device == "cuda" else contextlib.nullcontext():
        check.evaluate(backend, *tensors, case.options, loss=case.loss)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.drive", description=__doc__.split(":")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--loss", choices=LOSSES, help="one call of this loss; default: small calls of every loss")
    parser.add_argument("--backend", help="default: the first that runs on the device")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=21841)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args(argv)
    if args.loss is None:
        for backend, case in small_cases(args.device):
            print(f"{case.loss} {backend} {case.rows}x{case.classes} {case.dtype}", flush=True)
            run(backend, case, args.device, 2.0)
        if args.device == "cuda":
            torch.cuda.synchronize()
        return 0
    here = check.runnable(args.device, args.loss)
    if not here or (args.backend and args.backend not in here):
        parser.error(f"--loss {args.loss}: expected a backend among {', '.join(here) or 'none'}, got {args.backend}")
    case = check.Case(DTYPES[args.dtype], args.rows, args.classes, {}, loss=args.loss)
    profile_once(args.backend or here[0], case, args.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
