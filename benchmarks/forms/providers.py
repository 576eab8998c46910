"""The losses and their providers, the forms that are measured. To add a loss, add an entry to LOSSES."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.forms import dist, nkd, peers, teacher, uskd, zipf_ls
from benchmarks.forms.spec import OURS, Loss, LossFunction, Provider
from benchmarks.measure.cases import DEFAULT_SHAPES


def _no_compiler(device: str) -> str | None:
    if device == "cpu":
        candidates = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
        if not any(name and shutil.which(name) for name in candidates):
            return "torch.compile needs a C++ compiler on CPU and none was found"
        return None
    return None if importlib.util.find_spec("triton") else "torch.compile needs triton on a GPU"


def _compiled(function: LossFunction, summary: str, as_published: bool = False) -> Provider:
    return Provider(
        "compile",
        summary,
        lambda: torch.compile(function, dynamic=False, fullgraph=True),
        _no_compiler,
        as_published=as_published,
    )


def _published(function: LossFunction, summary: str) -> Provider:
    return Provider("published", summary, lambda: function, as_published=True, log_softmax=True)


def _call(module: str | None, name: str, alone: bool, **options: Any) -> LossFunction:
    """Call ``name`` of fused_kd or of its ``module``; ``alone``: the loss takes no other logits."""
    import fused_kd

    function: Callable[..., Any] = getattr(getattr(fused_kd, module) if module else fused_kd, name)

    def call(student_logits: Tensor, other_logits: Tensor, target: Tensor) -> Tensor:
        logits = (student_logits,) if alone else (student_logits, other_logits)
        result = function(*logits, target, **options)
        value: Tensor = result[0] if isinstance(result, tuple) else result
        return value

    return call


def _fused(name: str, alone: bool = False) -> Provider:
    summary = f"fused_kd.{name}_loss, backend auto"
    return Provider(OURS, summary, lambda: _call(None, f"{name}_loss", alone), partial(only_reference, name))


def only_reference(loss: str, device: str) -> str | None:
    """Why backend="auto" would run the eager reference, which must not be timed as fused_kd; None if it would not."""
    from fused_kd import backends

    found = backends.explain(device, loss)
    if found.chosen != "reference":
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in found.reasons.items() if name != "reference")


def _reference(name: str, summary: str, alone: bool = False) -> Provider:
    text = f"{summary}, fused_kd.reference.{name}_loss"
    return Provider("reference", text, lambda: _call("reference", f"{name}_loss", alone), log_softmax=True)


def _reference_sum(name: str, alone: bool = False) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    return lambda student, other, target, batch_sums: _call("reference", f"{name}_loss", alone, reduction="sum")(
        student, other, target
    )


def _uskd_sum(student: Tensor, weak: Tensor, target: Tensor, batch_sums: Tensor | None) -> Tensor:
    return _call("reference", "uskd_loss", False, reduction="sum", batch_sums=batch_sums)(student, weak, target)


def _uskd_batch_sums(student: Tensor, target: Tensor) -> Tensor:
    import fused_kd

    return fused_kd.reference.uskd_batch_sums(student, target)


_CROSS_ENTROPY = Provider(
    "cross_entropy",
    "F.cross_entropy, a yardstick: another loss",
    lambda: lambda student_logits, other_logits, target: F.cross_entropy(student_logits, target),
    same_loss=False,
)

NKD = Loss(
    name="nkd",
    title="NKD loss",
    providers=(
        _published(nkd.published, "published eager form: boolean masks pick the non-target logits"),
        _reference("nkd", "mask-free eager form"),
        _compiled(nkd.mask_free, "torch.compile of a lean mask-free form"),
        _CROSS_ENTROPY,
        peers.LIGER_BESIDE_NKD,
        peers.QUACK_BESIDE_NKD,
        _fused("nkd"),
    ),
    reference_sum=_reference_sum("nkd"),
    floor=lambda itemsize: 3 * itemsize,  # read both logits once, write the gradient once
)

USKD = Loss(
    name="uskd",
    title="USKD loss",
    providers=(
        _published(uskd.published, "published eager form: two sorts, boolean masks pick the non-target entries"),
        _reference("uskd", "mask-free eager form with one sort"),
        _compiled(uskd.mask_free, "torch.compile of a lean mask-free form with one sort"),
        _CROSS_ENTROPY,
        _fused("uskd"),
    ),
    reference_sum=_uskd_sum,
    floor=lambda itemsize: 4 * itemsize,  # read both logits once, write both gradients once
    trains_other=True,
    batch_sums=_uskd_batch_sums,
    rank_keys=uskd.rank_keys,
    swaps=uskd.explain_by_swaps,
    label_sum=uskd.explain_by_label_sum,
)


def _further(
    name: str, title: str, published: LossFunction, *others: Provider, alone: bool = False, **about: Any
) -> Loss:
    """A loss with a published form without boolean masks, so the same form is compiled."""
    return Loss(
        name=name,
        title=title,
        providers=(
            _published(published, "published eager form"),
            _reference(name, "eager form with every check", alone),
            _compiled(published, "torch.compile of the published form", as_published=True),
            _CROSS_ENTROPY,
            *others,
            _fused(name, alone),
        ),
        reference_sum=_reference_sum(name, alone),
        # Read the student's and any other logits once, write the gradient once.
        **{"floor": lambda itemsize: (2 if alone else 3) * itemsize, **about},
    )


KD = _further(
    "kd", "KD loss", teacher.kd, peers.LIGER_KD, peers.SPECULATORS_KD, peers.MDISTILLER_KD,
    magnitude=teacher.kd_magnitude,
)  # fmt: skip
DKD = _further("dkd", "DKD loss", teacher.dkd, peers.MDISTILLER_DKD, magnitude=teacher.dkd_magnitude)
WSLD = _further("wsld", "WSLD loss", teacher.wsld)
# No magnitude: no student gets close to Tf-KD's nearly uniform label, so its value is not a small difference.
TF_KD = _further("tf_kd", "Tf-KD loss", teacher.tf_kd, alone=True)
JS = _further("js", "JS loss", teacher.js, peers.LIGER_JS, peers.SPECULATORS_JS, magnitude=teacher.js_magnitude)
DIST = _further(
    "dist",
    "DIST loss",
    dist.published,
    # The gradient needs the statistics of the columns, which need those of every row. So both logits are read twice,
    # as a batch does not fit into the caches.
    floor=lambda itemsize: 5 * itemsize,
    whole_batch=True,
    long_row=2**14,  # twice the rounding: it divides by two of PyTorch's norms, which add up in the same way
    shapes={**DEFAULT_SHAPES, "cuda": DEFAULT_SHAPES["cuda"][:-1]},  # eager forms keep too many copies of the last
)

POSITIONS = 49  # the 7×7 map of a network before its pooling, at 224×224 pixels
ZIPF_LS = Loss(
    name="zipf_ls",
    title="Zipf's LS loss",
    providers=(
        _published(zipf_ls.published, "published eager form: numpy ranks the votes, boolean masks pick the others"),
        _reference("zipf_ls", "mask-free eager form with one sort"),
        _compiled(zipf_ls.mask_free, "torch.compile of a lean mask-free form without a sort"),
        _CROSS_ENTROPY,
        _fused("zipf_ls"),
    ),
    reference_sum=_reference_sum("zipf_ls"),
    floor=lambda itemsize: (2 + POSITIONS) * itemsize,  # read the dense logits too
    positions=POSITIONS,
    # The dense logits are 49 times as large as those of the other losses.
    shapes={"cpu": ((256, 1000), (128, 21841)), "cuda": ((1024, 1000), (8192, 1000), (256, 21841))},
)

LOSSES = {loss.name: loss for loss in (NKD, USKD, KD, DKD, WSLD, TF_KD, JS, DIST, ZIPF_LS)}
#: Losses measured by default.
HEADLINE = ("nkd", "uskd")
