"""Other packages, if installed, with the same loss or one of similar cost.

None is a dependency of this project. liger-kernel and mdistiller compute in the dtype of the logits, as the published
forms do; speculators accumulates in float32.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch.nn.functional as F

from benchmarks.forms.spec import LossFunction, Provider


def _on_a_gpu(package: str, project: str) -> Callable[[str], str | None]:
    """Why a package with GPU kernels cannot run on a device."""

    def reason(device: str) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{project} is not installed"
        return None if device == "cuda" else f"{project}'s kernels need a GPU"

    return reason


_no_liger = _on_a_gpu("liger_kernel", "liger-kernel")
_no_speculators = _on_a_gpu("speculators", "speculators")
_no_quack = _on_a_gpu("quack", "quack-kernels")


def _no_mdistiller(device: str) -> str | None:
    if importlib.util.find_spec("mdistiller") is None:
        return "mdistiller is not installed; it is on GitHub only, not on PyPI"
    if importlib.util.find_spec("scipy") is None:
        return "mdistiller needs scipy, which is not installed"
    return None


def liger_kl_div(temperature: float) -> LossFunction:
    """T² KL(q(T) ‖ p(T)). It takes log-probabilities and probabilities; the time includes making them."""
    kl_div = importlib.import_module("liger_kernel.transformers").LigerKLDIVLoss(reduction="batchmean")
    return lambda student_logits, teacher_logits, target: (
        temperature**2
        * kl_div(F.log_softmax(student_logits / temperature, dim=-1), F.softmax(teacher_logits / temperature, dim=-1))
    )


def liger_js() -> LossFunction:
    """Jensen–Shannon divergence; it takes log-probabilities of both."""
    divergence = importlib.import_module("liger_kernel.transformers").LigerJSD(beta=0.5)
    return lambda student_logits, teacher_logits, target: divergence(
        F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    )


def _speculators(name: str, temperature: float) -> LossFunction:
    """A loss per position of a batch of one, a position per row; its kernels have no temperature."""
    function = getattr(importlib.import_module("speculators.models.fused_losses"), name)
    return lambda student_logits, teacher_logits, target: (
        temperature**2
        * function((student_logits / temperature).unsqueeze(0), (teacher_logits / temperature).unsqueeze(0)).mean()
    )


def quack_cross_entropy() -> LossFunction:
    function = importlib.import_module("quack").cross_entropy
    # A mean would give the backward kernel a gradient with a stride of 0, which it rejects.
    return lambda student_logits, other_logits, target: (
        function(student_logits, target, reduction="none") * (1 / len(target))
    ).sum()


def mdistiller_kd() -> LossFunction:
    # Import by module name: the package replaces the attribute with a class of the same name.
    function = importlib.import_module("mdistiller.distillers.KD").kd_loss
    return lambda student_logits, teacher_logits, target: function(student_logits, teacher_logits, 4.0)


def mdistiller_dkd() -> LossFunction:
    function = importlib.import_module("mdistiller.distillers.DKD").dkd_loss
    return lambda student_logits, teacher_logits, target: function(
        student_logits, teacher_logits, target, 1.0, 8.0, 4.0
    )


#: liger-kernel has no NKD; its KL divergence has a similar cost.
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
SPECULATORS_KD = Provider(
    "speculators",
    "speculators' fused KL divergence of scaled logits",
    lambda: _speculators("fused_kl_div_loss", 4.0),
    _no_speculators,
)
SPECULATORS_JS = Provider(
    "speculators",
    "speculators' fused JSD",
    lambda: _speculators("fused_js_div_loss", 1.0),
    _no_speculators,
)
#: Compared with NKD: a cross-entropy, which reads half as much.
QUACK_BESIDE_NKD = Provider(
    "quack", "QuACK's cross-entropy, a yardstick: another loss", quack_cross_entropy, _no_quack, same_loss=False
)
MDISTILLER_KD = Provider("mdistiller", "mdistiller's kd_loss", mdistiller_kd, _no_mdistiller, as_published=True)
MDISTILLER_DKD = Provider("mdistiller", "mdistiller's dkd_loss", mdistiller_dkd, _no_mdistiller, as_published=True)
