"""The command line of training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from study.datasets import registry
from study.training import methods, networks, processes
from study.training.engine import AMP
from study.training.errors import RunError
from study.training.text_networks import TEXT_NETWORKS

#: Options that may differ when a run is resumed: they change no weight, or are paths to files compared by content.
FREE = (
    "out", "resume", "device", "data", "cache", "teacher", "cache_teacher", "checkpoint_steps", "log_steps",
    "time_loss", "tensorboard", "quiet",
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        allow_abbrev=False,
        description="Train a network with a loss of fused_kd, with or without a teacher.",
        epilog="A teacher and its student: train.py --model cnn-large --out runs/teacher, then "
        "train.py --loss nkd --teacher runs/teacher/best.safetensors --out runs/nkd. "
        "More processes: torchrun --nproc-per-node 2 -m study.train, with the same arguments.",
    )
    registry.add_arguments(parser)
    what = parser.add_argument_group("network and loss")
    what.add_argument(
        "--model",
        default="cnn-small",
        help=f"{', '.join((*networks.NETWORKS, *TEXT_NETWORKS))}, or timm:NAME (cnn-small)",
    )
    what.add_argument("--norm", choices=networks.NORMS, default="batch", help="normalisation of the CNNs (batch)")
    what.add_argument(
        "--loss", choices=methods.NAMES, default="ce", metavar="NAME", help=f"{', '.join(methods.NAMES)} (ce)"
    )
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a hyper-parameter of the loss; may be repeated",
    )
    what.add_argument("--backend", choices=methods.BACKENDS, default="auto", help="backend of fused_kd's losses (auto)")
    what.add_argument("--teacher", type=Path, metavar="FILE", help="best.safetensors of another run")
    what.add_argument(
        "--cache-teacher", type=Path, metavar="DIR",
        help="compute the teacher's logits once, on images without augmentation (the student's are augmented), and "
        "keep them in this folder; not with mixup or CutMix",
    )  # fmt: skip
    what.add_argument(
        "--cache-top-k", type=int, default=0, metavar="K",
        help="keep the K largest per image, and spread the remaining mass over the others (0: keep all, in bfloat16)",
    )  # fmt: skip
    how = parser.add_argument_group("training")
    how.add_argument("--epochs", type=int, default=10, help="(10)")
    how.add_argument("--batch-size", type=int, default=256, help="global batch size of an update (256)")
    how.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="K",
        help="split a process's batch into K pieces, each with its own batch mean for USKD (1)",
    )
    how.add_argument("--optimizer", choices=("sgd", "adamw"), help="(sgd; for a vit and for text adamw)")
    how.add_argument("--lr", type=float, help="peak learning rate (sgd 0.2, adamw 0.001, times batch size / 256)")
    how.add_argument("--weight-decay", type=float, help="(sgd 0.0005, adamw 0.05)")
    how.add_argument("--warmup", type=float, default=0.1, help="share of the steps with a rising rate (0.1)")
    how.add_argument("--shift", type=int, default=2, metavar="PIXELS", help="random shift (2)")
    how.add_argument("--flip", action="store_true", help="random mirror images")
    how.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA", help="(0: none)")
    how.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA", help="(0: none)")
    how.add_argument("--amp", choices=tuple(AMP), default="no", help="autocast; fp16 with a GradScaler, on CUDA (no)")
    how.add_argument("--compile", action="store_true", help="torch.compile the networks")
    how.add_argument("--device", choices=processes.DEVICES, default="auto", help="(auto)")
    how.add_argument("--seed", type=int, default=0, help="seed of weights, order and augmentation (0)")
    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for checkpoints, logs and curves")
    run.add_argument("--resume", action="store_true", help="continue from DIR's checkpoint, if there is one")
    run.add_argument(
        "--checkpoint-steps", type=int, default=0, metavar="N", help="also save a checkpoint every N steps of an epoch"
    )
    run.add_argument("--log-steps", type=int, default=10, metavar="N", help="a row of steps.csv every N steps (10)")
    run.add_argument("--time-loss", action="store_true", help="measure the loss's share of the time")
    run.add_argument("--tensorboard", action="store_true", help="also write TensorBoard logs")
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of a run, and fill in defaults that depend on other options.

    Raises:
        RunError: An option is out of range, or options conflict.
        SystemExit: Argparse rejects the arguments.
    """
    args = make_parser().parse_args(arguments)
    positive = ("epochs", "batch_size", "accumulate", "log_steps")
    not_negative = ("shift", "mixup", "cutmix", "checkpoint_steps", "seed")
    for name in (*positive, *not_negative):
        value, least = getattr(args, name), 1 if name in positive else 0
        if value < least:
            raise RunError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    if not 0 <= args.warmup <= 1:
        raise RunError(f"--warmup: expected a share from 0 to 1, got {args.warmup}")
    if args.optimizer is None:
        args.optimizer = "adamw" if args.model.startswith("vit") or args.model in TEXT_NETWORKS else "sgd"
    sgd = args.optimizer == "sgd"
    if args.lr is None:
        args.lr = (0.2 if sgd else 0.001) * args.batch_size / 256
    if args.weight_decay is None:
        args.weight_decay = 5e-4 if sgd else 0.05
    if args.cache_teacher and not args.teacher:
        raise RunError("--cache-teacher: there is no --teacher with logits to cache")
    if args.cache_top_k and not args.cache_teacher:
        raise RunError("--cache-top-k: there is no --cache-teacher")
    if args.cache_teacher and (args.mixup or args.cutmix):
        raise RunError("--cache-teacher: cached logits are of single images, so not with --mixup or --cutmix")
    return args


def identity(args: argparse.Namespace) -> dict[str, object]:
    """Options that must be the same when a run is resumed."""
    return {f"--{name.replace('_', '-')}": value for name, value in sorted(vars(args).items()) if name not in FREE}
