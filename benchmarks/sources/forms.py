"""Forms of a head that are measured: fused_kd's, the form with logits, each of its parts alone, other packages'."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_kd
from benchmarks.sources.case import Case, Inputs
from fused_kd import reference
from fused_kd.backends import sources

#: Returns a scalar to run backward, or None if the call did all the work.
Run = Callable[[], Tensor | None]

LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    "nkd": (fused_kd.nkd_loss, reference.nkd_loss),
    "kd": (fused_kd.kd_loss, reference.kd_loss),
    "js": (fused_kd.js_loss, reference.js_loss),
}
OURS, UNFUSED, PRODUCTS, PRODUCTS_WHOLE, ROW_KERNEL = "fused_kd", "unfused", "products", "products_whole", "row_kernel"
#: Forms without a loss to compare with float64.
BARE = (PRODUCTS, PRODUCTS_WHOLE, ROW_KERNEL)


@dataclass(frozen=True)
class Form:
    name: str
    loss: str  # "": the same for all losses; "ce": cross-entropy without a teacher
    make: Callable[[Inputs, Case], Run]
    unavailable: Callable[[Case], str | None] = lambda case: None
    times: Callable[[Case], int] = lambda case: 1  # runs of ``make``'s function that cover all rows

    @property
    def key(self) -> str:
        return f"{self.name}:{self.loss}" if self.loss else self.name


def chunk_rows(case: Case) -> int:
    """Rows per chunk of fused_kd's head."""
    if case.chunk_rows:
        return min(case.chunk_rows, case.rows)
    empty = torch.empty(case.rows, 0, device=case.device)
    gradient = 0 if case.device == "cpu" else 1  # the C++ core writes it over the student's logits
    return min(sources.fitting_rows(empty, 2, (2 + gradient) * case.classes, case.made), case.rows)


