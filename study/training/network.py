"""What a network has for the losses: the features that its heads see, and the heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Features(NamedTuple):
    """``weak``: what USKD's weak classifier sees, (N, D). ``final``: what the head sees; its form is the network's
    own."""

    weak: Tensor
    final: Tensor


class Network(nn.Module, ABC):
    """Images (N, C, H, W) in [0, 1] to logits (N, classes), or tokens (N, L) to logits (N·L, classes)."""

    weak_width: int

    @abstractmethod
    def features(self, inputs: Tensor) -> Features:
        """What the heads see of the inputs."""

    @abstractmethod
    def classify(self, final: Tensor) -> Tensor:
        """Logits (N, classes) of the final features."""

    @abstractmethod
    def dense(self, final: Tensor) -> Tensor:
        """The head at each of P positions: logits (N, P, classes)."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classify(self.features(inputs).final)


class ImageNetwork(Network):
    """A network that normalises its images itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
