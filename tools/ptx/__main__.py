"""``python -m tools.ptx report``, ``model`` and ``host``: counts the accesses and instructions of compiled kernels,
finds the resource of a GPU that bounds them, and times calls on the host."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fused_kd.core.catalogue import LOSSES, ROW_LOSSES

BEGIN, END = "<!-- ptx:begin -->", "<!-- ptx:end -->"
MODEL_BEGIN, MODEL_END = "<!-- model:begin -->", "<!-- model:end -->"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.ptx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report_parser = commands.add_parser("report", help="bytes, instructions, shuffles and barriers of each kernel")
    report_parser.add_argument("--sm", type=int, default=90, help="compute capability to compile for (%(default)s)")
    report_parser.add_argument(
        "--quick", action="store_true", help="the page's table: bfloat16 alone, a short row and a long odd one"
    )
    model_parser = commands.add_parser("model", help="which resource bounds each kernel on sm_80, sm_90 and sm_100")
    host_parser = commands.add_parser(
        "host", help="microseconds of a call on the host, with a driver that does nothing"
    )
    for each in (report_parser, model_parser, host_parser):
        each.add_argument("--loss", choices=list(LOSSES), action="append", help="may be repeated; default: all")
    for each in (report_parser, model_parser):
        each.add_argument(
            "--update", type=Path, metavar="PAGE", help="write the table into this page, such as docs/kernels.md"
        )
    options = parser.parse_args(arguments)
    return {"report": _report, "model": _model, "host": _host}[options.command](options)


def _host(options: argparse.Namespace) -> int:
    from tools.ptx import host

    host.install()
    print("loss            N×C         launches   forward   and backward, us (medians)")
    cases = [(loss, rows, "") for loss in options.loss or list(LOSSES) for rows in (64, 3000)]
    cases += [(loss, 64, kind) for loss in options.loss or ["kd"] for kind in host.KINDS]
    for loss, rows, kind in cases:
        if kind == "topk" and not (loss in ROW_LOSSES and ROW_LOSSES[loss].rests):
            continue
        found = host.measure(loss, rows, 1000, kind=kind)
        print(f"{loss:9} {kind:6}{rows:5}×1000 {found.launches:9} {found.forward:9.1f} {found.both:9.1f}")
    return 0


def _model(options: argparse.Namespace) -> int:
    from tools.ptx import model
    from tools.ptx.triton import driver

    driver.install()
    known = model.measured()
    rows = []
    console = Console(width=None if sys.stdout.isatty() else 250)
    for call in track(list(model.calls(options.loss or list(LOSSES))), console=Console(stderr=True)):
        rows += model.rows_of(call, list(model.GPUS), known)
    table = Table(*model.HEADER, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if options.update:
        from benchmarks.show.report import lines, replace_block

        shown = [row for row in rows if row[0].split(": ")[1] not in model.SMALL]
        align = ["---", "---", *["---:"] * 8, *["---"] * len(model.GPUS), "---:"]
        replace_block(options.update, MODEL_BEGIN, MODEL_END, lines([list(model.HEADER), align, *shown]))
    return 0


def _report(options: argparse.Namespace) -> int:
    from tools.ptx import report
    from tools.ptx.triton import driver

    driver.install(options.sm)
    readings: list[report.Reading] = []
    console = Console(width=None if sys.stdout.isatty() else 200)
    for call in track(list(report.calls(options.loss or list(LOSSES), options.quick)), console=Console(stderr=True)):
        readings += report.read(call)
    table = Table(*report.HEADER, box=box.SIMPLE_HEAD)
    for reading in readings:
        table.add_row(*report.cells(reading), style="bold" if reading.more else None)
    console.print(table)
    more = sum(reading.more for reading in readings)
    console.print(f"{more} of {len(readings)} request over 5 % more than the page states (bold)" if more else "")
    if options.update:
        from benchmarks.show.report import replace_block

        replace_block(options.update, BEGIN, END, report.markdown(readings, options.sm))
    return 0


if __name__ == "__main__":
    sys.exit(main())
