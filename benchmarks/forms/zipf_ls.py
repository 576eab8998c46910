"""Zipf's label smoothing: two forms to compare fused_kd with.

Both take dense logits (rows, positions, classes), with argmaxes as votes, and class indices as targets. They use the
weight 0.1 and the power 1 of the ImageNet recipe and the mean over the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.forms.nkd import accumulating

WEIGHT = 0.1


def published(
    student_logits: Tensor, dense_logits: Tensor, target: Tensor, weight: float = WEIGHT, power: float = 1.0
) -> Tensor:
    """Zipf's LS with the operations of the authors' release (megvii-research/zipfls), rewritten.

    PyTorch counts the votes on the CPU even if the logits are on a GPU; numpy ranks and normalises them in float64.
    Boolean masks pick the non-target entries.
    """
    rows, classes = student_logits.shape
    index = target.unsqueeze(1)
    votes_for = dense_logits.detach().argmax(dim=2).cpu()
    votes = torch.zeros(rows, max(classes, votes_for.shape[1]))
    votes = votes.scatter_add(1, votes_for, torch.ones_like(votes))[:, :classes]
    others = torch.ones(rows, classes).scatter_(1, index.cpu(), 0.0).bool().numpy()
    zipf = (1 / _ranks(-votes.numpy())) ** power
    zipf = zipf[others].reshape(rows, classes - 1)
    zipf = zipf / zipf.sum(axis=1, keepdims=True)
    # The release uses float32 here: half-precision logits are promoted to it, but float64 must not be rounded to it.
    precision = torch.promote_types(student_logits.dtype, torch.float32)
    label = torch.from_numpy(zipf).to(precision).to(student_logits.device)

    mask = torch.ones_like(student_logits).scatter_(1, index, 0.0).bool()
    log_p_hat = F.log_softmax(student_logits[mask].view(rows, classes - 1), dim=1)
    return weight * F.kl_div(log_p_hat, label, reduction="none").sum(dim=1).mean()


def _ranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rank each row from the smallest value; equal values share the lowest rank.

    The same as scipy.stats.rankdata with method="min", in one sort and a few passes, but without SciPy.
    """
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    starts = np.ones(values.shape, dtype=bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    places = np.broadcast_to(np.arange(1, values.shape[1] + 1), values.shape)
    lengths = np.diff(np.flatnonzero(starts), append=values.size)
    ranks = np.empty(values.shape, dtype=np.int64)
    np.put_along_axis(ranks, order, np.repeat(places[starts], lengths).reshape(values.shape), axis=1)
    return ranks


def mask_free(student_logits: Tensor, dense_logits: Tensor, target: Tensor) -> Tensor:
    """Zipf's LS without masks or sorting: one graph with static shapes, which a compiler fuses best.

    Vote counts range from 0 to the number of positions, so a row's ranks are a table: for each count, the number of
    classes with more votes.
    """
    s = accumulating(student_logits)
    rows, classes = s.shape
    index = target.unsqueeze(1)
    chosen = dense_logits.detach().argmax(dim=2)
    votes = torch.zeros(rows, classes, dtype=torch.int64, device=s.device)
    votes = votes.scatter_add(1, chosen, torch.ones_like(chosen))
    numbers = torch.arange(chosen.shape[1] + 1, device=s.device)
    # Each position contributes 1 / votes to the class it chose, so the contributions to a class add up to 1.
    own = votes.gather(1, chosen)
    more = ((own.unsqueeze(2) > numbers) / own.unsqueeze(2)).sum(1)
    zipf = (1 / (1 + more.round())).to(s.dtype).gather(1, votes)
    others = zipf.scatter(1, index, 0.0)
    label = others / others.sum(1, keepdim=True)
    log_sum = s.scatter(1, index, float("-inf")).logsumexp(1)
    entropy = torch.special.entr(label).sum(1)
    loss: Tensor = log_sum - (label * s).sum(1) - entropy
    return WEIGHT * loss.mean()
