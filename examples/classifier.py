"""Distil a classifier with NKD: a small network learns from labels and a larger network. Half a minute on a laptop.

    python examples/classifier.py

The data are synthetic: noisy points around a random centre per class. In your own training only `criterion` is new.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_kd import NKDLoss

FEATURES, CLASSES = 32, 200


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


def make_data(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy points around a random centre per class."""
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(CLASSES, (rows,), generator=generator)
    return centres[target] + 1.3 * torch.randn(rows, FEATURES, generator=generator), target


def train(model: nn.Module, teacher: nn.Module | None, steps: int) -> float:
    """Train with a teacher or with labels alone; return the accuracy on the test set."""
    inputs, target = make_data(8192, seed=1)
    criterion = NKDLoss(gamma=1.5, temperature=1.0, ce_weight=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        rows = torch.randint(len(inputs), (256,), generator=torch.Generator().manual_seed(step))
        student_logits = model(inputs[rows])
        if teacher is None:
            loss = F.cross_entropy(student_logits, target[rows])
        else:
            with torch.no_grad():
                teacher_logits = teacher(inputs[rows])
            loss = criterion(student_logits, teacher_logits, target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        test_inputs, test_target = make_data(8192, seed=2)
        return (model(test_inputs).argmax(1) == test_target).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="per training, default: %(default)s")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    teacher, student = network(512), network(48)
    alone = network(48)
    alone.load_state_dict(student.state_dict())
    print(f"teacher                  {train(teacher, None, steps):.1%}")
    print(f"student, labels alone    {train(alone, None, steps):.1%}")
    print(f"student, with NKD        {train(student, teacher.eval(), steps):.1%}")


if __name__ == "__main__":
    main()
