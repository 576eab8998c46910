"""docs/study.md and its plots, made of the results alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from examples import checkpoint


def read(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def write(path: Path, results: dict[str, Any]) -> None:
    text = json.dumps(results, indent=1, ensure_ascii=False)
    checkpoint.write(path, lambda file: file.write(f"{text}\n".encode()))


def make(results: dict[str, Any], path: Path) -> list[Path]:
    return []
