"""Data sets as memory-mapped arrays: every source is decoded once into a folder that later runs open.

A folder has ``<split>.inputs.npy`` and ``<split>.labels.npy`` for each split (see :class:`Split`), and a manifest with
the request and the hash of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from study.training.errors import RunError

MANIFEST = "manifest.json"
#: Increased when the same request gives another folder layout.
FORMAT = 2
#: Files up to this size are hashed whole, longer ones in evenly spaced blocks, to keep opening fast.
HASHED_WHOLE = 256 * 2**20
BLOCK = 2**20


class DataError(RunError):
    """Data that cannot be used."""


@dataclass(frozen=True)
class Split:
    """Memory-mapped rows: images (N, C, H, W) uint8 with labels (N,) int64, or windows of text: tokens (N, L) int16
    with the next tokens (N, L) int64."""

    inputs: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def text(self) -> bool:
        """Whether the rows are windows of text, not images."""
        return self.inputs.ndim == 2


@dataclass(frozen=True)
class Dataset:
    """A training split, the test splits by name, and facts about them.

    ``fingerprint`` changes with any image, label or their order. ``mean`` and ``std`` are per channel, over the
    training images in [0, 1].
    """

    name: str
    train: Split
    tests: dict[str, Split]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    notes: dict[str, Any]

    @property
    def text(self) -> bool:
        """Whether the rows are windows of text, not images."""
        return self.train.text

    @property
    def noun(self) -> str:
        """Noun for the rows."""
        return "windows" if self.text else "images"

    @property
    def channels(self) -> int:
        """Channels of an image; 1 for text."""
        return 1 if self.text else int(self.train.inputs.shape[1])

    @property
    def size(self) -> int:
        """Side of an image, or tokens of a window."""
        return int(self.train.inputs.shape[-1])


def cache_root() -> Path:
    """Default folder for arrays, in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_kd"


def content_hash(path: Path) -> str:
    """SHA-256 of the file's length and contents; beyond :data:`HASHED_WHOLE`, of 256 of its blocks."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= HASHED_WHOLE:
            while block := file.read(BLOCK):
                digest.update(block)
        else:
            for i in range(256):
                file.seek((size - BLOCK) * i // 255)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def key_of(request: dict[str, Any]) -> str:
    """A short key of a request, for the name of its cache folder."""
    return hashlib.sha256(json.dumps([FORMAT, request], sort_keys=True).encode()).hexdigest()[:12]


def write_folder(folder: Path, manifest: dict[str, Any], fill: Callable[[Path], dict[str, Any]]) -> None:
    """Make ``folder`` atomically: ``fill`` writes files into a temporary folder and returns more of the manifest.

    If another process has made the folder in the meantime, its version stays.

    Raises:
        OSError: It cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        manifest = {**manifest, **fill(temporary)}
        manifest["files"] = {path.name: content_hash(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / MANIFEST).exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder from :func:`write_folder`, and check every file against it."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, str] = manifest["files"]
        for name, expected in files.items():
            if content_hash(folder / name) != expected:
                raise DataError(f"{folder / name}: corrupt cache, its contents are not those written; delete {folder}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: corrupt cache ({type(error).__name__}: {error}); delete the folder") from None
    return manifest


def write_split(folder: Path, name: str, inputs: npt.NDArray[Any], labels: Iterable[Any]) -> None:
    """Write one split."""
    np.save(folder / f"{name}.inputs.npy", inputs)
    np.save(folder / f"{name}.labels.npy", np.asarray(labels, dtype=np.int64))


def statistics(images: npt.NDArray[np.uint8]) -> dict[str, list[float]]:
    """Mean and standard deviation per channel of images in [0, 1], for the manifest."""
    counts = np.zeros((images.shape[1], 256), dtype=np.int64)
    for begin in range(0, len(images), 1024):
        for channel in range(images.shape[1]):
            counts[channel] += np.bincount(images[begin : begin + 1024, channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    mean = (counts * levels).sum(axis=1) / counts.sum(axis=1)
    std = np.sqrt((counts * (levels - mean[:, None]) ** 2).sum(axis=1) / counts.sum(axis=1))
    return {"mean": mean.tolist(), "std": np.maximum(std, 1e-3).tolist()}


def dataset(folder: Path, manifest: dict[str, Any], fill: Callable[[Path], dict[str, Any]]) -> Dataset:
    """Open the data set in ``folder``; make it first by :func:`write_folder` if it does not exist.

    Raises:
        DataError: The cache cannot be written to, or is corrupt.
    """
    try:
        if not folder.exists():
            write_folder(folder, manifest, fill)
    except OSError as error:
        raise DataError(f"--cache: cannot write to {folder.parent} ({error.strerror or error})") from None
    return _open(folder)


def _open(folder: Path) -> Dataset:
    manifest = read_manifest(folder)
    try:
        splits = {name: _open_split(folder, name) for name in manifest["splits"]}
        classes = int(manifest["classes"])
        train = splits.pop("train")
        for name, split in {"train": train, **splits}.items():
            if len(split) == 0 or np.min(split.labels) < 0 or np.max(split.labels) >= classes:
                raise ValueError(f"the labels of {name} are not those of {classes} classes")
        digest = hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()
        mean, std = tuple(manifest["mean"]), tuple(manifest["std"])
        return Dataset(manifest["name"], train, splits, classes, mean, std, digest, manifest.get("notes", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: corrupt cache ({type(error).__name__}: {error}); delete the folder") from None


def _open_split(folder: Path, name: str) -> Split:
    inputs = np.load(folder / f"{name}.inputs.npy", mmap_mode="r")
    labels = np.load(folder / f"{name}.labels.npy", mmap_mode="r")
    images = inputs.ndim == 4 and inputs.dtype == np.uint8 and labels.shape == inputs.shape[:1]
    text = inputs.ndim == 2 and inputs.dtype == np.int16 and labels.shape == inputs.shape
    if not images and not text:
        raise ValueError(f"{name} is neither (N, C, H, W) bytes with N labels nor (N, L) tokens with as many labels")
    return Split(inputs, labels)
