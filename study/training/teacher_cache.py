"""A teacher's logits of the training images, computed once and memory-mapped.

The images are as stored in the data set: with a cache the teacher does not see the student's random shift and flip, and
mixed images have no cached logits. Logits are (N, C) bfloat16. With top-k, only the k largest log-probabilities of each
row are kept, in float32: a :class:`fused_kd.TopK` with the rest spread evenly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_kd import TopK
from study.datasets import arrays
from study.datasets.arrays import DataError, Dataset
from study.training.batches import plain_batches
from study.training.errors import RunError
from study.training.report import Bar


class TeacherCache:
    """Cached logits, opened by :func:`open_cache`."""

    def __init__(self, folder: Path, classes: int, top_k: int) -> None:
        self.classes, self.top_k = classes, top_k
        self.values = np.load(folder / "values.npy", mmap_mode="r")
        self.classes_of = np.load(folder / "classes.npy", mmap_mode="r") if top_k else None

    def source(self, rows: Tensor, device: torch.device, loss: str) -> Tensor | TopK:
        """The teacher's logits of these rows, or a TopK; JS and DIST have no kernel for a TopK."""
        if not self.top_k or loss in ("js", "dist"):
            return self.logits(rows).to(device, non_blocking=True)
        kept = self.kept(rows)
        log_probs, indices = (each.to(device, non_blocking=True) for each in (kept.log_probs, kept.indices))
        return TopK(log_probs, indices, kept.rest)

    def logits(self, rows: Tensor) -> Tensor:
        """Logits (N, C), or (N·L, C) for text, of these rows of the training split: bfloat16, with top-k float32."""
        if not self.top_k:
            return torch.from_numpy(self.values[rows.numpy()]).view(torch.bfloat16).flatten(0, -2)
        kept = self.kept(rows)
        left = (1 - kept.log_probs.double().exp().sum(1, keepdim=True)).clamp(min=1e-12)
        each = (left / (self.classes - self.top_k)).log().float()
        return each.repeat(1, self.classes).scatter_(1, kept.indices, kept.log_probs)

    def kept(self, rows: Tensor) -> TopK:
        """The kept classes of these rows, for a cache with top-k; makes no tensor as wide as the classes."""
        assert self.classes_of is not None
        index = rows.numpy()
        indices = torch.from_numpy(self.classes_of[index].astype(np.int64)).flatten(0, -2)
        return TopK(torch.from_numpy(self.values[index]).flatten(0, -2), indices, rest="uniform")


def open_cache(
    folder: Path, data: Dataset, teacher: str, top_k: int, predict: Callable[[Tensor], Tensor], bar: Bar
) -> TeacherCache:
    """Open the cache in ``folder``; make it first if it does not exist.

    Args:
        folder: The cache's folder.
        data: The data set; the rows are its training split.
        teacher: :func:`study.training.checkpoint.weights_hash` of the teacher.
        top_k: Number of logits to keep per row; 0 for all.
        predict: Maps images (N, C, H, W) in [0, 1] to the teacher's logits on the CPU.
        bar: Shows the progress of making the cache.

    Raises:
        RunError: The cache is of other data, another teacher or another top-k, is corrupt, or cannot be written.
    """
    if top_k < 0 or top_k >= data.classes:
        raise RunError(f"--cache-top-k: expected 0 (all) to {data.classes - 1}, got {top_k}")
    wanted: dict[str, Any] = {
        "data": data.fingerprint,
        "teacher": teacher,
        "rows": len(data.train),
        "classes": data.classes,
        "top_k": top_k,
        "what": "log-probabilities" if top_k else "teacher logits",
    }
    try:
        if not folder.exists():
            arrays.write_folder(folder, wanted, lambda into: _fill(into, data, top_k, predict, bar))
        manifest = arrays.read_manifest(folder)
    except OSError as error:
        raise RunError(f"--cache-teacher {folder}: cannot be written ({error.strerror})") from None
    except DataError as error:
        raise RunError(f"--cache-teacher {error}") from None
    for name, value in wanted.items():
        if manifest.get(name) != value:
            raise RunError(
                f"--cache-teacher {folder}: made with another {_TITLES.get(name, name)} ({_short(manifest.get(name))}, "
                f"not {_short(value)}); delete the folder or name another"
            )
    return TeacherCache(folder, data.classes, top_k)


_TITLES = {
    "what": "kind of values",
    "data": "data set, or one in another order",
    "rows": "number of images",
    "top_k": "--cache-top-k",
}


def _short(value: object) -> str:
    return str(value)[:12]


def _fill(folder: Path, data: Dataset, top_k: int, predict: Callable[[Tensor], Tensor], bar: Bar) -> dict[str, Any]:
    rows, shape = len(data.train), (*data.train.labels.shape, top_k or data.classes)
    values = _create(folder / "values.npy", np.float32 if top_k else np.int16, shape)
    classes = _create(folder / "classes.npy", np.int32, shape) if top_k else None
    with bar.task("teacher's logits", rows) as advance:
        for part, inputs, labels in plain_batches(data.train, 64 if data.text else 1024, 0, rows):
            logits = predict(inputs).float().reshape(*labels.shape, -1)
            if classes is not None:
                log_p, order = logits.log_softmax(-1).sort(stable=True, dim=-1, descending=True)
                classes[part] = order[..., :top_k].numpy()
                values[part] = log_p[..., :top_k].numpy()
            else:
                values[part] = logits.bfloat16().contiguous().view(torch.int16).numpy()
            advance(len(inputs))
    for array in (values, classes):
        if array is not None:
            array.flush()
    return {}


def _create(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    array: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    return array
