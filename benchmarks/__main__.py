"""Command line: measure (the default), `plot` and `table` from a result, `soft-labels` from the shipped logits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import report
from benchmarks.cases import DEFAULT_DTYPES, DEFAULT_SHAPES, Case, parse_dtypes, parse_shapes
from benchmarks.providers import LOSSES, Loss, Provider
from benchmarks.run import SCHEMA, Options, failures, run

RESULTS = Path(__file__).parent / "results"
FULL, QUICK = {"seconds": 20.0, "min_rounds": 20}, {"seconds": 3.0, "min_rounds": 5}


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Lets argparse show the parser's own message."""

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
        epilog="Other commands: `plot RESULT.json` draws a PNG, `table RESULT.json` prints Markdown, `soft-labels` "
        "shows what USKD makes of real logits; each has --help.",
    )
    parser.add_argument(
        "--loss", choices=[*LOSSES, "all"], action="append", help="may be given more than once; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="within two minutes on two idle cores; less stable")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--dtype", type=_argument(parse_dtypes), metavar="DTYPE,...", help="default: float32, on a GPU bfloat16,float32"
    )
    parser.add_argument(
        "--cases", type=_argument(parse_shapes), metavar="ROWSxCLASSES,...", help="default: four sizes for the device"
    )
    parser.add_argument("--providers", metavar="NAME,...", help="default: all of each loss")
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        help=f"of timing per case, default {FULL['seconds']:g}, with --quick {QUICK['seconds']:g}",
    )
    parser.add_argument("--threads", type=_positive(int), help="CPU threads, default: PyTorch's choice")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs, default %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--no-plot", action="store_true", help="write the JSON file only")
    return parser


def _plan(
    parser: argparse.ArgumentParser, losses: list[str] | None, names: str | None
) -> dict[Loss, tuple[Provider, ...]]:
    """The losses in the order of LOSSES, and which providers of each."""
    wanted = LOSSES if not losses or "all" in losses else losses
    chosen = [loss for name, loss in LOSSES.items() if name in wanted]
    if names is None:
        return {loss: loss.providers for loss in chosen}
    known = dict.fromkeys(provider.name for loss in chosen for provider in loss.providers)
    picked = [name.strip() for name in names.split(",")]
    for name in picked:
        if name not in known:
            parser.error(f"--providers: expected names among {', '.join(known)}, got {name!r}")
    plan = {loss: tuple(provider for provider in loss.providers if provider.name in picked) for loss in chosen}
    return {loss: providers for loss, providers in plan.items() if providers}


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, else one line per thing done."""
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
    plan = _plan(parser, args.loss, args.providers)
    if args.threads:
        torch.set_num_threads(args.threads)
    shapes, dtypes = args.cases or DEFAULT_SHAPES[device], args.dtype or DEFAULT_DTYPES[device]
    if args.quick and not args.cases and device == "cpu":
        # Every case compiles anew, which takes longer than timing it, and this one is much like 256×1000.
        shapes = tuple(shape for shape in shapes if shape != (1024, 1000))
    cases = [Case(rows, classes, dtype, device) for dtype in dtypes for rows, classes in shapes]
    effort = QUICK if args.quick else FULL
    options = Options(
        seconds=args.seconds or effort["seconds"],
        min_rounds=int(effort["min_rounds"]),
        seed=args.seed,
        quick=args.quick,
    )
    with _progress(Console(stderr=True)) as progress:
        result = run(plan, cases, options, progress)

    # Piped output has no width of its own; 100 columns hold the tables.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=100)
    report.print_result(result, console)
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
        from benchmarks.plot import plot

        plot(result, path)
    except (ImportError, ValueError) as error:  # no matplotlib, or no published form among the providers
        console.print(f"no plot: {error}", markup=False)
    else:
        console.print(str(path), soft_wrap=True)


def save(result: dict[str, Any], folder: Path) -> Path:
    """Writes the result under a name that says what, on what, when and at which commit."""
    device, losses = "+".join(report.devices(result)), "+".join(part["loss"] for part in result["losses"])
    moment = result["date"][:19].replace(":", "").replace("-", "")
    commit = (result["software"]["git_commit"] or "uncommitted")[:10]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{losses}-{device}-{moment}-{commit}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load(path: Path) -> dict[str, Any]:
    """Reads a result; raises ValueError that says what is wrong with the file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"expected a JSON file, got {path}") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"expected a benchmark result of schema {SCHEMA}, got {path}")
    return result


def _plot(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description="Draws a result as a PNG.")
    parser.add_argument("result", type=_argument(lambda text: (Path(text), load(Path(text)))), metavar="RESULT.json")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="default: beside the result")
    args = parser.parse_args(argv)
    source, result = args.result
    path = args.output or source.with_suffix(".png")
    from benchmarks.plot import plot

    try:
        plot(result, path)
    except ValueError as error:
        parser.error(str(error))
    print(path)
    return 0


def _table(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks table", description="Prints a result as Markdown.")
    parser.add_argument("result", type=_argument(lambda text: load(Path(text))), metavar="RESULT.json")
    parser.add_argument(
        "--update", type=Path, metavar="README.md", help=f"write it between {report.BEGIN} and {report.END} instead"
    )
    args = parser.parse_args(argv)
    block = report.markdown(args.result)
    if args.update is None:
        print(block)
        return 0
    try:
        changed = report.update_readme(args.update, block)
    except (OSError, ValueError) as error:
        parser.error(f"--update: {error}")
    print(f"{args.update}: {'updated' if changed else 'up to date'}")
    return 0


def _soft_labels(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks soft-labels",
        description="What USKD makes of the shipped logits: the target's label and the top Zipf labels, table and PNG.",
    )
    parser.add_argument("--photos", metavar="NAME,...", help="names in data/README.md; default: five of them")
    parser.add_argument("--top", type=_positive(int), default=6, help="classes beside the target, default %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS / "soft-labels.png", metavar="FILE.png")
    args = parser.parse_args(argv)
    from benchmarks import soft_labels

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


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"run": _run, "plot": _plot, "table": _table, "soft-labels": _soft_labels}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return _run(arguments)


if __name__ == "__main__":
    sys.exit(main())