def chunks(case: Case) -> int:
    return -(-case.rows // chunk_rows(case))


def _fused(loss: str) -> Callable[[Inputs, Case], Run]:
    function = LOSSES[loss][0]

    def make(inputs: Inputs, case: Case) -> Run:
        hidden, weight, teacher_hidden, teacher_weight, target = inputs
        rows = case.chunk_rows
        return lambda: function(
            fused_kd.Head(hidden, weight, chunk_rows=rows), fused_kd.Head(teacher_hidden, teacher_weight), target
        )

    return make


def _with_logits(function: Callable[..., Any], inputs: Inputs) -> Run:
    def run() -> Tensor:
        with torch.no_grad():
            teacher = F.linear(inputs.teacher_hidden, inputs.teacher_weight)
        loss: Tensor = function(F.linear(inputs.hidden, inputs.weight), teacher, inputs.target)
        return loss

    return run


def _unfused(loss: str) -> Callable[[Inputs, Case], Run]:
    return lambda inputs, case: _with_logits(LOSSES[loss][0], inputs)


def eager(loss: str, inputs: Inputs) -> Run:
    """A loss by its eager definition on logits, in the dtype of the inputs."""
    if loss == "ce":
        return lambda: F.cross_entropy(F.linear(inputs.hidden, inputs.weight), inputs.target)
    return _with_logits(lambda *logits: LOSSES[loss][1](*logits)[0], inputs)


def _factors(inputs: Inputs, case: Case) -> tuple[list[Tensor], dict[str, Any]]:
    """Both networks' hidden states and weights in the dtype that fused_kd multiplies, and the options of ``mm``.

    Weights are converted here, outside the timed part.
    """
    given = [each.detach() for each in inputs[:4]]
    if case.device == "cuda" and case.dtype in ("float16", "bfloat16"):
        return given, {"out_dtype": torch.float32}
    return [each.to(case.made) for each in given], {}


def _products(inputs: Inputs, case: Case) -> Run:
    """Two products forward and two backward per chunk of rows; the logits serve as their own gradient."""
    (hidden, weight, teacher_hidden, teacher_weight), options = _factors(inputs, case)
    step = chunk_rows(case)
    into = torch.zeros_like(weight, dtype=case.accumulating)

    def run() -> None:
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            logits = torch.mm(hidden[rows], weight.T, **options)
            torch.mm(teacher_hidden[rows], teacher_weight.T, **options)
            gradient = logits.to(weight.dtype)
            torch.mm(gradient, weight, **options)
            if into.dtype == hidden.dtype:
                into.addmm_(gradient.T, hidden[rows])
            else:
                torch.mm(gradient.T, hidden[rows], **options)

    return run


def _products_whole(inputs: Inputs, case: Case) -> Run:
    """The same products for all rows at once, in the dtype of the inputs."""
    hidden, weight, teacher_hidden, teacher_weight = (each.detach() for each in inputs[:4])

    def run() -> None:
        logits = torch.mm(hidden, weight.T)
        torch.mm(teacher_hidden, teacher_weight.T)
        torch.mm(logits, weight)
        torch.mm(logits.T, hidden)

    return run


def _row_kernel(loss: str) -> Callable[[Inputs, Case], Run]:
    """Loss and gradient of one chunk's logits, in the dtype that the products give."""
    function = LOSSES[loss][0]

    def make(inputs: Inputs, case: Case) -> Run:
        hidden, weight, teacher_hidden, teacher_weight = (each.detach() for each in inputs[:4])
        rows = min(chunk_rows(case), len(hidden))
        student = F.linear(hidden[:rows], weight).to(case.made).requires_grad_()
        teacher = F.linear(teacher_hidden[:rows], teacher_weight).to(case.made)
        target = inputs.target[:rows]

        def run() -> Tensor:
            student.grad = None
            return function(student, teacher, target)

        return run

    return make


def _fits(case: Case) -> str | None:
    """Why the three matrices of logits do not fit into free memory, with some to spare; None if they do."""
    if case.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        try:
            with open("/proc/meminfo", encoding="ascii") as lines:
                free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return None
    needed = 4 * case.logits_bytes
    return None if needed < free else f"needs {needed / 1e9:.1f} GB for its logits, {free / 1e9:.1f} GB are free"


def _linear_cross_entropy(inputs: Inputs, case: Case) -> Run:
    function: Any = F.linear_cross_entropy  # since PyTorch 2.13
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: function(inputs.hidden, inputs.weight, inputs.target, options=options)


def _no_linear_cross_entropy(case: Case) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else "linear_cross_entropy needs PyTorch 2.13"


def _liger_ce(inputs: Inputs, case: Case) -> Run:
    function: Any = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda: function(inputs.weight, inputs.hidden, inputs.target)


def _liger_js(inputs: Inputs, case: Case) -> Run:
    function: Any = importlib.import_module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(0.5)
    return lambda: function(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, None)


def _cut_cross_entropy(inputs: Inputs, case: Case) -> Run:
    function: Any = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda: function(inputs.hidden, inputs.weight, inputs.target)


def _on_gpu(package: str) -> Callable[[Case], str | None]:
    def why(case: Case) -> str | None:
        if find_spec(package.replace("-", "_")) is None:
            return f"{package} is not installed"
        return None if case.device == "cuda" else f"{package}'s kernels need a GPU"

    return why


def forms(losses: list[str]) -> list[Form]:
    """All forms, in the order of the tables."""
    found = [Form(OURS, loss, _fused(loss)) for loss in losses]
    found += [Form(UNFUSED, loss, _unfused(loss), _fits) for loss in losses]
    found += [Form(PRODUCTS, "", _products), Form(PRODUCTS_WHOLE, "", _products_whole, _fits)]
    found += [Form(ROW_KERNEL, loss, _row_kernel(loss), times=chunks) for loss in losses]
    found += [
        Form("linear_cross_entropy", "ce", _linear_cross_entropy, _no_linear_cross_entropy),
        Form("liger", "ce", _liger_ce, _on_gpu("liger-kernel")),
        Form("cut_cross_entropy", "ce", _cut_cross_entropy, _on_gpu("cut-cross-entropy")),
    ]
    if "js" in losses:
        found.append(Form("liger", "js", _liger_js, _on_gpu("liger-kernel")))
    return found


def smaller(case: Case, rows: int = 64, classes: int = 16384) -> Case:
    """A case small enough for float64, in several chunks."""
    fewer = min(case.rows, rows)
    return replace(case, rows=fewer, classes=min(case.classes, classes), chunk_rows=max(1, fewer // 4))
