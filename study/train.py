"""Train a network with a loss of fused_kd: the paper's experiment in small.

    python study/train.py --model cnn-large --out runs/teacher
    python study/train.py --loss nkd --teacher runs/teacher/best.safetensors --out runs/nkd
    python study/train.py --loss uskd --out runs/uskd

Each run writes into its folder: ``best.safetensors`` (the network of the best epoch on the first test set, so this
accuracy is optimistic), ``last.pt`` (all that ``--resume`` needs), ``steps.csv``, ``epochs.csv`` and ``curves.png``. On
the CPU a resumed run gives the same bits as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    import study

    study.require("train.py")

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor, distributed, nn

from fused_kd import TopK
from study.datasets import registry
from study.datasets.arrays import Dataset
from study.training import checkpoint, methods, networks, options, teacher_cache
from study.training.batches import Augmentation, Batch, Batches
from study.training.engine import Mean, Trainer, check_finite, evaluate, predictor
from study.training.errors import RunError
from study.training.network import Network
from study.training.processes import Processes, leave, processes
from study.training.report import Bar, Table, TensorBoard, plot_curves, read_table

STATE = ("run", "step", "student", "optimizer", "scaler", "means", "best", "seconds")


@dataclass(frozen=True)
class Result:
    """Result of a finished run.

    ``accuracy``: by test split, after the last epoch. ``best``: the same after the best epoch on the first split.
    ``epoch_seconds``: median training time of an epoch, without tests. ``loss_share``: share of it in the loss's
    forward and its backward to the logits (None without ``--time-loss``). ``peak_memory``: bytes, on CUDA of tensors,
    else of the process. ``data``: the data set's fingerprint.
    """

    accuracy: dict[str, float]
    best: dict[str, float]
    best_epoch: int
    epochs: int
    epoch_seconds: float
    samples_per_second: float
    loss_share: float | None
    peak_memory: int
    parameters: int
    data: str


class Run:
    """One run and its folder: its state, its epochs and its logs."""

    def __init__(self, args: argparse.Namespace, where: Processes, dataset: Dataset, bar: Bar) -> None:
        self.args, self.where, self.data, self.bar = args, where, dataset, bar
        _check_batch(args, where, dataset)
        if where.first:
            _claim(args)
        where.wait()
        teacher = checkpoint.load_teacher(args.teacher, dataset) if args.teacher else None
        self.teacher = checkpoint.weights_hash(teacher) if teacher else None
        group = distributed.group.WORLD if where.world > 1 else None
        method = methods.build(args.loss, args.set, args.backend, group)
        _check_teacher(args, method)
        self.description = {
            "model": args.model, "norm": args.norm, "classes": dataset.classes, "channels": dataset.channels,
            "size": dataset.size, "mean": dataset.mean, "std": dataset.std,
        }  # fmt: skip
        networks.check_data(args.model, dataset.text)
        torch.manual_seed(args.seed)
        network = networks.build(args.model, **{k: v for k, v in self.description.items() if k != "model"})
        self.student = networks.Student(
            network, dataset.classes, weak=method.other == "weak_logits", dense=method.other == "dense_logits"
        )
        if where.world > 1 and where.device.type == "cuda":
            self.student = nn.SyncBatchNorm.convert_sync_batchnorm(self.student)  # type: ignore[no-untyped-call]
        networks.place(self.student, where.device)
        self.parts = methods.check(method, dataset.classes, where.device)
        augmentation = Augmentation(args.shift, args.flip, args.mixup, args.cutmix)
        self.batches = Batches(
            dataset.train, dataset.classes, args.batch_size, augmentation, args.seed, where.rank, where.world
        )
        self.steps = args.epochs * len(self.batches)
        teach = self._teaching(teacher, self.teacher, args.loss) if teacher and self.teacher else None
        self.trainer = Trainer(self.student, teach, method, self.steps, where, args)
        self.step, self.best, self.seconds = 0, {"accuracy": -1.0, "epoch": 0}, 0.0
        self.interval, self.epoch_mean = Mean(), Mean()
        if args.resume and (args.out / "last.pt").exists():
            self._restore()

    def _teaching(self, teacher: Network, weights: str, loss: str) -> Callable[[Batch], Tensor | TopK]:
        args, where = self.args, self.where
        networks.place(teacher, where.device)
        predict = predictor(teacher, where, args.amp, args.compile)
        if args.cache_teacher is None:
            return lambda batch: predict(batch.inputs)
        cache = where.first_then_others(
            lambda: teacher_cache.open_cache(
                args.cache_teacher, self.data, weights, args.cache_top_k,
                lambda images: predict(images).cpu(), self.bar,
            )
        )  # fmt: skip
        return lambda batch: cache.source(batch.rows, where.device, loss)

    def _identity(self) -> str:
        own = {
            "the data set": self.data.fingerprint,
            "the number of processes": self.where.world,
            "the teacher": self.teacher,
            "the use of --cache-teacher": self.args.cache_teacher is not None,
        }
        return json.dumps({**options.identity(self.args), **own})

    def _restore(self) -> None:
        path = self.args.out / "last.pt"
        state = checkpoint.load(path, STATE)
        there, here = json.loads(state["run"]), json.loads(self._identity())
        for name in here:
            if there.get(name) != here[name]:
                was, now = (str(value)[:16] for value in (there.get(name), here[name]))
                raise RunError(f"--resume: {path} is of a run with other options: {name} was {was}, is {now}")
        try:
            self.student.load_state_dict(state["student"])
            self.trainer.optimizer.load_state_dict(state["optimizer"])
            self.trainer.scaler.load_state_dict(state["scaler"])
            self.interval.restore(state["means"][0], self.where.device)
            self.epoch_mean.restore(state["means"][1], self.where.device)
        except (RuntimeError, KeyError, ValueError, IndexError, TypeError) as error:
            raise RunError(f"{path}: corrupt checkpoint ({type(error).__name__}); cannot resume from it") from None
        self.step, self.best, self.seconds = state["step"], state["best"], state["seconds"]

    def _save(self) -> None:
        if self.where.first:
            state = {
                "run": self._identity(),
                "step": self.step,
                "student": self.student.state_dict(),
                "optimizer": self.trainer.optimizer.state_dict(),
                "scaler": self.trainer.scaler.state_dict(),
                "means": [self.interval.state(), self.epoch_mean.state()],
                "best": self.best,
                "seconds": self.seconds,
            }
            checkpoint.save(self.args.out / "last.pt", state)

    def go(self) -> Result:
        """Train to the end; return the result."""
        args, out, per_epoch = self.args, self.args.out, len(self.batches)
        names = ["loss", *(f"loss_{name}" for name in self.parts)]
        if self.where.first:
            tests = [f"{what}_{split}" for split in self.data.tests for what in ("accuracy", "test_loss")]
            columns = ["epoch", "loss", "lr", *tests, "seconds", "samples_per_second", "loss_share"]
            self.step_table = Table(out / "steps.csv", ["step", "epoch", "lr", *names], "step", self.step)
            self.epoch_table = Table(out / "epochs.csv", columns, "epoch", self.step // per_epoch)
            self.tensorboard = TensorBoard(out / "tensorboard", self.step) if args.tensorboard else None
        while self.step < self.steps:
            self._epoch(self.step // per_epoch, names)
        if self.where.first:
            if self.tensorboard:
                self.tensorboard.close()
            plot_curves(out, f"{args.model}, {args.loss}, {self.data.name}")
        return self.where.of_first(lambda: _summary(self))

    def _epoch(self, epoch: int, names: list[str]) -> None:
        args, per_epoch, trainer = self.args, len(self.batches), self.trainer
        begin = self.step - epoch * per_epoch
        trainer.loss_seconds, trainer.timing_seconds = [], 0.0
        self.student.train()
        mark, before = time.perf_counter(), self.seconds
        with self.bar.task(f"epoch {epoch + 1}/{args.epochs}", per_epoch, begin) as advance:
            for batch in self.batches.epoch(epoch, begin):
                values = trainer.step(batch, self.step)
                self.step += 1
                self.interval.add(values)
                self.epoch_mean.add(values)
                text = None
                if self.step % args.log_steps == 0:
                    means = self.interval.take()
                    check_finite(means, self.step)
                    row = {"step": self.step, "epoch": epoch + 1, "lr": trainer.optimizer.param_groups[0]["lr"]}
                    self._log("train", row, dict(zip(names, means, strict=True)))
                    speed = args.batch_size * (self.step - epoch * per_epoch - begin) / (time.perf_counter() - mark)
                    shown = list(zip(names, means, strict=True))[: None if self.bar.console.width >= 120 else 1]
                    text = " ".join(f"{name.removeprefix('loss_')} {mean:.3f}" for name, mean in shown)
                    text += f"  {speed:,.0f} samples/s"
                advance(1, text)
                self.seconds = before + time.perf_counter() - mark - trainer.timing_seconds
                if args.checkpoint_steps and self.step % args.checkpoint_steps == 0 and self.step % per_epoch:
                    self._save()
        self._finish_epoch(epoch + 1)

    def _finish_epoch(self, epoch: int) -> None:
        args, per_epoch, trainer = self.args, len(self.batches), self.trainer
        means = self.epoch_mean.take()
        check_finite(means, self.step)
        scores: dict[str, float] = {}
        for name, split in self.data.tests.items():
            scores[f"accuracy_{name}"], scores[f"test_loss_{name}"] = evaluate(
                self.student.network, split, self.where, args.amp
            )
        row: dict[str, Any] = {
            "epoch": epoch,
            "loss": means[0],
            "lr": trainer.optimizer.param_groups[0]["lr"],
            **scores,
        }
        row |= {"seconds": self.seconds, "samples_per_second": per_epoch * args.batch_size / self.seconds}
        if trainer.loss_seconds:
            row["loss_share"] = per_epoch * statistics.median(trainer.loss_seconds) / self.seconds
        first = scores[f"accuracy_{next(iter(self.data.tests))}"]
        if first > self.best["accuracy"]:
            self.best = {"accuracy": first, "epoch": epoch}
            if self.where.first:
                description = {**self.description, **self.best, "data": self.data.fingerprint}
                checkpoint.save_network(args.out / "best.safetensors", self.student.network, description)
        if self.where.first:
            self.epoch_table.add(row)
            if self.tensorboard:
                self.tensorboard.add("epoch", {name: value for name, value in row.items() if name != "epoch"}, epoch)
            shown = ", ".join(f"{name} {100 * scores[f'accuracy_{name}']:.1f} %" for name in self.data.tests)
            speed = row["samples_per_second"]
            self.bar.console.print(
                f"epoch {epoch:3d}  loss {means[0]:.4f}  {shown}  {speed:,.0f} samples/s  {self.seconds:.1f} s",
                highlight=False,
            )
        self.seconds = 0.0
        self._save()

    def _log(self, group: str, row: dict[str, Any], values: dict[str, float]) -> None:
        if self.where.first:
            self.step_table.add({**row, **values})
            if self.tensorboard:
                self.tensorboard.add(group, {**values, "lr": row["lr"]}, row["step"])


def _check_batch(args: argparse.Namespace, where: Processes, dataset: Dataset) -> None:
    pieces = where.world * args.accumulate
    if args.batch_size % pieces:
        raise RunError(
            f"--batch-size {args.batch_size}: cannot be divided among {where.world} processes × "
            f"{args.accumulate} pieces"
        )
    if args.batch_size > len(dataset.train):
        raise RunError(
            f"--batch-size {args.batch_size}: more than the {len(dataset.train)} {dataset.noun} for training"
        )
    if not dataset.tests:
        raise RunError("--data: there is no test set")
    if args.amp == "fp16" and where.device.type != "cuda":
        raise RunError("--amp fp16: for CUDA only; bf16 works on the CPU")


def _check_teacher(args: argparse.Namespace, method: methods.Method) -> None:
    if method.needs_teacher and not args.teacher:
        raise RunError(f"--loss {args.loss}: needs a teacher; train one and give its best.safetensors to --teacher")
    if args.teacher and not method.needs_teacher:
        raise RunError(f"--teacher: --loss {args.loss} takes no teacher")


def _claim(args: argparse.Namespace) -> None:
    """Make the run's folder; never overwrite another run."""
    out = args.out
    there = [name for name in ("last.pt", "best.safetensors") if (out / name).exists()]
    if there and not args.resume:
        raise RunError(f"--out {out}: already has a run ({there[0]}); --resume continues it, or name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {out}: cannot be written ({error.strerror})") from None
    text = json.dumps(vars(args), indent=1, default=str, ensure_ascii=False)
    checkpoint.write(out / "run.json", lambda file: file.write(f"{text}\n".encode()))


