"""Train a classifier with USKD, without a teacher: its own inner feature gives the ranks. A few seconds.

    python examples/self_distillation.py

A forward hook takes the feature, so the network needs no change. The criterion owns the weak classifier: give its
parameters to the optimizer, and save its state in the checkpoint.
"""

import argparse

import torch
from torch import Tensor, nn

from fused_kd import USKDLoss

CLASSES = 100


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.last(self.middle(self.stem(images))))  # type: ignore[no-any-return]


def make_images(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """One pattern per class, plus noise."""
    patterns = torch.randn(CLASSES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(CLASSES, (rows,), generator=generator)
    return patterns[target] + 2.0 * torch.randn(rows, 3, 16, 16, generator=generator), target


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = Network()
    feature: dict[str, Tensor] = {}
    model.middle.register_forward_hook(lambda module, inputs, output: feature.update(weak=output))  # (N, 64, H, W)
    criterion = USKDLoss(in_features=64, num_classes=CLASSES, ce_weight=1.0)
    optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=2e-3)
    for step in range(steps):
        images, target = make_images(128, seed=1 + step)
        loss, parts = criterion(model(images), feature["weak"], target, return_parts=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 5) == 0:
            shown = "  ".join(f"{name} {value.item():.3f}" for name, value in parts._asdict().items())
            print(f"step {step:4}  loss {loss.item():.3f}  parts: {shown}")
    with torch.no_grad():
        images, target = make_images(2000, seed=0)
        print(f"accuracy {(model(images).argmax(1) == target).float().mean().item():.1%}")


if __name__ == "__main__":
    main()
