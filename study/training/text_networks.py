"""Language models small enough for two cores: a GRU and a causal transformer over tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from study.training.errors import RunError
from study.training.network import Features, Network


@dataclass(frozen=True)
class Gru:
    """Width of embedding and state, and number of layers."""

    width: int
    layers: int


@dataclass(frozen=True)
class Transformer:
    """Width, number of blocks, and number of heads."""

    width: int
    depth: int
    heads: int


#: The small ones are students for two cores, the large ones their teachers.
TEXT_NETWORKS: dict[str, Gru | Transformer] = {
    "gru-tiny": Gru(width=24, layers=2),
    "gru-small": Gru(width=48, layers=2),
    "gru-large": Gru(width=320, layers=2),
    "transformer-tiny": Transformer(width=24, depth=2, heads=2),
    "transformer-small": Transformer(width=48, depth=2, heads=2),
    "transformer-large": Transformer(width=192, depth=4, heads=6),
}


class LanguageModel(Network):
    """Maps tokens (N, L) to logits (N·L, classes) of each next token."""

    head: nn.Linear

    def classify(self, final: Tensor) -> Tensor:
        return cast("Tensor", self.head(final))

    def dense(self, final: Tensor) -> Tensor:
        raise RunError("--loss zipf-ls: its votes are those of an image's positions; text has none")


class GruModel(LanguageModel):
    """The weak feature is the first layer's state, the final one the last layer's state."""

    def __init__(self, spec: Gru, classes: int) -> None:
        super().__init__()
        width = spec.width
        self.embedding = nn.Embedding(classes, width)
        self.first = nn.GRU(width, width, batch_first=True)
        self.others = nn.GRU(width, width, spec.layers - 1, batch_first=True)
        self.head = nn.Linear(width, classes)
        self.weak_width = width

    def features(self, inputs: Tensor) -> Features:
        weak, _ = self.first(self.embedding(inputs))
        final, _ = self.others(weak)
        return Features(weak.flatten(0, 1), final.flatten(0, 1))


class TransformerModel(LanguageModel):
    """The weak feature is the output of block L/2, normalised like the final one."""

    mask: Tensor

    def __init__(self, spec: Transformer, classes: int, length: int) -> None:
        super().__init__()
        width = spec.width
        self.embedding = nn.Embedding(classes, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, spec.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(spec.depth)
        )
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)
        self.weak_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.weak_width = width

    def features(self, inputs: Tensor) -> Features:
        x = self.embedding(inputs) + self.positions
        for i, block in enumerate(self.blocks):
            x = block(x, src_mask=self.mask, is_causal=True)
            if i + 1 == len(self.blocks) // 2:
                weak = self.weak_norm(x)
        return Features(weak.flatten(0, 1), self.norm(x).flatten(0, 1))


def build_text(name: str, classes: int, length: int) -> LanguageModel:
    """Build the network ``name`` of :data:`TEXT_NETWORKS` for windows of ``length`` tokens."""
    spec = TEXT_NETWORKS[name]
    return GruModel(spec, classes) if isinstance(spec, Gru) else TransformerModel(spec, classes, length)
