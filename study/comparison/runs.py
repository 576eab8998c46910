"""Training runs in parallel processes: runs with a record are skipped, interrupted ones continue."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from study.comparison.plan import Job, Spec, Task, needs_teacher, student_job, teacher_job
from study.comparison.records import Records
from study.training.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
#: The program that runs a job's options.
TRAIN: tuple[str, ...] = (sys.executable, "-m", "study.train")


def done(job: Job) -> bool:
    """Whether the job has its result."""
    return (job.folder / "result.json").is_file()


def environment(threads: int) -> dict[str, str]:
    """Environment of a process with this many threads that can import this package."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


@dataclass(frozen=True)
class _Todo:
    """A process to start, and the record of its result: a student's, or without ``spec`` a teacher's."""

    job: Job
    task: Task
    spec: Spec | None


class _Process:
    """A running job; its output goes to a log, with the reason of a failure in the last line."""

    def __init__(self, todo: _Todo, threads: int) -> None:
        self.todo, job = todo, todo.job
        job.folder.mkdir(parents=True, exist_ok=True)
        self.log = job.folder / "log.txt"
        with self.log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [*TRAIN, *job.options], stdout=file, stderr=subprocess.STDOUT, env=environment(threads)
            )

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()

    def check(self) -> bool:
        """Whether the job has succeeded; False while it runs.

        Raises:
            RunError: The job failed.
        """
        status = self.process.poll()
        if status is None:
            return False
        if status < 0:
            raise RunError(f"run {self.todo.job.name}: killed by signal {-status}; the same command continues")
        if status or not done(self.todo.job):
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
            raise RunError(f"run {self.todo.job.name}: ended with status {status}: {last.removeprefix('train.py: ')}")
        return True


class Study:
    """The remaining work for a list of runs that grows with the records."""

    def __init__(
        self, tasks: Mapping[str, Task], records: Records, out: Path, cache: Path, wanted: Callable[[], Sequence[Spec]]
    ) -> None:
        self.tasks, self.records, self.out, self.cache, self.wanted = tasks, records, out, cache, wanted

    def missing(self) -> list[Spec]:
        return [spec for spec in self.wanted() if self.records.of(spec) is None]

    def next(self, specs: Sequence[Spec], running: set[str]) -> _Todo | None:
        """The first run that can start now; a teacher comes before its students."""
        for spec in specs:
            task = self.tasks[spec.task]
            job = student_job(task, spec, self.cache, self.out)
            if job.name in running:
                continue
            if not needs_teacher(spec):
                return _Todo(job, task, spec)
            teacher = teacher_job(task, self.cache, self.out)
            if done(teacher):
                return _Todo(job, task, spec)
            if teacher.name not in running:
                return _Todo(teacher, task, None)
        return None

    def record(self, todo: _Todo) -> None:
        if todo.spec is None:
            self.records.add_teacher(todo.task, todo.job.folder)
        else:
            self.records.add(todo.spec, todo.job.folder)


def run(study: Study, parallel: int, threads: int, console: Console) -> None:
    """Make all missing runs, ``parallel`` at a time with ``threads`` each, and show the progress.

    Raises:
        RunError: A run failed; the others are stopped and can be resumed.
    """
    running: list[_Process] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("runs"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    ready = 0
    # Runs of different tasks are not equally long, so the speed is averaged over twenty minutes.
    with Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=1200) as progress:
        shown = progress.add_task("runs")
        try:
            while True:
                missing = study.missing()
                while len(running) < parallel:
                    todo = study.next(missing, {process.todo.job.name for process in running})
                    if todo is None:
                        break
                    running.append(_Process(todo, threads))
                if not running:
                    break
                names = ", ".join(process.todo.job.name for process in running)
                progress.update(shown, completed=ready, total=ready + len(missing), description=names)
                while not (ended := [process for process in running if process.check()]):
                    time.sleep(0.5)
                for process in ended:
                    running.remove(process)
                    study.record(process.todo)
                    ready += process.todo.spec is not None
                    console.print(f"{process.todo.job.name} done, {ready} of {ready + len(study.missing())} runs",
                                  highlight=False)  # fmt: skip
        finally:
            for process in running:
                process.stop()
