"""Training steps and evaluation."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_kd import TopK
from study.datasets.arrays import Split
from study.training import batches
from study.training.batches import Batch
from study.training.errors import RunError
from study.training.methods import Method
from study.training.network import Network
from study.training.networks import Outputs, Student, to_device
from study.training.processes import Processes

AMP = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
#: With --time-loss, one of this many steps is measured.
TIMED = 8


class Mean:
    """Means of the loss and its parts over some steps, kept on the device until read."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.count = 0

    def add(self, values: Tensor) -> None:
        self.sums = values.clone() if self.sums is None else self.sums + values
        self.count += 1

    def take(self) -> list[float]:
        """Return the means so far and reset."""
        assert self.sums is not None
        means: list[float] = (self.sums / self.count).tolist()
        self.sums, self.count = None, 0
        return means

    def state(self) -> dict[str, Any]:
        return {"sums": None if self.sums is None else self.sums.cpu(), "count": self.count}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = None if state["sums"] is None else state["sums"].to(device)
        self.count = state["count"]


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warmup over a share ``warmup`` of the steps, then half a cosine to zero."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def make_optimizer(student: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW. Matrices and convolutions get weight decay, biases and norms do not."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    decayed = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": args.weight_decay}
    others = {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}
    if args.optimizer == "sgd":
        return torch.optim.SGD([decayed, others], lr=args.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW([decayed, others], lr=args.lr)


class Trainer:
    """A student, its loss and its optimizer.

    Args:
        student: Trained in place.
        teach: Returns the teacher's logits of a batch; None if the loss needs none.
        method: The loss.
        steps: Steps of the whole run, for the learning rate.
        where: This process.
        args: ``amp``, ``accumulate``, ``compile``, ``seed``, and the optimizer's options.
    """

    def __init__(
        self,
        student: Student,
        teach: Callable[[Batch], Tensor | TopK] | None,
        method: Method,
        steps: int,
        where: Processes,
        args: argparse.Namespace,
    ) -> None:
        self.student, self.teach, self.method, self.steps, self.where, self.args = (
            student, teach, method, steps, where, args,
        )  # fmt: skip
        self.optimizer = make_optimizer(student, args)
        self.scaler = torch.amp.GradScaler(where.device.type, enabled=args.amp == "fp16")
        trained: nn.Module = torch.compile(student) if args.compile else student  # type: ignore[assignment]
        if where.world > 1:
            trained = DistributedDataParallel(
                trained, device_ids=[where.device.index] if where.device.index is not None else None
            )
        self.trained = trained
        self.loss_seconds: list[float] = []
        self.timing_seconds = 0.0

    def step(self, batch: Batch, number: int) -> Tensor:
        """Update the weights once. Return the loss and its parts, means over the global batch, on the device."""
        # Random numbers of the network, such as dropout's, depend on the step alone, so a resumed run has the same.
        torch.manual_seed((self.args.seed * 1_000_003 + number) * 4099 + self.where.rank)
        rate = learning_rate(number, self.steps, self.args.lr, self.args.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        pieces = self.args.accumulate
        share = len(batch.inputs) // pieces
        values = torch.zeros((), device=self.where.device)
        for i in range(pieces):
            piece = Batch(*(tensor[i * share : (i + 1) * share] for tensor in batch))
            values = values + self._piece(
                piece, last=i + 1 == pieces, timed=self.args.time_loss and number % TIMED == 1
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return self.where.summed(values / pieces) / self.where.world

    def _piece(self, batch: Batch, last: bool, timed: bool) -> Tensor:
        ddp = self.trained if isinstance(self.trained, DistributedDataParallel) else None
        device = self.where.device
        inputs = to_device(batch.inputs, device)
        target = batch.target.to(device, non_blocking=True)
        if not target.is_floating_point():
            target = target.flatten()  # text (N, L): every position is a row of the loss
        with contextlib.nullcontext() if ddp is None or last else ddp.no_sync():
            with autocast(device, self.args.amp):
                outputs: Outputs = self.trained(inputs)
            teacher_logits = None if self.teach is None else self.teach(batch._replace(inputs=inputs))
            if timed:
                self._time_loss(outputs, teacher_logits, target)
            loss, parts = self.method.call(outputs, teacher_logits, target)
            self.scaler.scale(loss / self.args.accumulate).backward()
        return torch.stack([loss.detach(), *parts.values()])

    def _time_loss(self, outputs: Outputs, teacher_logits: Tensor | TopK | None, target: Tensor) -> None:
        """Measure the loss's forward and its backward to the logits, in calls of their own."""
        begin = time.perf_counter()
        for repeat in range(2):  # the first call is a warm-up: the network may have evicted its data from the caches
            tensors = (None if t is None else t.detach().requires_grad_(t.requires_grad) for t in outputs)
            leaves = Outputs(*tensors)  # type: ignore[arg-type]
            self._synchronize()
            started = time.perf_counter()
            self.method.call(leaves, teacher_logits, target)[0].backward()  # type: ignore[no-untyped-call]
            self._synchronize()
            if repeat:
                self.loss_seconds.append(self.args.accumulate * (time.perf_counter() - started))
        self.timing_seconds += time.perf_counter() - begin

    def _synchronize(self) -> None:
        if self.where.device.type == "cuda":
            torch.cuda.synchronize()


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast in the dtype that ``--amp`` names."""
    return torch.autocast(device.type, AMP[amp] or torch.bfloat16, enabled=AMP[amp] is not None)


def predictor(network: Network, where: Processes, amp: str, compiled: bool) -> Callable[[Tensor], Tensor]:
    """A function from images or tokens to a network's logits, without gradients."""
    called: Callable[[Tensor], Tensor] = torch.compile(network) if compiled else network

    def predict(inputs: Tensor) -> Tensor:
        with torch.no_grad(), autocast(where.device, amp):
            return called(to_device(inputs, where.device))

    return predict


def evaluate(network: Network, split: Split, where: Processes, amp: str) -> tuple[float, float]:
    """Accuracy and mean cross-entropy over all labels of a split; the processes share its rows."""
    was_training = network.training
    predict = predictor(network.eval(), where, amp, compiled=False)
    sums = torch.zeros(2, dtype=torch.float64, device=where.device)
    for _, inputs, classes in batches.plain_batches(split, 512, *where.share(len(split))):
        logits, classes = predict(inputs).float(), classes.to(where.device).flatten()
        sums[0] += (logits.argmax(1) == classes).sum()
        sums[1] += F.cross_entropy(logits, classes, reduction="sum")
    network.train(was_training)
    correct, loss = (where.summed(sums) / split.labels.size).tolist()
    return correct, loss


def check_finite(values: list[float], step: int) -> None:
    """Raises:
    RunError: The loss is NaN or infinite.
    """
    if not all(math.isfinite(value) for value in values):
        raise RunError(f"the loss is not finite at step {step}; try a lower --lr (the last checkpoint is kept)")
