"""Diagram of docs/architecture.md: `python -m tools.architecture` writes docs/architecture.png."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

PICTURE = Path(__file__).parents[1] / "docs" / "architecture.png"
INK, MUTED, LINE = "#1f2937", "#6b7280", "#9ca3af"
USER, PYTHON, KERNELS, SPECIFICATION = "#fef3c7", "#dbeafe", "#dcfce7", "#f3e8ff"

#: (left, bottom, width, height), colour, name, description.
BOXES = (
    ((2, 84, 62, 11), USER, "nkd_loss(student_logits, teacher_logits, target)", "or a Module: NKDLoss, USKDLoss, ..."),
    (
        (2, 67, 62, 11), PYTHON, "losses/",
        "a loss is one file: checks the call, makes logits into rows, names the options",
    ),
    ((2, 50, 62, 11), PYTHON, "autograd.py", "one differentiable function: keeps the gradient that forward made"),
    ((2, 33, 62, 11), PYTHON, "ops.py", "torch.library ops with fakes: the one boundary of a compiled graph"),
    ((2, 15, 28, 12), PYTHON, "backends/native/", "pointers, sizes, strides"),
    ((36, 15, 28, 12), PYTHON, "backends/triton/", "layout → plans → launch, replay"),
    ((2, 1, 28, 9), KERNELS, "csrc/", "C++ for CPUs, CUDA for USKD"),
    ((36, 1, 28, 9), KERNELS, "backends/triton/kernels/", "what Triton compiles"),
    (
        (72, 50, 26, 28), SPECIFICATION, "reference/",
        "eager PyTorch, the definition:\nwhat tests compare with,\nand what runs where\nno kernel does",
    ),
    (
        (72, 15, 26, 29), PYTHON, "core/",
        "what every layer shares:\nthe catalogue of losses,\nhyper-parameters by name,\nchecks, float16's powers\n"
        "of two, refusals",
    ),
)  # fmt: skip
#: Start, end, label.
ARROWS = (
    ((33, 84), (33, 78), "logits (..., C), targets, options"),
    ((33, 67), (33, 61), "rows (N, C), hyper-parameters by name"),
    ((33, 50), (33, 44), "the same, and which gradients are wanted"),
    ((16, 33), (16, 27), "CPU; USKD on CUDA"),
    ((50, 33), (50, 27), "CUDA"),
    ((16, 15), (16, 10), ""),
    ((50, 15), (50, 10), ""),
    ((64, 71), (72, 71), ""),
)


def draw_box(axes: Axes, place: tuple[float, float, float, float], colour: str, name: str, text: str) -> None:
    left, bottom, width, height = place
    box = FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=1.2", fc=colour, ec=LINE)
    axes.add_patch(box)
    lines = text.count("\n") + 1
    middle, top = left + width / 2, bottom + height / 2 + 1.3 * lines
    axes.text(middle, top, name, ha="center", va="center", family="monospace", size=10, color=INK, weight="bold")
    axes.text(middle, top - 2.4, text, ha="center", va="top", size=8.5, color=MUTED, linespacing=1.35)


def draw() -> None:
    figure, axes = pyplot.subplots(figsize=(10, 7.6))
    for each in BOXES:
        draw_box(axes, *each)
    for start, end, label in ARROWS:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.2})
        axes.text(start[0] + 1.2, (start[1] + end[1]) / 2, label, va="center", size=8, color=INK)
    axes.set(xlim=(0, 100), ylim=(0, 97))
    axes.axis("off")
    figure.savefig(PICTURE, dpi=130, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    draw()
    print(f"wrote {PICTURE}")
