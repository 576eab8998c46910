"""CIFAR-100 in its distributed form: the folder cifar-100-python, or its archive."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from study.datasets.arrays import DataError, Dataset, content_hash, dataset, key_of, statistics, write_split
from study.training.report import Bar

CLASSES, SIDE = 100, 32
#: Globals in the pickles: for arrays, by NumPy's old and new names, and for bytes that Python 3 writes for Python 2.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Unpickler(pickle.Unpickler):
    """Loads nothing but arrays: a pickle could call any function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it uses {module}.{name}, which no CIFAR file does")
        return super().find_class(module, name)


def load(path: Path, size: int, cache: Path, bar: Bar) -> Dataset:
    """Open CIFAR-100 from its folder, the folder's parent, or cifar-100-python.tar.gz.

    Raises:
        DataError: A file is missing, truncated or not of CIFAR-100, or ``size`` is not 32.
    """
    if size != SIDE:
        raise DataError(f"--image-size: cifar100 has {SIDE} pixels, got {size}")
    inner = path / "cifar-100-python"
    path = inner if inner.is_dir() else path
    sources = [path / "train", path / "test"] if path.is_dir() else [path]
    for source in sources:
        if not source.is_file():
            raise DataError(f"cifar100: expected the files train and test in {path}, {source.name} is missing")
    wanted = {"cifar100": [content_hash(source) for source in sources]}
    folder = cache / f"cifar100-{key_of(wanted)}"
    return dataset(folder, {"request": wanted, "notes": {}}, lambda to: _build(to, path, bar))


def _build(folder: Path, path: Path, bar: Bar) -> dict[str, Any]:
    stats: dict[str, list[float]] = {}
    with bar.task("reading CIFAR-100", total=2) as advance:
        for split in ("train", "test"):
            images, labels = _read(path, split)
            write_split(folder, split, images, labels)
            if split == "train":
                stats = statistics(images)
            advance(1)
    return {"name": "cifar100", "splits": ["train", "test"], "classes": CLASSES, **stats}


def _read(path: Path, split: str) -> tuple[npt.NDArray[np.uint8], list[int]]:
    try:
        content = _Unpickler(io.BytesIO(_bytes(path, split)), encoding="bytes").load()
        images = np.asarray(content[b"data"], dtype=np.uint8).reshape(-1, 3, SIDE, SIDE)
        labels = [int(label) for label in content[b"fine_labels"]]
        if len(images) != len(labels) or not labels or not 0 <= min(labels) <= max(labels) < CLASSES:
            raise ValueError(f"{len(images)} images and {len(labels)} labels, or labels that are not 0 to 99")
    except Exception as error:  # damaged files raise almost anything: IndexError, MemoryError, zlib.error
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"cifar100: {split} of {path} is truncated or not of CIFAR-100 ({reason})") from None
    return images, labels


def _bytes(path: Path, split: str) -> bytes:
    if path.is_dir():
        return (path / split).read_bytes()
    with tarfile.open(path) as archive:
        file = archive.extractfile(f"cifar-100-python/{split}")
        if file is None:
            raise ValueError(f"no file cifar-100-python/{split}")
        content = file.read()
        # Read to the end of the archive: only there gzip checks its checksum.
        while archive.fileobj is not None and archive.fileobj.read(2**20):
            pass
        return content