def _summary(run: Run) -> Result:
    """The result, read from the logs, so that it also works for a run that was already complete."""
    rows = read_table(run.args.out / "epochs.csv")
    if not rows:
        raise RunError(f"--out {run.args.out}: epochs.csv is missing or empty, so there is no result to show")
    names = list(run.data.tests)
    best = next((row for row in rows if int(row["epoch"]) == run.best["epoch"]), rows[-1])
    shares = [float(row["loss_share"]) for row in rows if row["loss_share"]]
    seconds = statistics.median(float(row["seconds"]) for row in rows)
    if run.where.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Result(
        accuracy={name: float(rows[-1][f"accuracy_{name}"]) for name in names},
        best={name: float(best[f"accuracy_{name}"]) for name in names},
        best_epoch=int(best["epoch"]),
        epochs=len(rows),
        epoch_seconds=seconds,
        samples_per_second=len(run.batches) * run.args.batch_size / seconds,
        loss_share=statistics.median(shares) if shares else None,
        peak_memory=peak,
        parameters=_parameters(run),
        data=run.data.fingerprint,
    )


def _parameters(run: Run) -> int:
    return sum(p.numel() for p in run.student.network.parameters())


def run(args: argparse.Namespace, console: Console | None = None) -> Result:
    """Train with the options of :func:`study.training.options.parse`, or resume a run; return its result.

    Raises:
        RunError: With a one-line message for the user.
    """
    console = console or Console(stderr=True)
    with processes(args.device) as where:
        bar = Bar(console, quiet=args.quiet or not where.first)
        dataset = where.first_then_others(lambda: registry.load(args, bar))
        this = Run(args, where, dataset, bar)
        if where.first:
            _announce(this, console)
        return this.go()


