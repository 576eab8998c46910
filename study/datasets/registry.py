"""The data sets by name, and their command-line options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from study.datasets import cifar, folder, glyphs, text
from study.datasets.arrays import DataError, Dataset, cache_root
from study.training.report import Bar

Load = Callable[[Path, int, Path, Bar], Dataset]
#: Data sets on disk: (path, side of an image, cache, bar) to arrays.
ON_DISK: dict[str, Load] = {"cifar100": cifar.load, "imagefolder": folder.load}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the data."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", nargs="+", default=["glyphs"], metavar=("NAME", "PATH"),
        help="glyphs: Chinese characters in the installed fonts; text: the sources of Python's standard library, token "
        "by token; or images on disk: cifar100 PATH, imagefolder PATH (glyphs)",
    )  # fmt: skip
    group.add_argument(
        "--classes", type=int,
        help="classes of glyphs (1000), size of text's vocabulary (1024), or the expected number for data on disk",
    )  # fmt: skip
    group.add_argument("--image-size", type=int, default=32, metavar="PIXELS", help="side of an image (32)")
    group.add_argument("--tokens", type=int, metavar="N", help="text: most tokens to train on (1000000)")
    group.add_argument(
        "--draws",
        type=int,
        metavar="N",
        help="glyphs: images per class and font family (6; with fewer than 6 families, enough for 36 images per class)",
    )
    group.add_argument("--held-out", metavar="FAMILY", help="glyphs: the font family used for tests only")
    group.add_argument("--data-seed", type=int, metavar="N", help="glyphs: seed of the images (0)")
    group.add_argument("--cache", type=Path, default=cache_root(), metavar="DIR",
                       help="folder for arrays (%(default)s)")  # fmt: skip


def check(data: Sequence[str]) -> None:
    """Check the values of ``--data``: a name, and a path for data on disk.

    Raises:
        DataError: With one line that says what was expected.
    """
    name, *paths = data
    if name not in ("glyphs", "text", *ON_DISK):
        raise DataError(f"--data: expected glyphs, text, {' PATH, '.join(ON_DISK)} PATH, got {name!r}")
    if name not in ON_DISK and paths:
        raise DataError(f"--data {name}: expected no path, got {' '.join(paths)}")
    if name in ON_DISK and len(paths) != 1:
        raise DataError(f"--data {name}: expected one path, got {len(paths)}")
    if name in ON_DISK and not Path(paths[0]).exists():
        raise DataError(f"--data {name}: {paths[0]} does not exist")


def load(args: argparse.Namespace, bar: Bar) -> Dataset:
    """Open the data set that the options select; build it in the cache first if needed.

    Raises:
        DataError: With one line that says what was expected.
    """
    check(args.data)
    name, *paths = args.data
    if name != "text" and args.tokens is not None:
        raise DataError(f"--tokens: only for --data text, got {name}")
    if args.image_size < 8:
        raise DataError(f"--image-size: expected at least 8, got {args.image_size}")
    if name == "glyphs":
        given = {"classes": args.classes, "draws": args.draws, "seed": args.data_seed, "held_out": args.held_out}
        request = glyphs.Glyphs(size=args.image_size, **{key: x for key, x in given.items() if x is not None})
        return glyphs.load(request, args.cache, bar)
    for option in ("draws", "held_out", "data_seed"):
        if getattr(args, option) is not None:
            raise DataError(f"--{option.replace('_', '-')}: only for --data glyphs, got {name}")
    if name == "text":
        given = {"classes": args.classes, "tokens": args.tokens}
        return text.load(text.Text(**{key: x for key, x in given.items() if x is not None}), args.cache, bar)
    path = Path(paths[0])
    dataset = ON_DISK[name](path, args.image_size, args.cache, bar)
    if args.classes not in (None, dataset.classes):
        raise DataError(f"--classes: {name} at {path} has {dataset.classes} classes, got {args.classes}")
    return dataset


def described(dataset: Dataset) -> str:
    """A data set in a few words."""
    shape = f"of {dataset.size} tokens" if dataset.text else f"{dataset.channels}×{dataset.size}×{dataset.size}"
    return f"{dataset.name}: {len(dataset.train):,} {dataset.noun} {shape}, {dataset.classes} classes"


def about(dataset: Dataset) -> list[str]:
    """Lines about a data set's content, if it depends on the machine."""
    lines = {"glyphs": glyphs.about, "text": text.about}.get(dataset.name)
    return lines(dataset) if lines else []


def sheet(dataset: Dataset, path: Path, rows: int = 12, columns: int = 24) -> None:
    """Write images of the first classes as a picture, a row per class."""
    from PIL import Image

    lines = []
    for label in range(min(rows, dataset.classes)):
        chosen = np.flatnonzero(dataset.train.labels == label)
        # Spread over a class's images, which are ordered by font family.
        shown = min(columns, len(chosen))
        images = dataset.train.inputs[chosen[np.arange(shown) * len(chosen) // max(shown, 1)]]
        blank = np.zeros((columns - len(images), *images.shape[1:]), np.uint8)
        lines.append(np.concatenate([*images, *blank], axis=-1))
    picture = np.concatenate(lines, axis=-2).transpose(1, 2, 0)
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(path)
