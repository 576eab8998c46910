"""The choice of the implementation, with the reasons against the others.

A backend is a module with one function per op of :mod:`fused_kd.ops`, and ``unavailable(device) -> str | None``: the
reason why it cannot run tensors of a device such as "cpu" or "cuda:1", or None. The reference needs no module: it is
ordinary autograd.

These functions take checked rows: logits ``(N, C)``, the target ``(N,)`` int64 or ``(N, C)``, and ``factors``, float64
``(1 + gradients, N)`` or None (:func:`fused_kd.core.stored.row_factors`). They return what their op does.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd.backends import cuda_devices, native, triton
from fused_kd.core import checks
from fused_kd.core.catalogue import LOSSES

_MODULES: dict[str, ModuleType] = {"native": native, "triton": triton}
#: In the order in which ``"auto"`` prefers them.
BACKENDS = ("native", "triton", "reference")


def get(name: str) -> ModuleType:
    return _MODULES[name]


def unavailable(name: str, device: torch.device | str, loss: str = "nkd") -> str | None:
    """Return why this backend cannot run a loss on a device, or None if it can."""
    if name == "reference":
        return None
    device = torch.device(device)
    # Triton's interpreter runs the kernels for GPUs on the CPU.
    kind = "cuda" if name == "triton" else device.type
    if name not in LOSSES[loss].backends.get(kind, BACKENDS):
        return f"it has no kernel of {LOSSES[loss].title} for {device.type} tensors"
    return _MODULES[name].unavailable(str(device))  # type: ignore[no-any-return]


def check_name(backend: str) -> None:
    """Raise a ValueError unless ``backend`` is "auto" or a backend, whether or not that can run here."""
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


#: The choices, by backend, device and loss. The device, not its type: GPUs of one machine may differ.
_chosen: dict[tuple[str, torch.device | str, str], str] = {}


def _choose(backend: str, device: torch.device | str, loss: str) -> str:
    device = cuda_devices.resolved(device)
    if backend == "auto":
        choice = _best(device, loss)
        if choice == "reference":
            _warn_of_slow(device, loss)
    else:
        reason = unavailable(backend, device, loss)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot run {device} tensors here: {reason}")
        choice = backend
    _chosen[backend, device, loss] = choice
    return choice


def _best(device: torch.device, loss: str) -> str:
    order = [name for name in BACKENDS if _by_name_alone(name, device.type) is None]
    return next(name for name in order if unavailable(name, device, loss) is None)


def _by_name_alone(name: str, device_type: str) -> str | None:
    """Return why "auto" does not take a backend although it can run, or None if it does."""
    if name == "triton" and device_type != "cuda":  # a thousand times slower
        return "can run, but only through Triton's interpreter, which is for tests"
    if name == "triton" and torch.version.hip:
        return (
            "can run by name only: its kernels compile for AMD GPUs, but none has run them yet; "
            "`python -m fused_kd check` compares them with float64"
        )
    return None


def _warn_of_slow(device: torch.device, loss: str) -> None:
    """Warn once per process, and only on devices that a kernel supports: on others there is nothing to fix."""
    names = [name for name in LOSSES[loss].backends.get(device.type, ()) if name != "reference"]
    if not names:
        return
    reasons = "; ".join(
        f"{name}: {unavailable(name, device, loss) or _by_name_alone(name, device.type)}" for name in names
    )
    what = f"{LOSSES[loss].title} of {device} tensors"
    warn_of_reference(what, f"which is slower and takes more memory than the fused kernels. {reasons}", "slow")


_warned: set[str] = set()


def warn_of_reference(what: str, why: str, kind: str) -> None:
    """Warn once per process for each ``kind`` of reason."""
    if kind in _warned:
        return
    _warned.add(kind)
    warnings.warn(
        f"fused_kd runs {what} with the eager reference, {why}. Pass backend='reference' to silence this warning.",
        RuntimeWarning,
        stacklevel=_outside(),
    )


def _outside() -> int:
    """Return the stacklevel, for the calling function, of the first caller outside of fused_kd."""
    frame, level, package = sys._getframe(1), 1, str(Path(__file__).parent.parent)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    return level


# In a compiled graph too, while it is traced. This is what torch.compiler.assume_constant_result does; the decorator
# itself imports the whole compiler.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
warn_of_reference._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(backend: str, device: torch.device | str, loss: str = "nkd") -> str:
    """Return the backend for a call: the named one, or for ``"auto"`` the best that can run.

    Raises:
        RuntimeError: The named backend cannot run this loss on that device. The message has the reason.
    """
    if torch.compiler.is_compiling():
        return _choose(backend, device, loss)
    return _chosen.get((backend, device, loss)) or _choose(backend, device, loss)


class Explanation(NamedTuple):
    """The backend that ``backend="auto"`` takes for a loss, and the reasons against the others."""

    device: torch.device
    chosen: str
    reasons: dict[str, str]
    loss: str = "nkd"
    how: tuple[str, ...] = ()  #: how sources run

    @property
    def device_type(self) -> str:
        return self.device.type

    def __str__(self) -> str:
        return self.text(f"{LOSSES[self.loss].title} of {self.device} tensors")

    def text(self, subject: str) -> str:
        """As ``str``, with another subject."""
        lines = [f"{subject}: auto takes {self.chosen!r}"]
        lines += [f"  {name:<10} {reason}" for name, reason in self.reasons.items()]
        lines += [f"  {line}" for line in self.how]
        return "\n".join(lines)


def explain(student_logits: Tensor | torch.device | str = "cpu", loss: str = "nkd") -> Explanation:
    """See :func:`fused_kd.explain`, which takes more than tensors."""
    checks.check_choice("loss", loss, tuple(LOSSES))
    if not isinstance(student_logits, (Tensor, torch.device, str)):
        given = type(student_logits).__name__
        raise TypeError(f"student_logits: expected a Tensor, a Head, a ClassShard or a device, got {given}")
    device = student_logits.device if isinstance(student_logits, Tensor) else cuda_devices.resolved(student_logits)
    chosen = _best(device, loss)
    reasons = {name: unavailable(name, device, loss) or _passed_over(name, device.type) for name in BACKENDS}
    reasons[chosen] = "chosen"
    return Explanation(device, chosen, reasons, loss)


def _passed_over(name: str, device_type: str) -> str:
    if name == "reference":
        return "can run; the fused kernels are faster and save memory"
    return _by_name_alone(name, device_type) or "can run, in more launches than the kernels that were built with CUDA"
