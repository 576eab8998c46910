"""Who is measured: one registry entry per loss, one entry per provider of it.

A loss is its providers, its float64 reference and its byte floor; one that ranks says how as well. Adding one means
adding an entry to LOSSES.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import nkd, uskd

# (student_logits, teacher's or weak logits, target) -> scalar
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    name: str
    summary: str
    build: Callable[[], LossFunction]  # called once per case, so that a compiler starts afresh on each shape
    unavailable: Callable[[str], str | None] = lambda device: None  # device -> why it cannot run there
    same_loss: bool = True  # False: computes something else, so its values are not compared with the reference
    as_published: bool = False  # in the dtype of the logits and with 1 - p as written, which the comparison allows for


@dataclass(frozen=True)
class Loss:
    name: str
    title: str
    providers: tuple[Provider, ...]
    # (float64 student, float64 other logits, target, batch sums) -> sum over these rows, which may be a part of all.
    reference_sum: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    floor: Callable[[int], int]  # bytes per logit -> bytes per element that forward + backward must move at the least
    trains_other: bool = False  # the gradient of the other logits is wanted as well: they are not a teacher's
    # What couples the rows: (student, target) of a part of the batch -> sums that are added over the parts.
    batch_sums: Callable[[Tensor, Tensor], Tensor] | None = None
    # Of a loss that ranks: the keys, and what exchanged ranks of near-equal keys explain.
    rank_keys: LossFunction | None = None
    swaps: Callable[[Tensor, Tensor, Tensor, torch.dtype, bool], uskd.Swaps] | None = None

    def provider(self, name: str) -> Provider:
        return next(provider for provider in self.providers if provider.name == name)


BASELINE, OURS, COMPILED, YARDSTICK = "published", "fused_kd", "compile", "cross_entropy"


def _no_compiler(device: str) -> str | None:
    if device == "cpu":
        candidates = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
        if not any(name and shutil.which(name) for name in candidates):
            return "torch.compile needs a C++ compiler on CPU and none was found"
        return None
    return None if importlib.util.find_spec("triton") else "torch.compile needs triton on a GPU"


def _no_liger(device: str) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None if device == "cuda" else "liger-kernel's kernels need a GPU"


def _fused_nkd() -> LossFunction:
    import fused_kd

    return lambda student_logits, teacher_logits, target: fused_kd.nkd_loss(student_logits, teacher_logits, target)


def _fused_uskd() -> LossFunction:
    import fused_kd

    return lambda student_logits, weak_logits, target: fused_kd.uskd_loss(student_logits, weak_logits, target)


def _reference_nkd() -> LossFunction:
    import fused_kd

    return lambda student, teacher, target: fused_kd.reference.nkd_loss(student, teacher, target)[0]


def _reference_uskd() -> LossFunction:
    import fused_kd

    return lambda student, weak, target: fused_kd.reference.uskd_loss(student, weak, target)[0]


def _nkd_sum(student: Tensor, teacher: Tensor, target: Tensor, batch_sums: Tensor | None) -> Tensor:
    import fused_kd

    return fused_kd.reference.nkd_loss(student, teacher, target, reduction="sum")[0]


def _uskd_sum(student: Tensor, weak: Tensor, target: Tensor, batch_sums: Tensor | None) -> Tensor:
    import fused_kd

    return fused_kd.reference.uskd_loss(student, weak, target, reduction="sum", batch_sums=batch_sums)[0]


def _uskd_batch_sums(student: Tensor, target: Tensor) -> Tensor:
    import fused_kd

    return fused_kd.reference.uskd_batch_sums(student, target)


def _compiled(function: LossFunction) -> LossFunction:
    return torch.compile(function, dynamic=False, fullgraph=True)


def _cross_entropy() -> LossFunction:
    return lambda student_logits, other_logits, target: F.cross_entropy(student_logits, target)


def _liger() -> LossFunction:
    kl_div = importlib.import_module("liger_kernel.transformers").LigerKLDIVLoss(reduction="batchmean")
    # It takes log-probabilities and probabilities, so a user pays for making them.
    return lambda student_logits, teacher_logits, target: kl_div(
        F.log_softmax(student_logits, dim=-1), F.softmax(teacher_logits, dim=-1)
    )


_CROSS_ENTROPY = Provider(
    "cross_entropy", "F.cross_entropy, a yardstick: another loss", _cross_entropy, same_loss=False
)

NKD = Loss(
    name="nkd",
    title="NKD loss",
    providers=(
        Provider(
            "published",
            "published eager form: boolean masks pick the non-target logits",
            lambda: nkd.published,
            as_published=True,
        ),
        Provider("reference", "mask-free eager form, fused_kd.reference.nkd_loss", _reference_nkd),
        Provider("compile", "torch.compile of a lean mask-free form", lambda: _compiled(nkd.mask_free), _no_compiler),
        _CROSS_ENTROPY,
        Provider("liger", "liger-kernel's KL divergence, a peer: another loss", _liger, _no_liger, same_loss=False),
        Provider("fused_kd", "fused_kd.nkd_loss, backend auto", _fused_nkd),
    ),
    reference_sum=_nkd_sum,
    floor=lambda itemsize: 3 * itemsize,  # read both logits once, write the gradient once
)

USKD = Loss(
    name="uskd",
    title="USKD loss",
    providers=(
        Provider(
            "published",
            "published eager form: two sorts, boolean masks pick the non-target entries",
            lambda: uskd.published,
            as_published=True,
        ),
        Provider("reference", "mask-free eager form with one sort, fused_kd.reference.uskd_loss", _reference_uskd),
        Provider(
            "compile",
            "torch.compile of a lean mask-free form with one sort",
            lambda: _compiled(uskd.mask_free),
            _no_compiler,
        ),
        _CROSS_ENTROPY,
        Provider("fused_kd", "fused_kd.uskd_loss, backend auto", _fused_uskd),
    ),
    reference_sum=_uskd_sum,
    floor=lambda itemsize: 4 * itemsize,  # read both logits once, write both gradients once
    trains_other=True,
    batch_sums=_uskd_batch_sums,
    rank_keys=uskd.rank_keys,
    swaps=uskd.explain_by_swaps,
)

LOSSES = {loss.name: loss for loss in (NKD, USKD)}
