"""Stands in for the package rich where that is not installed: the few things of it that this project's commands use,
as plain text. tools/gpu/check.py puts a copy named rich.py onto the path of the commands that it runs.
"""

from __future__ import annotations

import sys
from typing import Any


class Console:
    is_terminal = False

    def __init__(self, *, stderr: bool = False, width: int | None = None, **style: Any) -> None:
        self.stderr, self.width = stderr, width or 80

    def print(self, *things: Any, **style: Any) -> None:
        print(*things, file=sys.stderr if self.stderr else sys.stdout, flush=True)


class Table:
    def __init__(self, title: str | None = None, **style: Any) -> None:
        self.title = title
        self.rows: list[tuple[str, ...]] = [()]
        self.right: list[bool] = []

    def add_column(self, header: str = "", *, justify: str = "left", **style: Any) -> None:
        self.rows[0] += (header.replace("\n", " "),)
        self.right.append(justify == "right")

    def add_row(self, *cells: str, style: str | None = None) -> None:
        self.rows.append(cells)

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, self.right, strict=True)
            ).rstrip()
            for row in self.rows
        ]
        return "\n".join([*([self.title] if self.title else []), *lines])


class Progress:
    """Shows nothing: what runs without a terminal says what it does by itself."""

    def __init__(self, *columns: Any, **options: Any) -> None: ...

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def add_task(self, description: str = "", total: float | None = None) -> int:
        return 0

    def advance(self, task: int, by: float = 1) -> None: ...

    def update(self, task: int, **changes: Any) -> None: ...


class Column:
    def __init__(self, text: str = "") -> None: ...


BarColumn = MofNCompleteColumn = TextColumn = TimeElapsedColumn = Column


class box:
    SIMPLE_HEAD = None


if __name__ == "rich":
    for _part in ("box", "console", "progress", "table"):
        sys.modules[f"rich.{_part}"] = sys.modules["rich"]
