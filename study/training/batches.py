"""Training batches from the memory map: order, random shift, flip, mixup and CutMix.

All random numbers of a global batch come from a generator seeded with (seed, epoch, batch), and each process takes its
share. So a resumed run, or one with more processes, sees the same images.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from study.datasets.arrays import Split

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Augmentation:
    """``shift``: the largest offset in pixels, with edges repeated. ``mixup`` and ``cutmix``: parameters of their Beta
    distributions, 0 for none; with both, each batch uses one at random."""

    shift: int = 2
    flip: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0


class Batch(NamedTuple):
    """Images (N, C, H, W) in [0, 1], target (N,) classes or (N, C) probabilities, and their rows in the split. For
    text: tokens (N, L) and the next tokens (N, L)."""

    inputs: Tensor
    target: Tensor
    rows: Tensor


class Batches:
    """The training batches of one process.

    Args:
        split: The training split.
        classes: Number of classes, for mixed labels.
        batch_size: Size of the global batch; an epoch's last incomplete batch is dropped.
        augmentation: Augmentation of images.
        seed: Seed of order and augmentation.
        rank, world: This process and the number of processes.
    """

    def __init__(
        self, split: Split, classes: int, batch_size: int, augmentation: Augmentation, seed: int, rank: int, world: int
    ) -> None:
        self.split, self.classes, self.augmentation, self.seed = split, classes, augmentation, seed
        self.batch_size = batch_size
        share = batch_size // world
        self.share = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return len(self.split) // self.batch_size

    def epoch(self, epoch: int, begin: int) -> Iterator[Batch]:
        """The batches of an epoch from number ``begin`` on; a thread prepares the next one."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.split))
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._make, order, epoch, begin)
            for i in range(begin, len(self)):
                batch = coming.result()
                if i + 1 < len(self):
                    coming = pool.submit(self._make, order, epoch, i + 1)
                yield batch

    def _make(self, order: Indices, epoch: int, i: int) -> Batch:
        draws = np.random.default_rng([self.seed, epoch, i])
        rows = order[i * self.batch_size : (i + 1) * self.batch_size]
        if self.split.text:  # no augmentation
            rows = rows[self.share]
            return Batch(*_read_text(self.split, rows), torch.from_numpy(rows))
        kind = self.augmentation
        shifts = draws.integers(-kind.shift, kind.shift + 1, size=(self.batch_size, 2))
        flips = draws.random(self.batch_size) < (0.5 if kind.flip else 0.0)
        images, labels = self._read(rows, shifts, flips, self.share)
        if not (kind.mixup or kind.cutmix):
            return Batch(images, labels, torch.from_numpy(rows[self.share]))
        # Each image's partner comes from the global batch, with its own shift and flip.
        partner = draws.permutation(self.batch_size)
        others, other_labels = self._read(rows[partner], shifts[partner], flips[partner], self.share)
        if kind.mixup and (not kind.cutmix or draws.random() < 0.5):
            weight = float(draws.beta(kind.mixup, kind.mixup))
            mixed = weight * images + (1 - weight) * others
        else:
            mixed, weight = cut(images, others, float(draws.beta(kind.cutmix, kind.cutmix)), draws)
        one_hot, other = (F.one_hot(classes, self.classes).float() for classes in (labels, other_labels))
        return Batch(mixed, weight * one_hot + (1 - weight) * other, torch.from_numpy(rows[self.share]))

    def _read(
        self, rows: Indices, shifts: Indices, flips: npt.NDArray[np.bool_], share: slice
    ) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(self.split.inputs[rows[share]])
        labels = torch.from_numpy(self.split.labels[rows[share]])
        images = shifted(images, torch.from_numpy(shifts[share]), torch.from_numpy(flips[share]))
        return images.float().div_(255), labels


def _read_text(split: Split, rows: Indices | slice) -> tuple[Tensor, Tensor]:
    return torch.tensor(split.inputs[rows].astype(np.int64)), torch.tensor(split.labels[rows])


def shifted(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Shift each image (N, C, H, W) by its (rows, columns), repeating edges, and mirror it where ``flips``; the result
    has channels last."""
    n, _, height, width = images.shape
    rows = (torch.arange(height) + shifts[:, :1]).clamp_(0, height - 1)
    columns = (torch.arange(width) + shifts[:, 1:]).clamp_(0, width - 1)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    each = torch.arange(n)[:, None, None]
    return images[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cut(images: Tensor, others: Tensor, weight: float, draws: np.random.Generator) -> tuple[Tensor, float]:
    """CutMix: paste one rectangle of ``others`` into all ``images``; return the result and the images' remaining
    share."""
    height, width = images.shape[2:]
    side = (1 - weight) ** 0.5
    y, x = draws.integers(height), draws.integers(width)
    top, bottom = (int(np.clip(y + sign * height * side / 2, 0, height)) for sign in (-1, 1))
    left, right = (int(np.clip(x + sign * width * side / 2, 0, width)) for sign in (-1, 1))
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def plain_batches(split: Split, batch_size: int, begin: int, end: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Batches of rows ``begin`` to ``end`` of a split in order: slice, images in [0, 1] or tokens, and classes."""
    for first in range(begin, end, batch_size):
        rows = slice(first, min(first + batch_size, end))
        if split.text:
            yield rows, *_read_text(split, rows)
            continue
        yield rows, torch.tensor(split.inputs[rows]).float().div_(255), torch.tensor(split.labels[rows])
