"""``python -m tools.ptx report``: what compiled kernels read, write and issue."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fused_kd.core.catalogue import LOSSES

BEGIN, END = "<!-- ptx:begin -->", "<!-- ptx:end -->"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.ptx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report_parser = commands.add_parser("report", help="bytes, instructions, shuffles and barriers of each kernel")
    report_parser.add_argument("--loss", choices=list(LOSSES), action="append", help="default: all of them")
    report_parser.add_argument("--sm", type=int, default=90, help="compute capability to compile for (%(default)s)")
    report_parser.add_argument(
        "--quick", action="store_true", help="bfloat16 alone, a short and a long odd row: the page's table"
    )
    report_parser.add_argument(
        "--update", type=Path, metavar="PAGE", help="put the table into a page, such as docs/kernels.md"
    )
    options = parser.parse_args(arguments)

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
    console.print(f"{more} of {len(readings)} ask for more than the page says by over 5 % (bold)" if more else "")
    if options.update:
        from benchmarks.show.report import replace_block

        replace_block(options.update, BEGIN, END, report.markdown(readings, options.sm))
    return 0


if __name__ == "__main__":
    sys.exit(main())
