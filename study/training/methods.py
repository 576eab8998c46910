"""The losses by name: their inputs, hyper-parameters, and calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_kd
from fused_kd import TopK
from study.training.errors import RunError
from study.training.networks import Outputs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: fused_kd's losses, by name with hyphens.
LOSSES = {loss.name.replace("_", "-"): loss for loss in fused_kd.catalogue()}
NAMES = ("ce", "label-smoothing", *LOSSES)
BACKENDS = ("auto", "native", "triton", "reference")

#: The loss, and its detached parts, which sum to it.
Value = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """A loss as a function of the student's outputs, the teacher's logits and the target.

    ``other`` is its second argument after the student's logits: ``"teacher_logits"``, ``"weak_logits"``,
    ``"dense_logits"`` or None.
    """

    name: str
    other: str | None
    call: Callable[[Outputs, Tensor | TopK | None, Tensor], Value]

    @property
    def needs_teacher(self) -> bool:
        return self.other == "teacher_logits"


def defaults(name: str) -> dict[str, Any]:
    """Hyper-parameters and their defaults: fused_kd's, but with weight 1 for the ordinary cross-entropy, as in the
    papers' totals. NKD also has the weight of its target term, which is 1 in the paper and in fused_kd."""
    if name in LOSSES:
        own = {"target_weight": 1.0} if name == "nkd" else {}
        return {**LOSSES[name].defaults, "ce_weight": 1.0, **own}
    return {"label_smoothing": 0.1 if name == "label-smoothing" else 0.0}


def build(name: str, settings: Sequence[str], backend: str, process_group: ProcessGroup | None = None) -> Method:
    """Build the method ``name``; ``settings`` such as ``"gamma=1"`` override defaults.

    Raises:
        RunError: A hyper-parameter is unknown, or its value has the wrong type.
    """
    options = {**defaults(name), **_parse(name, settings)}
    method = _of_fused_kd(name, options, backend, process_group) if name in LOSSES else _cross_entropy(name, options)
    if name not in LOSSES and backend != "auto":
        raise RunError(f"--backend {backend}: --loss {name} is PyTorch's cross-entropy and has no backends")
    return method


def described(name: str, backend: str, device: torch.device) -> str:
    """The loss, with the backend that runs it."""
    if name not in LOSSES:
        return name
    taken = fused_kd.explain(device, LOSSES[name].name).chosen if backend == "auto" else backend
    return f"{name} ({taken})"


def check(method: Method, classes: int, device: torch.device) -> list[str]:
    """Call the method on logits of two rows, and return the names of its parts.

    Raises:
        RunError: The loss rejects its hyper-parameters, or its backend cannot run on ``device``.
    """
    logits = torch.zeros(2, classes, device=device)
    outputs = Outputs(logits, logits, logits.unsqueeze(1))
    try:
        parts = method.call(outputs, logits, torch.zeros(2, dtype=torch.int64, device=device))[1]
    except (TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"--loss {method.name}: {' '.join(str(error).split())}") from None
    return list(parts)


def _parse(name: str, settings: Sequence[str]) -> dict[str, Any]:
    known, options = defaults(name), {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in known:
            raise RunError(f"--set {setting}: expected NAME=VALUE with a hyper-parameter of {name}: {', '.join(known)}")
        options[key] = _value(setting, text, known[key])
    return options


def _value(setting: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise RunError(f"--set {setting}: expected true or false")
        return text.lower() == "true"
    if isinstance(default, str):
        return text
    try:
        return float(text)
    except ValueError:
        raise RunError(f"--set {setting}: expected a number") from None


def _cross_entropy(name: str, options: dict[str, Any]) -> Method:
    def call(outputs: Outputs, teacher_logits: Tensor | TopK | None, target: Tensor) -> Value:
        loss = F.cross_entropy(outputs.logits.float(), target, **options)
        return loss, {"ce": loss.detach()}

    return Method(name, None, call)


def _of_fused_kd(name: str, options: dict[str, Any], backend: str, process_group: ProcessGroup | None) -> Method:
    function = getattr(fused_kd, LOSSES[name].function)
    signature = inspect.signature(function).parameters
    other = next((key for key in ("teacher_logits", "weak_logits", "dense_logits") if key in signature), None)
    keywords = {**options, "backend": backend}
    target_weight = keywords.pop("target_weight", 1.0)
    if "process_group" in signature:
        keywords["process_group"] = process_group

    def call(outputs: Outputs, teacher_logits: Tensor | TopK | None, target: Tensor) -> Value:
        second = {"teacher_logits": teacher_logits, "weak_logits": outputs.weak, "dense_logits": outputs.dense}
        tensors = {} if other is None else {other: second[other]}
        loss, parts = function(outputs.logits, target=target, **tensors, **keywords, return_parts=True)
        found = parts._asdict()
        if target_weight != 1:  # with gamma=0 and ce_weight=0, NKD is its target term
            alone = function(outputs.logits, target=target, **tensors, **{**keywords, "gamma": 0.0, "ce_weight": 0.0})
            loss, found["target"] = loss + (target_weight - 1) * alone, target_weight * found["target"]
        return loss, found

    return Method(name, other, call)
