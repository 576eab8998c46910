"""Cases (rows × classes, dtype, device) and their input logits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

LOGITS_FILE = Path(__file__).parents[1] / "data" / "imagenet_logits.npz"

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Shapes = tuple[tuple[int, int], ...]
DEFAULT_SHAPES: dict[str, Shapes] = {
    "cpu": ((256, 1000), (1024, 1000), (128, 21841), (32, 128256)),
    "cuda": ((1024, 1000), (8192, 1000), (4096, 21841), (8192, 128256)),
}
DEFAULT_DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float32")}


@dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def shape(self) -> str:
        return f"{self.rows}×{self.classes}"

    @property
    def name(self) -> str:
        return f"{self.shape} {self.dtype}"

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def tensor_bytes(self) -> int:
        """Size of one logits tensor."""
        return self.rows * self.classes * self.itemsize


class Inputs(NamedTuple):
    student_logits: torch.Tensor  # a leaf that requires grad
    # The teacher's; in self-distillation weak logits (a leaf that requires grad) or dense logits of each position.
    other_logits: torch.Tensor
    target: torch.Tensor
    source: str  # origin of the logits, for the report

    def trained(self) -> list[torch.Tensor]:
        return [logits for logits in (self.student_logits, self.other_logits) if logits.requires_grad]

    def drop_gradients(self) -> None:
        for logits in self.trained():
            logits.grad = None


class ShippedLogits(NamedTuple):
    student_logits: torch.Tensor
    teacher_logits: torch.Tensor
    target: torch.Tensor
    photo: torch.Tensor  # index into photo_names
    photo_names: list[str]
    meta: str  # JSON: seed, networks, versions


def parse_shapes(text: str) -> Shapes:
    """Parse "256x1000,1024x1000"; raise ValueError naming the part that does not parse."""
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", part)
        if not match:
            raise ValueError(f"expected cases as ROWSxCLASSES, for example 256x1000,128x21841, got {part!r}")
        rows, classes = int(match[1]), int(match[2])
        if rows < 1 or classes < 2:
            raise ValueError(f"expected at least 1 row and 2 classes, got {part.strip()!r}")
        shapes.append((rows, classes))
    return tuple(shapes)


def parse_dtypes(text: str) -> tuple[str, ...]:
    """Parse "bfloat16,float32"; raise ValueError listing the known names."""
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"expected dtypes among {', '.join(DTYPES)}, got {name!r}")
    return names


def load_shipped_logits(path: Path = LOGITS_FILE) -> ShippedLogits:
    """Logits of two published networks on real photographs; data/README.md describes them."""
    with np.load(path) as data:
        return ShippedLogits(
            torch.from_numpy(data["student_logits"]).float(),
            torch.from_numpy(data["teacher_logits"]).float(),
            torch.from_numpy(data["target"]).long(),
            torch.from_numpy(data["photo"]).long(),
            [str(name) for name in data["photo_names"]],
            str(data["meta"]),
        )


def make_inputs(case: Case, seed: int = 0, trains_other: bool = False, positions: int = 0) -> Inputs:
    """Seeded inputs of a case: resampled real logits for 1000 classes, else generated ones.

    With ``trains_other`` the teacher's logits serve as the weak logits of self-distillation and require grad too: like
    these, they are a second opinion of the same picture. With ``positions``, dense logits
    ``(rows, positions, classes)`` replace them.
    """
    if case.classes == 1000:
        student, teacher, target, source = _resampled(case, seed)
    else:
        student, teacher, target, source = _generated(case, seed)
    if trains_other:
        source += ", the teacher's logits as the weak ones"
    dtype = DTYPES[case.dtype]
    if positions:
        teacher = _dense(student.to(case.device), positions, seed)
        source += f", dense logits at {positions} positions of which some see the picture's object and others do not"
    student = student.to(case.device, dtype).detach().requires_grad_()
    other = teacher.to(case.device, dtype).detach().requires_grad_(trains_other)
    return Inputs(student, other, target.to(case.device), source)


def _dense(logits: torch.Tensor, positions: int, seed: int) -> torch.Tensor:
    """Logits at each position; their average over the positions is about ``logits``."""
    generator = torch.Generator(logits.device).manual_seed(seed)
    rows, classes = logits.shape
    options: dict[str, Any] = {"generator": generator, "device": logits.device}
    presence = torch.rand((rows, positions, 1), **options).mul_(2)  # of the object, 1 on average
    return torch.randn((rows, positions, classes), **options).addcmul_(presence, logits.unsqueeze(1))


def _resampled(case: Case, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    shipped = load_shipped_logits()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(shipped.target), (case.rows,), generator=generator)
    source = f"real: rows of {LOGITS_FILE.name} drawn with replacement, seed {seed}"
    return shipped.student_logits[rows], shipped.teacher_logits[rows], shipped.target[rows], source


def _generated(case: Case, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """Peaked logits with an exponential tail, like those of a trained classifier.

    Teacher: Gaussian bulk plus a sparse exponential tail. The target is raised by about log(classes), so its
    probability is anywhere between nearly 0 and nearly 1. Student: the same plus noise, target raised a little less.
    """
    # Generated on the device: a billion logits take too long on a CPU.
    generator = torch.Generator(case.device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": case.device}
    shape = (case.rows, case.classes)
    teacher = torch.randn(shape, **options)
    tail = torch.empty(shape, device=case.device).exponential_(generator=generator)
    teacher += tail.mul_(torch.rand(shape, **options).lt_(0.05)).mul_(1.5)
    del tail
    student = torch.randn(shape, **options).mul_(0.8).add_(teacher, alpha=0.7)
    target = torch.randint(case.classes, (case.rows, 1), **options)
    boost = torch.randn((case.rows, 1), **options) * 2 + float(np.log(case.classes))
    teacher.scatter_(1, target, teacher.gather(1, target) + boost)
    student.scatter_(1, target, student.gather(1, target) + 0.8 * boost)
    source = f"generated: Gaussian bulk, exponential tail, target raised by log(classes) ± 2, seed {seed}"
    return student, teacher, target.squeeze(1), source
