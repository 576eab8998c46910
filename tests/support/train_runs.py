"""A tiny data set for the tests of study/train.py; run with options it is that program, on these
data, and with ``cost`` before them study/comparison/cost.py."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from study import train  # noqa: E402
from study.datasets import registry  # noqa: E402
from study.datasets.arrays import Dataset, Split  # noqa: E402
from study.training import checkpoint, options  # noqa: E402

CLASSES, SIZE = 20, 16
#: One epoch is 8 steps.
SMALL = ("--model", "cnn-tiny", "--epochs", "2", "--batch-size", "16", "--log-steps", "1", "--quiet")


def tiny(classes=CLASSES, train_images=128, seed=0):
    """Noisy pictures of a random pattern for each class."""
    draws = np.random.default_rng(seed)
    patterns = draws.integers(0, 256, (classes, 1, SIZE, SIZE))

    def split(n):
        labels = draws.permutation(np.arange(n) % classes)
        noise = draws.normal(0, 20, (n, 1, SIZE, SIZE))
        return Split(np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8), labels.astype(np.int64))

    tests = {"test": split(40), "other": split(30)}
    return Dataset("tiny", split(train_images), tests, classes, (0.5,), (0.3,), f"tiny-{classes}-{seed}", {})


@contextlib.contextmanager
def here():
    """Runs in this process are of the tiny data, and of one thread, as those in processes of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(registry, "load", lambda args, bar: tiny())
        yield
    torch.set_num_threads(threads)


def run(*arguments):
    """A small run in this process, to be made :func:`here`."""
    return train.run(options.parse([*SMALL, *map(str, arguments)]))


def command(*options, processes=1):
    """The program's command line, by torchrun where there are more processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else ()), __file__, *map(str, options)]


def start(*options, processes=1, **environment):
    """The program in a process of its own, or by torchrun in several, one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    line = command(*options, processes=processes)
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)


def kill_in_save(number):
    """Make this process die by SIGKILL in its save number ``number``, between writing the file and renaming it."""
    write, saves = Path.replace, 0

    def replace(self, target):
        nonlocal saves
        saves += str(target).endswith("last.pt")
        if saves == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, target)

    Path.replace = replace


def kill_at_step(number):
    """Make this process die by SIGKILL when it begins step ``number``."""
    step = train.Trainer.step

    def doomed(self, batch, now):
        if now == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, now)

    train.Trainer.step = doomed


def same(first, second):
    """Equal bit for bit: tensors, and what is made of them."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def state(folder):
    """The last checkpoint of a run, without its times."""
    state = checkpoint.load(folder / "last.pt", train.STATE)
    del state["seconds"]
    return state


if __name__ == "__main__":
    torch.set_num_threads(1)
    registry.load = lambda args, bar: tiny()
    if sys.argv[1:2] == ["cost"]:
        from study.comparison import cost

        sys.exit(cost.main(sys.argv[2:]))
    if "KILL_AT_STEP" in os.environ:
        kill_at_step(int(os.environ["KILL_AT_STEP"]))
    if "KILL_IN_SAVE" in os.environ:
        kill_in_save(int(os.environ["KILL_IN_SAVE"]))
    train.leave(train.main([*SMALL, *sys.argv[1:]]))