def _announce(this: Run, console: Console) -> None:
    args, dataset = this.args, this.data
    console.print(
        f"{registry.described(dataset)}; {args.model}, {_parameters(this):,} parameters; "
        f"{methods.described(args.loss, args.backend, this.where.device)}; "
        f"{this.where.world} × {this.where.device.type}",
        highlight=False,
        soft_wrap=True,
    )
    for line in registry.about(dataset):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if args.cache_teacher and not dataset.text and (args.shift or args.flip):
        console.print("the teacher's cached logits are of images without the student's shift and flip", soft_wrap=True)
    if this.step:
        console.print(f"resuming at step {this.step} of {this.steps}", highlight=False)


def _show(result: Result, args: argparse.Namespace, console: Console) -> None:
    table = RichTable(title=f"{args.loss}, {args.model}", title_justify="left")
    table.add_column("accuracy, %")
    table.add_column("last epoch", justify="right")
    table.add_column(f"epoch {result.best_epoch}, the best", justify="right")
    for name, accuracy in result.accuracy.items():
        table.add_row(name, f"{100 * accuracy:.2f}", f"{100 * result.best[name]:.2f}")
    console.print(table)
    share = "" if result.loss_share is None else f", {100 * result.loss_share:.1f} % of it in the loss"
    console.print(
        f"{result.epoch_seconds:.1f} s an epoch{share}; {result.samples_per_second:,.0f} samples/s; "
        f"peak memory {result.peak_memory / 2**20:,.0f} MiB; {args.out}",
        highlight=False,
        soft_wrap=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return 0, or 2 after one line on stderr."""
    console = Console(stderr=True)
    try:
        args = options.parse(arguments)
        result = run(args, console)
    except RunError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted; --resume continues from the last checkpoint", file=sys.stderr)
        return 130
    if int(os.environ.get("RANK", "0")) == 0:
        _show(result, args, Console())
        checkpoint.write(
            args.out / "result.json", lambda file: file.write(json.dumps(asdict(result), indent=1).encode())
        )
    return 0


if __name__ == "__main__":
    leave(main())
