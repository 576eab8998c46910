"""Other packages with a loss of the same value, where they are installed: liger-kernel and mdistiller.

Neither is a dependency of this project. Both work in the dtype of the logits, as the published forms do.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch.nn.functional as F

from benchmarks.forms.spec import LossFunction, Provider


def _no_liger(device: str) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None if device == "cuda" else "liger-kernel's kernels need a GPU"


def _no_mdistiller(device: str) -> str | None:
    if importlib.util.find_spec("mdistiller") is None:
        return "mdistiller is not installed; it is on GitHub only, not on PyPI"
    if importlib.util.find_spec("scipy") is None:
        return "mdistiller needs scipy, which is not installed"
    return None


def liger_kl_div(temperature: float) -> LossFunction:
    """T² KL(q(T) ‖ p(T)). It takes log-probabilities and probabilities, so a user pays for making them."""
    kl_div = importlib.import_module("liger_kernel.transformers").LigerKLDIVLoss(reduction="batchmean")
    return lambda student_logits, teacher_logits, target: (
        temperature**2
        * kl_div(F.log_softmax(student_logits / temperature, dim=-1), F.softmax(teacher_logits / temperature, dim=-1))
    )


def liger_js() -> LossFunction:
    """It takes log-probabilities of both."""
    divergence = importlib.import_module("liger_kernel.transformers").LigerJSD(beta=0.5)
    return lambda student_logits, teacher_logits, target: divergence(
        F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    )


def mdistiller_kd() -> LossFunction:
    # By module: the package has a class of the same name in its place.
    function = importlib.import_module("mdistiller.distillers.KD").kd_loss
    return lambda student_logits, teacher_logits, target: function(student_logits, teacher_logits, 4.0)


def mdistiller_dkd() -> LossFunction:
    function = importlib.import_module("mdistiller.distillers.DKD").dkd_loss
    return lambda student_logits, teacher_logits, target: function(
        student_logits, teacher_logits, target, 1.0, 8.0, 4.0
    )


#: Beside NKD, which it has not: a loss of like cost.
LIGER_BESIDE_NKD = Provider(
    "liger",
    "liger-kernel's KL divergence, a peer: another loss",
    lambda: liger_kl_div(1.0),
    _no_liger,
    same_loss=False,
)
LIGER_KD = Provider(
    "liger",
    "liger-kernel's KL divergence with the softmaxes it needs",
    lambda: liger_kl_div(4.0),
    _no_liger,
    as_published=True,
)
LIGER_JS = Provider(
    "liger",
    "liger-kernel's JSD with the softmaxes it needs",
    liger_js,
    _no_liger,
    as_published=True,
)
MDISTILLER_KD = Provider("mdistiller", "mdistiller's kd_loss", mdistiller_kd, _no_mdistiller, as_published=True)
MDISTILLER_DKD = Provider("mdistiller", "mdistiller's dkd_loss", mdistiller_dkd, _no_mdistiller, as_published=True)
