"""Who is measured: one registry entry per loss, one entry per provider of it.

A loss is its providers, its float64 reference and its byte floor. Adding one means adding an entry to LOSSES.
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

from benchmarks import nkd

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # (student_logits, teacher_logits, target) -> scalar


@dataclass(frozen=True)
class Provider:
    name: str
    summary: str
    build: Callable[[], LossFunction]  # called once per case, so that a compiler starts afresh on each shape
    unavailable: Callable[[str], str | None] = lambda device: None  # device -> why it cannot run there
    same_loss: bool = True  # False: computes something else, so its values are not compared with the reference


@dataclass(frozen=True)
class Loss:
    name: str
    title: str
    providers: tuple[Provider, ...]
    # (float64 student, float64 teacher, target) -> sum over the rows. Rows are independent unless batch_coupled.
    reference_sum: LossFunction
    floor: Callable[[int], int]  # bytes per logit -> bytes per element that forward + backward must move at the least
    batch_coupled: bool = False

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


def _fused_kd() -> LossFunction:
    import fused_kd

    return lambda student_logits, teacher_logits, target: fused_kd.nkd_loss(student_logits, teacher_logits, target)


def _reference(reduction: str = "mean") -> LossFunction:
    import fused_kd

    def call(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        result = fused_kd.reference.nkd_loss(student_logits, teacher_logits, target, reduction=reduction)
        return result[0] if isinstance(result, tuple) else result  # (loss, parts)

    return call


def _reference_sum(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    return _reference("sum")(student_logits, teacher_logits, target)


def _compiled() -> LossFunction:
    return torch.compile(nkd.mask_free, dynamic=False, fullgraph=True)


def _cross_entropy() -> LossFunction:
    return lambda student_logits, teacher_logits, target: F.cross_entropy(student_logits, target)


def _liger() -> LossFunction:
    kl_div = importlib.import_module("liger_kernel.transformers").LigerKLDIVLoss(reduction="batchmean")
    # It takes log-probabilities and probabilities, so a user pays for making them.
    return lambda student_logits, teacher_logits, target: kl_div(
        F.log_softmax(student_logits, dim=-1), F.softmax(teacher_logits, dim=-1)
    )


NKD = Loss(
    name="nkd",
    title="NKD loss",
    providers=(
        Provider("published", "published eager form: boolean masks pick the non-target logits", lambda: nkd.published),
        Provider("reference", "mask-free eager form, fused_kd.reference.nkd_loss", _reference),
        Provider("compile", "torch.compile of a lean mask-free form", _compiled, _no_compiler),
        Provider("cross_entropy", "F.cross_entropy, a yardstick: another loss", _cross_entropy, same_loss=False),
        Provider("liger", "liger-kernel's KL divergence, a peer: another loss", _liger, _no_liger, same_loss=False),
        Provider("fused_kd", "fused_kd.nkd_loss, backend auto", _fused_kd),
    ),
    reference_sum=_reference_sum,
    floor=lambda itemsize: 3 * itemsize,  # read both logits once, write the gradient once
)

LOSSES = {loss.name: loss for loss in (NKD,)}
