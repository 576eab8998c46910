"""Command line: measures by default; other commands draw, print and compare results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if _missing := [name for name in ("torch", "rich", "numpy") if find_spec(name) is None]:
    sys.exit(
        f"benchmarks: not installed: {', '.join(_missing)}; "
        "run `python -m pip install --editable '.[bench]'` in fused_kd's folder"
    )

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.forms.providers import HEADLINE, LOSSES
from benchmarks.forms.spec import OURS, Loss
from benchmarks.measure.caches import REGIMES
from benchmarks.measure.cases import DEFAULT_DTYPES, Case, Shapes, parse_dtypes, parse_shapes
from benchmarks.measure.run import EXTRAS, Options, Work, failures, run
from benchmarks.show import overview, pages, report, terminal
from benchmarks.show.stored import load

RESULTS = Path(__file__).parent / "results"
FULL, QUICK = {"seconds": 20.0, "min_rounds": 20}, {"seconds": 3.0, "min_rounds": 5}
QUICK_SECONDS = 27.0  # at most this much timing, shared among the cases


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap a parser so that argparse shows its message."""

    def wrapped(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return wrapped


def _positive(kind: Callable[[str], float]) -> Callable[[str], Any]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
        return value

    return parse


def _run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times fused_kd against other forms of the same loss, after checking all of them against float64.",
        epilog="Other commands: `plot RESULT.json` draws a PNG, `table RESULT.json` prints Markdown, `guard` compares "
        "with committed results, `soft-labels` shows USKD's labels for real logits, `--source head` (or topk, shard) "
        "measures alternatives to logits; each has --help.",
    )
    parser.add_argument(
        "--loss", choices=[*LOSSES, "all"], action="append", help="may be repeated; default: nkd and uskd"
    )
    parser.add_argument(
        "--quick", action="store_true", help="NKD and USKD within three minutes on two idle cores; less stable"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument(
        "--dtype", type=_argument(parse_dtypes), metavar="DTYPE,...", help="default: float32, on a GPU bfloat16,float32"
    )
    parser.add_argument(
        "--cases", type=_argument(parse_shapes), metavar="ROWSxCLASSES,...", help="default: per loss and device"
    )
    parser.add_argument(
        "--caches", choices=REGIMES, help="cold: other eager work before each call; hot: back to back; default: both"
    )
    parser.add_argument("--providers", metavar="NAME,...", help="default: all providers of each loss")
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        help="timing per case and state of the caches, "
        f"default {FULL['seconds']:g}, with --quick {QUICK['seconds']:g} or less",
    )
    parser.add_argument("--threads", type=_positive(int), help="CPU threads, default: PyTorch's choice")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs, default %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--no-plot", action="store_true", help="write the JSON file only")
    return parser


def _plan(parser: argparse.ArgumentParser, args: argparse.Namespace, device: str) -> list[Work]:
    """Losses in the order of LOSSES, each with its providers and cases."""
    wanted: Sequence[str] = args.loss or HEADLINE
    if "all" in wanted:
        wanted = tuple(LOSSES)
    chosen = [loss for name, loss in LOSSES.items() if name in wanted]
    known = dict.fromkeys(provider.name for loss in chosen for provider in loss.providers)
    picked = [name.strip() for name in args.providers.split(",")] if args.providers else list(known)
    for name in picked:
        if name not in known:
            parser.error(f"--providers: expected names among {', '.join(known)}, got {name!r}")
    plan = []
    for loss in chosen:
        providers = tuple(provider for provider in loss.providers if provider.name in picked)
        shapes = args.cases or loss.shapes[device]
        if args.quick:
            shapes = _quick(loss, shapes, device, args)
        dtypes = args.dtype or DEFAULT_DTYPES[device]
        cases = [Case(rows, classes, dtype, device) for dtype in dtypes for rows, classes in shapes]
        if providers:
            plan.append(Work(loss, providers, cases))
    return plan


