"""Cost of a training step: ``python -m study.comparison.cost --steps N``, then options of train.py.

Each form of the loss trains a network of its own. The forms take turns, one step each, so that other work on the
machine slows all alike. The output is one line of JSON with medians over the steps. A teacher has random weights, which
does not change the times.
"""

from __future__ import annotations

import argparse
import json
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
from benchmarks.measure.timing import ALLOCATION, trace_events
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

#: Forms of a loss and their --backend. "published" has the operations of the authors' release, from benchmarks/.
BACKENDS = {"fused": "auto", "eager": "reference", "published": "reference"}
#: Steps before the first one that counts.
WARM_UP = 3


def published(method: Method) -> Method:
    """The same loss in its published form, plus F.cross_entropy."""
    from benchmarks.forms.providers import LOSSES

    loss = LOSSES[method.name.replace("-", "_")].provider("published").build()

    def call(outputs: Outputs, teacher_logits: Tensor | fused_kd.TopK | None, target: Tensor) -> Value:
        second = {"teacher_logits": teacher_logits, "weak_logits": outputs.weak, "dense_logits": outputs.dense}
        other = second[method.other] if method.other else None
        assert not isinstance(other, fused_kd.TopK), "the published forms take matrices"
        # A loss of the student's logits alone ignores the second argument.
        value = loss(outputs.logits, outputs.logits if other is None else other, target)
        value = value + F.cross_entropy(outputs.logits, target)
        return value, {"all": value.detach()}

    return Method(method.name, method.other, call)


class _Form:
    """A form of the loss, with its network and the times of its steps."""

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
        # This step number makes --time-loss measure the loss in every step.
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
        """Peak bytes that a step allocates: gradients, but not weights and momentum, which exist before it."""
        trainer, batch = self.run.trainer, next(self.batches)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            trainer.step(batch, 0)
        live = peak = 0
        for event in trace_events(profiled, ALLOCATION):
            live += event["args"]["Bytes"]
            peak = max(peak, live)
        return peak


def measure(arguments: Sequence[str], steps: int, teacher: str | None) -> dict[str, Any]:
    """Measure all forms of the loss that the options of train.py name; ``teacher`` is the teacher's model, if any."""
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
    RunError: The fused form would run the eager reference.
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
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each form (20)")
    parser.add_argument("--teacher-model", metavar="NAME", help="the teacher's model, if the loss needs a teacher")
    args, rest = parser.parse_known_args(arguments)
    try:
        print(json.dumps(measure(rest, args.steps, args.teacher_model)))
    except RunError as error:
        print(f"study.comparison.cost: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
