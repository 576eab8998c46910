"""Images in a folder per class: PATH/train/CLASS/*.jpg, and the same under val or test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from study.datasets.arrays import DataError, Dataset, dataset, key_of, statistics
from study.training.report import Bar

TESTS = ("val", "test")
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def load(path: Path, size: int, cache: Path, bar: Bar) -> Dataset:
    """Open the folder's images as RGB squares of ``size`` pixels: centre crops, scaled by the shorter side.

    Raises:
        DataError: Folders are missing or empty, a test class is not in the training set, or an image is damaged.
    """
    tests = [name for name in TESTS if (path / name).is_dir()]
    if not (path / "train").is_dir() or not tests:
        raise DataError(f"imagefolder: expected the folders train and {' or '.join(TESTS)} in {path}")
    classes = _classes(path / "train")
    if len(classes) < 2:
        raise DataError(f"imagefolder: expected a folder for each class in {path / 'train'}, found {len(classes)}")
    splits = ["train", *tests]
    files = {split: _files(path / split, classes) for split in splits}
    listed = [
        [str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns]
        for split in splits
        for file, _ in files[split]
    ]
    wanted = {"size": size, "files": listed}
    folder = cache / f"imagefolder-{path.resolve().name}-{key_of(wanted)}"
    manifest = {"request": key_of(wanted), "notes": {"names": classes}}
    return dataset(folder, manifest, lambda to: _build(to, files, size, len(classes), bar))


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    unknown = sorted(set(_classes(folder)) - set(classes))
    if unknown:
        raise DataError(f"imagefolder: {folder / unknown[0]} is no class of the training images")
    found = [
        (file, label)
        for label, name in enumerate(classes)
        for file in (sorted((folder / name).iterdir()) if (folder / name).is_dir() else ())
        if file.suffix.lower() in ENDINGS
    ]
    if not found:
        raise DataError(f"imagefolder: expected images ({', '.join(ENDINGS)}) in the folders of {folder}, found none")
    empty = sorted(set(range(len(classes))) - {label for _, label in found})
    if empty and folder.name == "train":
        raise DataError(f"imagefolder: expected images of every class, found none in {folder / classes[empty[0]]}")
    return found


def _build(folder: Path, files: dict[str, list[tuple[Path, int]]], size: int, classes: int, bar: Bar) -> dict[str, Any]:
    stats: dict[str, list[float]] = {}
    with bar.task("reading images", total=sum(map(len, files.values()))) as advance:
        for split, entries in files.items():
            path = folder / f"{split}.inputs.npy"
            shape = (len(entries), 3, size, size)
            images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
            for i, (file, _) in enumerate(entries):
                images[i] = _read(file, size)
                advance(1)
            images.flush()
            if split == "train":
                stats = statistics(images)
            np.save(folder / f"{split}.labels.npy", np.asarray([label for _, label in entries], dtype=np.int64))
    return {"name": "imagefolder", "splits": list(files), "classes": classes, **stats}


def _read(file: Path, size: int) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"imagefolder: {file} cannot be read ({type(error).__name__}: {error})") from None
    planes: npt.NDArray[np.uint8] = np.asarray(square, dtype=np.uint8).transpose(2, 0, 1)
    return planes
