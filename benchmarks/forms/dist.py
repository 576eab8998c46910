"""DIST's published form, rewritten, with the defaults of the ImageNet recipe and the mean over the rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-8  # in the correlation's denominator


def published(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """DIST with the operations of the authors' release (hunto/image_classification_sota).

    It correlates columns as rows of the transposed probabilities. The temperature is from its CIFAR recipe.
    """
    p, q = F.softmax(student_logits / temperature, dim=1), F.softmax(teacher_logits / temperature, dim=1)
    inter = 1 - _correlation(p, q).mean()
    intra = 1 - _correlation(p.transpose(0, 1), q.transpose(0, 1)).mean()
    return (beta * inter + gamma * intra) * temperature**2


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(1).unsqueeze(1), b - b.mean(1).unsqueeze(1)
    norms: Tensor = a.norm(dim=1) * b.norm(dim=1)
    return (a * b).sum(1) / (norms + EPSILON)
