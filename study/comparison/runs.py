"""Training runs in processes of their own, some at a time: what is done already is skipped, what broke off goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from study.comparison.plan import Job
from study.training.errors import RunError
from study.training.report import read_table

ROOT = Path(__file__).resolve().parents[2]
#: The program that a job's options are for.
TRAIN: tuple[str, ...] = (sys.executable, "-m", "study.train")


def done(job: Job) -> bool:
    """The job has its result."""
    return (job.folder / "result.json").is_file()


def environment(threads: int) -> dict[str, str]:
    """That of a process with so many threads, which finds this package."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


class _Process:
    """A job that is running; what it says goes into a file, whose last line says why it failed."""

    def __init__(self, job: Job, threads: int) -> None:
        self.job = job
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
        """It has ended well.

        Raises:
            RunError: It has ended otherwise.
        """
        status = self.process.poll()
        if status is None:
            return False
        if status < 0:
            raise RunError(f"run {self.job.name}: killed by signal {-status}; the same command goes on")
        if status or not done(self.job):
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was said")
            raise RunError(f"run {self.job.name}: ended with status {status}: {last.removeprefix('train.py: ')}")
        return True


def run(jobs: Sequence[Job], parallel: int, threads: int, console: Console) -> None:
    """Make all jobs, ``parallel`` at a time with ``threads`` each, and show how far they are.

    Raises:
        RunError: One of them failed; the others are stopped and can be gone on with.
    """
    waiting = [job for job in jobs if not done(job)]
    finished = {job.name for job in jobs if done(job)}
    running: list[_Process] = []
    total = sum(job.epochs for job in jobs)
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("epochs"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    # Epochs of a teacher and of a student are not equally long, so the speed is that of some minutes.
    with Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=600) as progress:
        task = progress.add_task("runs", total=total, completed=_epochs(jobs))
        try:
            while waiting or running:
                ready = [job for job in waiting if job.after is None or job.after in finished]
                for job in ready[: parallel - len(running)]:
                    waiting.remove(job)
                    running.append(_Process(job, threads))
                ended = [process for process in running if process.check()]
                for process in ended:
                    running.remove(process)
                    finished.add(process.job.name)
                    console.print(f"{process.job.name} done, {len(finished)} of {len(jobs)} runs", highlight=False)
                names = ", ".join(process.job.name for process in running)
                progress.update(task, completed=_epochs(jobs), description=names or "runs")
                if running and not ended:
                    time.sleep(0.5)
        finally:
            for process in running:
                process.stop()


def _epochs(jobs: Sequence[Job]) -> int:
    return sum(len(read_table(job.folder / "epochs.csv")) for job in jobs)
