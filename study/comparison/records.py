"""Records: one small JSON file per finished run, with its results, its curve and the machine.

The study keeps nothing else. A run with a record is not repeated, whichever machine made it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from study.comparison.plan import Spec, Task
from study.training import checkpoint
from study.training.errors import RunError
from study.training.report import read_table

Record = dict[str, Any]


class Records:
    """The records in a folder: runs by task and :attr:`Spec.key`, teachers by name."""

    def __init__(self, folder: Path, tasks: Mapping[str, Task]) -> None:
        self.folder, self.tasks = folder, tasks
        self.runs: dict[str, dict[str, Record]] = {name: {} for name in tasks}
        self.teachers: dict[str, Record] = {}
        for name, task in tasks.items():
            for path in sorted((folder / name).glob("*.json")):
                self.runs[name][path.stem] = self._read(path, task.setting())
            teacher = folder / "teachers" / f"{task.teacher.name}.json"
            if teacher.is_file():
                self.teachers[task.teacher.name] = self._read(teacher, {"teacher": task.setting()["teacher"]})
        cost = folder / "cost.json"
        self.cost: Record | None = self._load(cost) if cost.is_file() else None

    def of(self, spec: Spec) -> Record | None:
        return self.runs[spec.task].get(spec.key)

    def add(self, spec: Spec, folder: Path) -> None:
        """Record the run in ``folder``."""
        task = self.tasks[spec.task]
        about = {"method": spec.method, "settings": list(spec.settings), "lr": spec.lr, "seed": spec.seed}
        record = {**about, "longer": spec.longer, **_outcome(folder), "setting": task.setting()}
        self._write(self.folder / spec.task / f"{spec.key}.json", record)
        self.runs[spec.task][spec.key] = record

    def add_teacher(self, task: Task, folder: Path) -> None:
        """Record the teacher in ``folder``."""
        record = {**_outcome(folder), "setting": {"teacher": task.setting()["teacher"]}}
        self._write(self.folder / "teachers" / f"{task.teacher.name}.json", record)
        self.teachers[task.teacher.name] = record

    def add_cost(self, cost: Record) -> None:
        """Record the cost of a step."""
        self._write(self.folder / "cost.json", cost)
        self.cost = cost

    @staticmethod
    def _write(path: Path, record: Record) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--records: {path.parent} cannot be made ({error.strerror})") from None
        text = json.dumps(record, indent=1, ensure_ascii=False)
        checkpoint.write(path, lambda file: file.write(f"{text}\n".encode()))

    @staticmethod
    def _load(path: Path) -> Record:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: no record of the study ({type(error).__name__})") from None
        if not isinstance(record, dict):
            raise RunError(f"{path}: no record of the study")
        return record

    def _read(self, path: Path, setting: dict[str, Any]) -> Record:
        record = self._load(path)
        there = record.get("setting", {})
        for name, value in setting.items():
            if there.get(name) != value:
                raise RunError(
                    f"{path}: of a study with another {name} ({there.get(name)}, not {value}); delete the folder, or "
                    "name another with --records"
                )
        return record


def _outcome(folder: Path) -> Record:
    """Results of the finished run in ``folder``, rounded to keep the file small."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    rows = read_table(folder / "epochs.csv")
    splits = list(result["accuracy"])
    about, software = machine.machine(), machine.software()
    return {
        "accuracy": {name: round(result["accuracy"][name], 6) for name in splits},
        "test_loss": {name: round(float(rows[-1][f"test_loss_{name}"]), 6) for name in splits},
        "curve": {
            "training_loss": [round(float(row["loss"]), 5) for row in rows],
            "accuracy": {name: [round(float(row[f"accuracy_{name}"]), 5) for row in rows] for name in splits},
        },
        "parameters": result["parameters"],
        "seconds": round(sum(float(row["seconds"]) for row in rows), 1),
        "peak_memory": result["peak_memory"],
        "data": result["data"][:16],
        "made_with": {
            "cpu": about["cpu"], "cpu_capability": about["cpu_capability"], "torch": software["torch"],
            "python": software["python"], "fused_kd": software["fused_kd"],
            "commit": (software["git_commit"] or "none")[:10],
        },
    }  # fmt: skip
