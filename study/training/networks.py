"""Students and teachers: residual CNNs and vision transformers for small images, timm's networks if installed, and the
language models of :mod:`study.training.text_networks`.

Image networks normalise their inputs, with mean and standard deviation as buffers, so a teacher needs nothing but its
checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from study.training.errors import RunError
from study.training.network import Features, ImageNetwork, Network
from study.training.text_networks import TEXT_NETWORKS, build_text


@dataclass(frozen=True)
class Cnn:
    """A residual CNN: width and number of blocks of each stage, and the stride of the first convolution."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    stride: int = 1


@dataclass(frozen=True)
class Vit:
    """A vision transformer with 8 × 8 patches."""

    width: int
    depth: int
    heads: int


#: cnn-small is for two cores, cnn-large is its teacher; the resnets have the usual widths and need a GPU.
NETWORKS: dict[str, Cnn | Vit] = {
    "cnn-tiny": Cnn((8, 16, 32), (1, 1, 1), stride=2),
    "cnn-small": Cnn((16, 32, 128), (1, 1, 1), stride=2),
    "cnn-medium": Cnn((32, 64, 128, 256), (1, 1, 1, 1), stride=2),
    "cnn-large": Cnn((32, 64, 192, 384), (2, 2, 2, 1), stride=2),
    "resnet-18": Cnn((64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet-34": Cnn((64, 128, 256, 512), (3, 4, 6, 3)),
    "vit-tiny": Vit(width=96, depth=4, heads=3),
    "vit-small": Vit(width=192, depth=8, heads=3),
    "vit-base": Vit(width=384, depth=12, heads=6),
}
NORMS = ("batch", "group")


def _norm(kind: str, width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if kind == "batch" else nn.GroupNorm(max(1, width // 8), width)


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = _norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = _norm(norm, width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), _norm(norm, width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResidualCnn(ImageNetwork):
    """The weak feature is the averaged map of stage 2, the final one the map of the last stage."""

    def __init__(
        self, spec: Cnn, classes: int, channels: int, size: int, norm: str, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(mean, std)
        first, kernel = spec.widths[0], 3 if spec.stride == 1 else 5
        self.stem = nn.Sequential(
            nn.Conv2d(channels, first, kernel, spec.stride, kernel // 2, bias=False), _norm(norm, first), nn.ReLU(True)
        )
        while size > 48:  # makes the stages' maps as small as for 32 pixels
            self.stem.append(nn.MaxPool2d(3, 2, 1))
            size //= 2
        self.stages = nn.ModuleList()
        inputs = first
        for i, (width, blocks) in enumerate(zip(spec.widths, spec.blocks, strict=True)):
            stage = [Block(inputs, width, 1 if i == 0 else 2, norm)]
            stage += [Block(width, width, 1, norm) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage))
            inputs = width
        self.head = nn.Linear(inputs, classes)
        self.weak_width = spec.widths[1]

    def features(self, images: Tensor) -> Features:
        x = self.stages[1](self.stages[0](self.stem(self.normalise(images))))
        weak = x.mean(dim=(2, 3))
        for stage in self.stages[2:]:
            x = stage(x)
        return Features(weak, x)

    def classify(self, final: Tensor) -> Tensor:
        logits: Tensor = self.head(final.mean(dim=(2, 3)))
        return logits

    def dense(self, final: Tensor) -> Tensor:
        logits: Tensor = self.head(final.flatten(2).transpose(1, 2))
        return logits


class VisionTransformer(ImageNetwork):
    """The weak feature is the class token after block L/2, the final one all tokens, the class token first."""

    def __init__(
        self, spec: Vit, classes: int, channels: int, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(mean, std)
        if size % 8:
            raise RunError(f"--model: a vit needs an image size that is a multiple of 8 pixels, got {size}")
        patch, width = size // 8, spec.width
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 65, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, spec.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(spec.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.weak_width = width

    def features(self, images: Tensor) -> Features:
        tokens = self.patches(self.normalise(images)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.positions
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i + 1 == len(self.blocks) // 2:
                weak = x[:, 0]
        return Features(weak, self.norm(x))

    def classify(self, final: Tensor) -> Tensor:
        logits: Tensor = self.head(final[:, 0])
        return logits

    def dense(self, final: Tensor) -> Tensor:
        logits: Tensor = self.head(final[:, 1:])
        return logits


class Timm(ImageNetwork):
    """A network of timm. A forward hook takes the weak feature from stage 2, or from block L/2 (its class token)."""

    def __init__(
        self, name: str, classes: int, channels: int, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(mean, std)
        try:
            import timm  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise RunError(f"--model timm:{name}: timm is not installed; pip install timm") from None
        options: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
        try:
            try:
                self.model = timm.create_model(name, img_size=size, **options)
            except TypeError:  # CNNs take any size and have no such option
                self.model = timm.create_model(name, **options)
        except Exception as error:
            raise RunError(f"--model timm:{name}: {' '.join(str(error).split())}") from None
        self._weak: Tensor | None = None
        self.weak_width = 0
        self._channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"  # Swin and its like
        if inner := self._inner():
            inner.register_forward_hook(self._keep)
            with torch.no_grad():
                self.eval()
                self.weak_width = self.features(torch.zeros(1, channels, size, size)).weak.shape[1]
                self.train()

    def _inner(self) -> nn.Module | None:
        model = self.model
        if hasattr(model, "blocks") and hasattr(model, "cls_token"):
            return cast(nn.Module, model.blocks[len(model.blocks) // 2 - 1])
        for name in ("stages", "layers", "blocks"):
            if len(getattr(model, name, ())) > 1:
                return cast(nn.Module, getattr(model, name)[1])
        return getattr(model, "layer2", getattr(model, "s2", None))

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._weak = output

    def features(self, images: Tensor) -> Features:
        final = self.model.forward_features(self.normalise(images))
        weak, self._weak = self._weak, None
        if weak is None:  # no hook
            weak = final.new_empty(len(final), 0)
        elif weak.dim() == 4:
            weak = weak.mean(dim=(1, 2) if self._channels_last else (2, 3))
        elif weak.dim() == 3:
            weak = weak[:, 0]
        return Features(weak, final)

    def classify(self, final: Tensor) -> Tensor:
        logits: Tensor = self.model.forward_head(final)
        return logits

    def dense(self, final: Tensor) -> Tensor:
        head = self.model.get_classifier()
        if final.dim() == 4:
            final = final.flatten(1, 2) if self._channels_last else final.flatten(2).transpose(1, 2)
        elif final.dim() == 3:
            final = final[:, getattr(self.model, "num_prefix_tokens", 1) :]
        if not isinstance(head, nn.Linear) or final.shape[-1] != head.in_features:
            raise RunError("--loss zipf-ls: this network's head is not linear on the positions of its last map")
        logits: Tensor = head(final)
        return logits


def build(
    name: str, *, classes: int, channels: int, size: int, norm: str, mean: Sequence[float], std: Sequence[float]
) -> Network:
    """Build the network ``name``: one of :data:`NETWORKS` or :data:`TEXT_NETWORKS`, or ``timm:`` and timm's name.

    Raises:
        RunError: There is no such network, or it does not take images of this size.
    """
    if name.startswith("timm:"):
        return Timm(name.removeprefix("timm:"), classes, channels, size, mean, std)
    spec = NETWORKS.get(name)
    if isinstance(spec, Cnn):
        return ResidualCnn(spec, classes, channels, size, norm, mean, std)
    if isinstance(spec, Vit):
        return VisionTransformer(spec, classes, channels, size, mean, std)
    if name in TEXT_NETWORKS:
        return build_text(name, classes, size)
    raise RunError(f"--model: expected one of {', '.join((*NETWORKS, *TEXT_NETWORKS))} or timm:NAME, got {name}")


def check_data(name: str, text: bool) -> None:
    """Raises:
    RunError: The network ``name`` takes images but the data set is text, or the reverse.
    """
    if text and name not in TEXT_NETWORKS:
        raise RunError(f"--model {name}: takes images, and the data are text; {', '.join(TEXT_NETWORKS)} take text")
    if not text and name in TEXT_NETWORKS:
        raise RunError(f"--model {name}: takes text, and the data are images; {', '.join(NETWORKS)} take images")


def to_device(inputs: Tensor, device: torch.device) -> Tensor:
    """Move images, with channels last, or tokens to a device."""
    layout = torch.channels_last if inputs.dim() == 4 else torch.preserve_format
    return inputs.to(device, memory_format=layout, non_blocking=True)


def place(module: nn.Module, device: torch.device) -> None:
    """Move a network to a device, with channels last, the fastest layout for convolutions."""
    module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Outputs(NamedTuple):
    """Logits (N, C), the weak classifier's logits (N, C), and logits of P positions (N, P, C); None if not needed."""

    logits: Tensor
    weak: Tensor | None
    dense: Tensor | None


class Student(nn.Module):
    """The trained module: a network and, for USKD, the weak classifier on its inner feature, in one module for DDP."""

    def __init__(self, network: Network, classes: int, weak: bool, dense: bool) -> None:
        super().__init__()
        if weak and not network.weak_width:
            raise RunError(
                "--loss uskd: this network has no second stage known here (stages, layers, blocks, layer2, s2)"
            )
        self.network = network
        self.weak_classifier = nn.Linear(network.weak_width, classes) if weak else None
        self._dense = dense

    def forward(self, images: Tensor) -> Outputs:
        features = self.network.features(images)
        weak = None if self.weak_classifier is None else self.weak_classifier(features.weak)
        dense = None
        if self._dense:
            with torch.no_grad():  # only their votes are used, as labels
                dense = self.network.dense(features.final)
        return Outputs(self.network.classify(features.final), weak, dense)