def _quick(loss: Loss, shapes: Shapes, device: str, args: argparse.Namespace) -> Shapes:
    """Cases that fit into three minutes for the headline losses; --cases overrides them."""
    if not args.cases and device == "cpu":
        # 1024×1000 behaves like 256×1000; for losses outside the headline two sizes are enough.
        left_out = {(1024, 1000)} if loss.name in HEADLINE else {(1024, 1000), (32, 128256)}
        shapes = tuple(shape for shape in shapes if shape not in left_out)
    return shapes


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on a terminal, else one line per step."""
    if not console.is_terminal:
        last = ""

        def line(text: str, share: float) -> None:
            nonlocal last
            if text != last:
                print(f"[{share:4.0%}] {text}", file=sys.stderr, flush=True)
            last = text

        yield line
        return
    columns = (TextColumn("{task.description:<44}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda text, share: progress.update(task, description=text, completed=share)


def _run(argv: Sequence[str]) -> int:
    parser = _run_parser()
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no GPU")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output: expected a folder, got the file {args.output}")
    plan = _plan(parser, args, device)
    for loss, providers, _ in plan:  # fail early, not after minutes of other measurements
        ours = next((provider for provider in providers if provider.name == OURS), None)
        if ours is not None and (reason := ours.unavailable(device)):
            print(f"error: {loss.name}: fused_kd has no kernel to be timed here: {reason}", file=sys.stderr)
            return 1
    if args.threads:
        torch.set_num_threads(args.threads)
    effort = QUICK if args.quick else FULL
    if args.quick:
        regimes = 1 if args.caches else len(REGIMES)
        shared = QUICK_SECONDS / max(1, sum(len(work.cases) for work in plan)) / regimes
        effort = {**effort, "seconds": min(effort["seconds"], shared)}
    options = Options(
        seconds=args.seconds or effort["seconds"],
        min_rounds=int(effort["min_rounds"]),
        seed=args.seed,
        quick=args.quick,
        caches=(args.caches,) if args.caches else REGIMES,
        extras=() if args.cases or args.dtype or args.providers else EXTRAS,
    )
    with _progress(Console(stderr=True)) as progress:
        result = run(plan, options, progress)

    # Piped output has no width; the tables need 100 columns.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=100)
    terminal.print_result(result, console)
    path = save(result, args.output)
    console.print(f"\n{path}", soft_wrap=True)
    if not args.no_plot:
        _plot_or_explain(result, path.with_suffix(".png"), console)
    problems = failures(result)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _plot_or_explain(result: dict[str, Any], path: Path, console: Console) -> None:
    try:
        _draw(result, path)
    except (ImportError, ValueError) as error:  # no matplotlib, or the published form was not measured
        console.print(f"no plot: {error}", markup=False)
    else:
        console.print(str(path), soft_wrap=True)


def _draw(result: dict[str, Any], path: Path) -> None:
    """Draw a panel for each loss, or one chart if there are many."""
    from benchmarks.show.plot import PANELS, plot

    if len(result["losses"]) > PANELS:
        overview.plot(result, path)
    else:
        plot(result, path)


def save(result: dict[str, Any], folder: Path) -> Path:
    names = [part["loss"] for part in result["losses"]]
    return report.save(result, "all" if names == list(LOSSES) else "+".join(names), folder)


def _chosen(result: dict[str, Any], losses: list[str] | None) -> dict[str, Any]:
    """The result, restricted to some of its losses."""
    measured = [part["loss"] for part in result["losses"]]
    for name in losses or []:
        if name not in measured:
            raise ValueError(f"expected losses among {', '.join(measured)}, got {name!r}")
    return {**result, "losses": [part for part in result["losses"] if not losses or part["loss"] in losses]}


def _result_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {command}", description=description)
    parser.add_argument("result", type=_argument(lambda text: (Path(text), load(Path(text)))), metavar="RESULT.json")
    parser.add_argument("--loss", action="append", metavar="NAME", help="only this loss; may be repeated")
    return parser


def _plot(argv: Sequence[str]) -> int:
    parser = _result_parser("plot", "Draws a result as a PNG.")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="default: next to the result")
    args = parser.parse_args(argv)
    source, result = args.result
    path = args.output or source.with_suffix(".png")
    try:
        _draw(_chosen(result, args.loss), path)
    except ValueError as error:
        parser.error(str(error))
    print(path)
    return 0


def _table(argv: Sequence[str]) -> int:
    parser = _result_parser("table", "Prints a result as Markdown.")
    parser.add_argument("--details", action="store_true", help="everything instead of the small table")
    parser.add_argument(
        "--update",
        type=Path,
        metavar="FILE.md",
        help=f"write the table after {pages.HEADLINE_MARKS[0]}, with --details after {pages.DETAILS_MARKS[0]}",
    )
    args = parser.parse_args(argv)
    make, marks = (pages.details, pages.DETAILS_MARKS) if args.details else (pages.headline, pages.HEADLINE_MARKS)
    try:
        block = make(_chosen(args.result[1], args.loss))
    except ValueError as error:
        parser.error(str(error))
    if args.update is None:
        print(block)
        return 0
    try:
        changed = report.replace_block(args.update, *marks, block)
    except (OSError, ValueError) as error:
        parser.error(f"--update: {error}")
    print(f"{args.update}: {'updated' if changed else 'up to date'}")
    return 0


def _soft_labels(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks soft-labels",
        description="Shows USKD's labels for the shipped logits: the target's and the top Zipf labels, table and PNG.",
    )
    parser.add_argument("--photos", metavar="NAME,...", help="names in data/README.md; default: five of them")
    parser.add_argument("--top", type=_positive(int), default=6, help="other classes to show, default %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS / "soft-labels.png", metavar="FILE.png")
    args = parser.parse_args(argv)
    from benchmarks.forms import soft_labels

    try:
        photos = soft_labels.collect(args.photos.split(",") if args.photos else soft_labels.PHOTOS, args.top)
    except ValueError as error:
        parser.error(str(error))
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=100)
    soft_labels.print_table(photos, console)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        soft_labels.plot(photos, args.output)
    except ImportError as error:
        console.print(f"no plot: {error}", markup=False)
    else:
        console.print(str(args.output), soft_wrap=True)
    return 0


def _scale(argv: Sequence[str]) -> int:
    from benchmarks.sources import scale

    return scale.main(argv)


def _guard(argv: Sequence[str]) -> int:
    from benchmarks import guard

    return guard.main(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "run": _run,
        "plot": _plot,
        "table": _table,
        "soft-labels": _soft_labels,
        "scale": _scale,
        "guard": _guard,
    }
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    if any(argument.partition("=")[0] == "--source" for argument in arguments):
        from benchmarks.sources import cli

        return cli.main(arguments, _progress)
    return _run(arguments)


if __name__ == "__main__":
    sys.exit(main())
