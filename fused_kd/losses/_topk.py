"""Checks of a top-k teacher (:class:`fused_kd.sources.TopK`), and its rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fused_kd import backends
from fused_kd.backends import topk
from fused_kd.core import checks
from fused_kd.core.catalogue import LOSSES, as_run
from fused_kd.core.rows import SourceRows
from fused_kd.core.stored import counted_rows
from fused_kd.core.transforms import readable
from fused_kd.reference.topk import RESTS, check_rest
from fused_kd.sources import TopK


def topk_rows(given: TopK, shape: tuple[int, ...]) -> SourceRows:
    """Check a top-k teacher for student logits of this ``shape``, and flatten it to rows."""
    log_probs = checks.check_logits("teacher_logits.log_probs", given.log_probs)
    indices = checks.check_tensor("teacher_logits.indices", given.indices, "a Tensor of integers")
    if indices.dtype not in checks.INDEX_DTYPES:
        raise TypeError(f"teacher_logits.indices: expected a Tensor of integers, got {indices.dtype}")
    checks.check_choice("teacher_logits.rest", given.rest, RESTS)
    kept = log_probs.shape[-1]
    if tuple(log_probs.shape[:-1]) != shape[:-1] or not 1 <= kept <= shape[-1]:
        raise ValueError(
            f"teacher_logits.log_probs: expected shape ({', '.join(map(str, (*shape[:-1], 'k')))}), k from 1 to the "
            f"{shape[-1]} classes, got {tuple(log_probs.shape)}"
        )
    if indices.shape != log_probs.shape or indices.device != log_probs.device:
        raise ValueError(
            f"teacher_logits.indices: expected the shape and device of log_probs, {tuple(log_probs.shape)} on "
            f"{log_probs.device}, got {tuple(indices.shape)} on {indices.device}"
        )
    return SourceRows(log_probs.reshape(-1, kept), indices=indices.reshape(-1, kept).to(torch.int64), rest=given.rest)


def kernel_or_reference(
    name: str, rest: str, numbers: Mapping[str, float], backend: tuple[str, str], shared_labels: bool
) -> str:
    """Return the backend for a TopK: the chosen one if it can run the loss with that rest, else the reference.
    ``backend`` has the requested one and the chosen one. ``shared_labels``: the target has probabilities, of sharded
    classes.

    Raises:
        ValueError, NotImplementedError: The loss has no meaning with that rest.
        RuntimeError: The requested backend has no kernel for it.
    """
    asked, chosen = backend
    beta = numbers.get("beta", 0.0)
    check_rest(name, rest, beta)
    if rest in topk.DENSE or (topk.is_fused(as_run(name, beta), rest) and not shared_labels):
        return chosen
    labels = " and probability targets of sharded classes" if shared_labels else ""
    what = f"{LOSSES[name].title} with a TopK of rest={rest!r}{labels}"
    if asked != "auto":
        raise RuntimeError(f"backend {asked!r} cannot run {what}: no kernel supports that; use backend='reference'")
    backends.warn_of_reference(what, "since no kernel supports that", what)
    return "reference"


def check_log_probs(teacher: SourceRows, target: Tensor, weight: Tensor | None, ignore_index: int) -> None:
    """Raise if the kept probabilities of a row that counts sum to more than 1, as with logits instead of
    log-probabilities. Checks only readable values. With ``"renormalize"`` only differences matter."""
    if teacher.rest == "renormalize" or not readable(teacher.values):
        return
    sums = teacher.values.detach().float().exp()
    if teacher.indices is not None:
        sums = sums.masked_fill(teacher.indices < 0, 0.0)
    sums = sums.sum(1)
    # Probabilities from bfloat16 logarithms miss 1 by up to three per cent. As in csrc/python/direct.cpp.
    bad = (sums > 1.05) & counted_rows(weight, target, ignore_index)
    if bool(bad.any()):
        raise ValueError(
            "teacher_logits.log_probs: expected log-probabilities, whose exponentials sum to at most 1 in a row; got a "
            f"row that sums to {float(sums[bad][0]):.3g}. Apply log_softmax over all classes before topk, or take "
            "TopK.from_logits"
        )
