"""Which data a run has: the command line of the data sets."""

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
    """Add the options that say which data."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", nargs="+", default=["glyphs"], metavar=("NAME", "PATH"),
        help="glyphs: Chinese characters in the fonts that are installed; text: the sources of Python's standard "
        "library, token by token; or images on disk: cifar100 PATH, imagefolder PATH (glyphs)",
    )  # fmt: skip
    group.add_argument(
        "--classes", type=int,
        help="how many glyphs has (1000), the size of text's vocabulary (1024), or what the data on disk must have",
    )  # fmt: skip
    group.add_argument("--image-size", type=int, default=32, metavar="PIXELS", help="side of an image (32)")
    group.add_argument("--tokens", type=int, metavar="N", help="of text, the most to train on (1000000)")
    group.add_argument(
        "--draws",
        type=int,
        metavar="N",
        help="of glyphs, of a class in a font family (6; with fewer than 6 families, enough for 36 images a class)",
    )
    group.add_argument("--held-out", metavar="FAMILY", help="the font family of glyphs that is only tested on")
    group.add_argument("--data-seed", type=int, metavar="N", help="of glyphs (0)")
    group.add_argument("--cache", type=Path, default=cache_root(), metavar="DIR", help="for arrays (%(default)s)")


def check(data: Sequence[str]) -> None:
    """Raise unless this is what ``--data`` takes: a name, and where its data are on disk.

    Raises:
        DataError: One line says what was expected.
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
    """The data set of the options, built in the cache first if it is not there.

    Raises:
        DataError: It cannot be had; one line says what was expected.
    """
    check(args.data)
    name, *paths = args.data
    if name != "text" and args.tokens is not None:
        raise DataError(f"--tokens: is of text, not of {name}")
    if args.image_size < 8:
        raise DataError(f"--image-size: expected at least 8, got {args.image_size}")
    if name == "glyphs":
        given = {"classes": args.classes, "draws": args.draws, "seed": args.data_seed, "held_out": args.held_out}
        request = glyphs.Glyphs(size=args.image_size, **{key: x for key, x in given.items() if x is not None})
        return glyphs.load(request, args.cache, bar)
    for option in ("draws", "held_out", "data_seed"):
        if getattr(args, option) is not None:
            raise DataError(f"--{option.replace('_', '-')}: is of glyphs, which are drawn; --data {name} is not")
    if name == "text":
        asked = {key: x for key, x in (("classes", args.classes), ("tokens", args.tokens)) if x is not None}
        return text.load(text.Text(**asked), args.cache, bar)
    path = Path(paths[0])
    dataset = ON_DISK[name](path, args.image_size, args.cache, bar)
    if args.classes not in (None, dataset.classes):
        raise DataError(f"--classes: {name} at {path} has {dataset.classes} classes, got {args.classes}")
    return dataset


def described(dataset: Dataset) -> str:
    """A set in a few words."""
    shape = f"of {dataset.size} tokens" if dataset.text else f"{dataset.channels}×{dataset.size}×{dataset.size}"
    return f"{dataset.name}: {len(dataset.train):,} {dataset.noun} {shape}, {dataset.classes} classes"


def about(dataset: Dataset) -> list[str]:
    """What a set is made of, a line each, where that is not the same everywhere."""
    of = {"glyphs": glyphs.about, "text": text.about}
    return of[dataset.name](dataset) if dataset.name in of else []


def sheet(dataset: Dataset, path: Path, rows: int = 12, columns: int = 24) -> None:
    """Write images of the first classes as a picture, a row for each class."""
    from PIL import Image

    lines = []
    for label in range(min(rows, dataset.classes)):
        chosen = np.flatnonzero(dataset.train.labels == label)
        # Evenly over a class's images, which are in the order of the font families.
        shown = min(columns, len(chosen))
        images = dataset.train.inputs[chosen[np.arange(shown) * len(chosen) // max(shown, 1)]]
        blank = np.zeros((columns - len(images), *images.shape[1:]), np.uint8)
        lines.append(np.concatenate([*images, *blank], axis=-1))
    picture = np.concatenate(lines, axis=-2).transpose(1, 2, 0)
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(path)
