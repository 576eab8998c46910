"""Interface of networks: the features for the losses, and the heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Features(NamedTuple):
    """``weak``: input of USKD's weak classifier, (N, D). ``final``: input of the head, in the network's own form."""

    weak: Tensor
    final: Tensor


class Network(nn.Module, ABC):
    """Maps images (N, C, H, W) in [0, 1] to logits (N, classes), or tokens (N, L) to logits (N·L, classes)."""

    weak_width: int

    @abstractmethod
    def features(self, inputs: Tensor) -> Features:
        """Features of the inputs for the heads."""

    @abstractmethod
    def classify(self, final: Tensor) -> Tensor:
        """Logits (N, classes) from the final features."""

    @abstractmethod
    def dense(self, final: Tensor) -> Tensor:
        """Logits (N, P, classes) of the head at each of P positions."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classify(self.features(inputs).final)


class ImageNetwork(Network):
    """A network that normalises its input images."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
