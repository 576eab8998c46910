"""What a step costs, in a process of its own: ``python -m study.comparison.cost --steps N``, then options of train.py.

Each form of the loss trains a network of its own, in turns, a step each, so that other work on the machine slows all of
them alike. What is written, one line of JSON, are medians over the steps. A teacher has random weights here: its values
change no time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import study

    study.require("study.comparison.cost")

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fused_kd
from study.datasets import registry
from study.datasets.arrays import Dataset
from study.train import Run
from study.training import checkpoint, methods, networks, options
from study.training.batches import Batch
from study.training.engine import TIMED
from study.training.errors import RunError
from study.training.methods import Method, Value
from study.training.networks import Outputs
from study.training.processes import Processes
from study.training.report import Bar

#: Forms of a loss of fused_kd, by name: what --backend is given. "published" is the loss in the operations of its
#: authors' release, which benchmarks/ has.
BACKENDS = {"fused": "auto", "eager": "reference", "published": "reference"}
# The profiler otherwise writes two lines to stderr each time it is used.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

#: Steps before the first one that counts.
WARM_UP = 3


def published(method: Method) -> Method:
    """The same loss as its authors published it, with F.cross_entropy beside it."""
    from benchmarks.forms.providers import LOSSES

    loss = LOSSES[method.name.replace("-", "_")].provider("published").build()

    def call(outputs: Outputs, teacher_logits: Tensor | fused_kd.TopK | None, target: Tensor) -> Value:
        second = {"teacher_logits": teacher_logits, "weak_logits": outputs.weak, "dense_logits": outputs.dense}
        other = second[method.other] if method.other else None
        assert not isinstance(other, fused_kd.TopK), "the published forms take matrices"
        # A loss of the student's logits alone does not look at the others.
        value = loss(outputs.logits, outputs.logits if other is None else other, target)
        value = value + F.cross_entropy(outputs.logits, target)
        return value, {"all": value.detach()}

    return Method(method.name, method.other, call)


class _Form:
    """One form of the loss, its network, and the times of its steps."""

    def __init__(self, name: str, run: Run) -> None:
        if name == "published":
            run.trainer.method = published(run.trainer.method)
        self.run, self.batches, self.count = run, self._endless(), 0
        self.steps: list[float] = []

    def _endless(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            yield from self.run.batches.epoch(epoch, 0)
            epoch += 1

    def step(self) -> None:
        trainer = self.run.trainer
        spent, started = trainer.timing_seconds, time.perf_counter()
        # Of every step that --time-loss measures, so that there are as many times of the loss as of the step.
        trainer.step(next(self.batches), TIMED * self.count + 1)
        elapsed = time.perf_counter() - started - (trainer.timing_seconds - spent)
        self.count += 1
        self.steps.append(elapsed)

    def result(self) -> dict[str, float]:
        """Median seconds, and the memory of one more step."""
        loss = self.run.trainer.loss_seconds[WARM_UP:]
        seconds = {"step": statistics.median(self.steps[WARM_UP:]), "loss": statistics.median(loss)}
        return {**seconds, "memory": self._memory()}

    def _memory(self) -> int:
        """Bytes that a step allocates, at their peak. Weights and momentum are there before it, gradients are not."""
        trainer, batch = self.run.trainer, next(self.batches)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            trainer.step(batch, 0)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiled.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        live = peak = 0
        for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"]):
            live += event["args"]["Bytes"]
            peak = max(peak, live)
        return peak


def measure(arguments: Sequence[str], steps: int, teacher: str | None) -> dict[str, Any]:
    """Times of the forms of the loss that the options of train.py name.

    ``teacher`` is the network of the teacher, where the loss wants one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first = options.parse([*arguments, "--out", str(folder)])
        _check_fused(first.loss)
        where, bar = Processes(0, 1, torch.device("cpu")), Bar(Console(stderr=True), quiet=True)
        dataset = registry.load(first, bar)
        if teacher:
            _save_random(folder / "teacher.safetensors", teacher, dataset)
            arguments = [*arguments, "--teacher", str(folder / "teacher.safetensors")]
        forms = {}
        for name in BACKENDS if first.loss in methods.LOSSES else ("PyTorch",):
            backend = BACKENDS.get(name, "auto")
            args = options.parse([*arguments, "--backend", backend, "--time-loss", "--out", str(folder / name)])
            forms[name] = _Form(name, Run(args, where, replace(dataset), bar))
            forms[name].run.student.train()
        for _ in range(WARM_UP + steps):
            for form in forms.values():
                form.step()
        return {
            "classes": dataset.classes,
            "batch_size": first.batch_size,
            "images": len(dataset.train),
            "threads": torch.get_num_threads(),
            "steps": steps,
            "forms": {name: form.result() for name, form in forms.items()},
        }


def _check_fused(loss: str) -> None:
    """Raises:
    RunError: What is called fused would be the eager reference.
    """
    if loss in methods.LOSSES:
        found = fused_kd.explain("cpu", methods.LOSSES[loss].name)
        if found.chosen == "reference":
            raise RunError(f"--loss {loss}: fused_kd has no kernel to be timed here: {found.reasons['native']}")


def _save_random(path: Path, model: str, dataset: Dataset) -> None:
    description = {
        "model": model, "norm": "batch", "classes": dataset.classes, "channels": dataset.channels,
        "size": dataset.size, "mean": dataset.mean, "std": dataset.std,
    }  # fmt: skip
    network = networks.build(model, **{name: value for name, value in description.items() if name != "model"})  # type: ignore[arg-type]
    checkpoint.save_network(path, network, {**description, "accuracy": 0.0, "epoch": 0, "data": dataset.fingerprint})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m study.comparison.cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="that count, of each form (20)")
    parser.add_argument("--teacher-model", metavar="NAME", help="the network of a teacher, where the loss wants one")
    args, rest = parser.parse_known_args(arguments)
    try:
        print(json.dumps(measure(rest, args.steps, args.teacher_model)))
    except RunError as error:
        print(f"study.comparison.cost: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
