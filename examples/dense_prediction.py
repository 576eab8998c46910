"""Distil a segmentation network pixel by pixel: logits (N, C, H, W), as for F.cross_entropy. A few seconds.

python examples/dense_prediction.py
"""

import argparse

import torch
from torch import Tensor, nn

from fused_kd import NKDLoss

CLASSES, UNKNOWN = 21, 255


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 5, padding=2), nn.ReLU(), nn.Conv2d(width, width, 5, padding=2), nn.ReLU(),
        nn.Conv2d(width, CLASSES, 1),
    )  # fmt: skip


def make_images(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of rectangles with one colour per class; some pixels have no label."""
    colours = torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    target = torch.zeros(rows, 32, 32, dtype=torch.int64)
    for number in range(rows):
        for _ in range(4):
            top, left, label = torch.randint(CLASSES, (3,), generator=generator).tolist()
            target[number, top : top + 12, left : left + 12] = label
    images = colours[target].movedim(-1, 1) + 0.7 * torch.randn(rows, 3, 32, 32, generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = UNKNOWN
    return images, target


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="per training, default: %(default)s")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    teacher, student = network(48), network(8)
    criterion = NKDLoss(class_dim=1, ignore_index=UNKNOWN, ce_weight=1.0)  # the classes are dimension 1
    for name, model in (("teacher", teacher), ("student", student)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(steps):
            images, target = make_images(8, seed=1 + step)
            logits = model(images)
            if model is teacher:
                loss = nn.functional.cross_entropy(logits, target, ignore_index=UNKNOWN)
            else:
                with torch.no_grad():
                    teacher_logits = teacher(images)
                loss = criterion(logits, teacher_logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            images, target = make_images(64, seed=0)
            right = (model(images).argmax(1) == target)[target != UNKNOWN]
        print(f"{name}: {right.float().mean().item():.1%} of the pixels")


if __name__ == "__main__":
    main()
