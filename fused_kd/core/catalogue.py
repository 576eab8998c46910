"""The catalogue: every loss with its formula and paper, and the row losses as the kernels know them.

The gradient of a row loss is, row by row, a combination of a few exponentials of the logits. One op and one kernel
serve all row losses. Each is a policy: a number here, and a function in ``csrc/losses/row_losses.h`` and in
``fused_kd/backends/triton/kernels/losses.py``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fused_kd.core.options import HyperParameters
from fused_kd.reference.topk import RESTS

#: What a row loss may need from a kernel besides the student's exponentials at T. Each is a bit of the loss's number.
NEEDS = (
    "teacher",  # the teacher's exponentials at T
    "sharp",  # the exponentials of the distilled logits at 1 as well
    "divergence",  # KL's dot product, sum q (log p - log q); without it the cross-entropy's, sum q log p
    "linear",  # the sum of the student's logits
    "at_one",  # the student's exponentials at 1 whatever T is
    "teacher_ce",  # the teacher's own cross-entropy with the labels
    "pointwise",  # another round of sums: the gradient is no combination of exponentials
    "one_slope",  # the pointwise loss has one slope
    "fine",  # the student's probabilities beside the exponentials, for rows or columns that hardly vary
    "columns",  # a term of the batch's columns, unless gamma is 0
)


@dataclass(frozen=True)
class RowLoss:
    """How the kernels know a row loss.

    ``kind`` is its number in ``csrc/losses/row_losses.h``. ``own`` are its own hyper-parameters, in the order of
    Triton's kernels. ``parts`` says which of the op's three parts it has. ``bound`` gives an upper bound of the
    magnitude of the gradient's entries without CE, or inf. ``needs`` are some of :data:`NEEDS`. ``rests`` are the
    values of ``rest`` in :class:`fused_kd.TopK` that have a kernel. ``labels`` says whether it requires a target.
    ``slope`` is the size of a pointwise loss's slopes on ordinary logits, here of a logarithm: T times that is what
    cancels in its gradient.
    """

    kind: int
    own: tuple[str, ...]
    parts: tuple[int, ...]
    bound: Callable[[HyperParameters], float]
    needs: tuple[str, ...]
    rests: tuple[str, ...] = ()
    labels: bool = True
    slope: float = 2.0


# |q_y (p - 1)|, |p - q| and |p^ - q^| are at most 1.
ROW_LOSSES = {
    "nkd": RowLoss(0, ("gamma",), (0, 1, 2), lambda x: 1.0 + x.gamma * x.temperature, ("teacher", "sharp"), RESTS),
    "kd": RowLoss(1, (), (0, 2), lambda x: x.temperature, ("teacher", "divergence"), RESTS, labels=False),
    "dkd": RowLoss(
        2, ("alpha", "beta"), (0, 1, 2), lambda x: (x.alpha + x.beta) * x.temperature, ("teacher", "divergence"), RESTS
    ),
    "wsld": RowLoss(
        3, ("alpha",), (0, 2), lambda x: x.alpha * x.temperature, ("teacher", "sharp", "teacher_ce"), RESTS
    ),
    "tf_kd": RowLoss(4, ("correct",), (0, 2), lambda x: 1.0, ("linear", "at_one")),
    # A correlation's gradient has the deviation of the probabilities in its denominator. For a constant row or column,
    # as from a head that starts at zero, only the 1e-8 beside it is left.
    "dist": RowLoss(
        5,
        ("beta", "gamma"),
        (0, 1, 2),
        lambda x: math.inf,
        ("teacher", "pointwise", "fine", "columns"),
        labels=False,
        slope=1.0,
    ),
    # (1 - beta) p (log(p / m) - KL(p, m)): p log(m / p) <= m / e, and (1 - beta) KL <= (1 - beta) log(1 / (1 - beta))
    # <= 1 / e. At beta = 0 it is p - q, at 1 p (log(p / q) - KL(p, q)), as large as the logits make it.
    "js": RowLoss(
        6,
        ("beta",),
        (0, 2),
        lambda x: x.temperature if x.beta < 1.0 else math.inf,
        ("teacher", "pointwise", "one_slope"),
        ("renormalize", "bucket"),
        labels=False,
    ),
}
#: The bit of each need, and the number that the kernels get: those bits, and the kind above them.
BITS = {need: 1 << place for place, need in enumerate(NEEDS)}
KIND_SHIFT = 16
NUMBERS = {name: loss.kind << KIND_SHIFT | sum(map(BITS.__getitem__, loss.needs)) for name, loss in ROW_LOSSES.items()}
#: The number of each ``rest`` of a top-k teacher for the kernels.
REST_NUMBERS = {rest: number for number, rest in enumerate(RESTS)}


def as_run(loss: str, beta: float) -> str:
    """Return the row loss to run: Jensen–Shannon with beta = 0 is KD."""
    return "kd" if loss == "js" and beta == 0.0 else loss


def parts_of(loss: str, stacked: Any) -> list[Any]:
    """Return a loss's parts in the order of its result, from those that an op stacks."""
    places = ROW_LOSSES[loss].parts if loss in ROW_LOSSES else range(len(stacked))
    return [stacked[place] for place in places]


def has_column_term(loss: str, hyper: HyperParameters | None = None) -> bool:
    """Whether a loss has a term of the batch's columns, which couples all rows; without ``hyper``: may have one."""
    return loss in ROW_LOSSES and "columns" in ROW_LOSSES[loss].needs and (hyper is None or hyper.gamma != 0.0)


_ROWS: Mapping[str, tuple[str, ...]] = {"cpu": ("native", "reference"), "cuda": ("triton", "reference")}


@dataclass(frozen=True)
class Loss:
    """A loss of this package: its formula, its source and its backends.

    ``formula`` is per row, in the notation of the README. ``backends`` lists, per kind of device, the backends with a
    kernel for the loss. :func:`fused_kd.explain` says which of them can run here. ``sources`` are the classes of
    :mod:`fused_kd.sources` that the loss takes in place of logits. ``published`` is the implementation of its authors,
    or of those who published it with a paper, whose values and gradients the tests expect; "" if there is none.
    """

    name: str
    title: str
    module: str
    formula: str
    paper: str
    backends: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _ROWS)
    sources: tuple[str, ...] = ("Head", "ClassShard", "TopK")
    published: str = ""

    @property
    def function(self) -> str:
        return f"{self.name}_loss"

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of each hyper-parameter, from the function's signature."""
        import fused_kd

        shared = (
            *("target", "reduction", "weight", "ignore_index"),
            *("class_dim", "num_classes", "backend", "return_parts", "process_group", "normalizer"),
        )
        parameters = inspect.signature(getattr(fused_kd, self.function)).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in shared}


LOSSES = {
    loss.name: loss
    for loss in (
        Loss(
            "nkd",
            "NKD",
            "NKDLoss",
            "−q_y log p_y − γ T² Σ_{j≠y} q̂_j log p̂_j",
            "Yang et al. 2023, arXiv:2303.13005, Eq. 4–5",
            published="yzd-v/cls_KD",
        ),
        Loss(
            "uskd",
            "USKD",
            "USKDLoss",
            "−α Σ_k P_k log p_k − β Σ_{j∉Y} ẑ_j log p̂_j − μ Σ_j V'_j log v_j",
            "Yang et al. 2023, arXiv:2303.13005, Eq. 6–13",
            {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")},
            ("Head",),
            published="yzd-v/cls_KD",
        ),
        Loss(
            "kd",
            "KD",
            "KDLoss",
            "T² KL(q(T) ‖ p(T))",
            "Hinton et al. 2015, arXiv:1503.02531",
            published="megvii-research/mdistiller",
        ),
        Loss(
            "dkd",
            "DKD",
            "DKDLoss",
            "T² (α KL(b_t ‖ b_s) + β KL(q̂ ‖ p̂))",
            "Zhao et al. 2022, arXiv:2203.08679",
            published="megvii-research/mdistiller",
        ),
        Loss(
            "wsld",
            "WSLD",
            "WSLDLoss",
            "α T² u (−Σ_j q_j(T) log p_j(T)), u = 1 − exp(−CE(s) / CE(t))",
            "Zhou et al. 2021, arXiv:2102.00650",
            published="bellymonster/Weighted-Soft-Label-Distillation",
        ),
        Loss(
            "tf_kd",
            "Tf-KD",
            "TfKDLoss",
            "KL(softmax(u / T) ‖ p), u_y = correct, u_j = (1 − correct) / (C − 1)",
            "Yuan et al. 2020, arXiv:1909.11723",
            sources=("Head", "ClassShard"),
            published="yuanli2333/Teacher-free-Knowledge-Distillation",
        ),
        Loss(
            "js",
            "Jensen–Shannon",
            "JSLoss",
            "T² (β KL(q(T) ‖ m) + (1 − β) KL(p(T) ‖ m)), m = β q(T) + (1 − β) p(T), for 0 < β < 1; by definition KD at "
            "β = 0, reverse KD at β = 1",
            "Agarwal et al. 2023, arXiv:2306.13649",
        ),
        Loss(
            "dist",
            "DIST",
            "DISTLoss",
            "T² (β (1 − ρ of the row) + γ (1 − mean over the classes of ρ of the column))",
            "Huang et al. 2022, arXiv:2205.10536",
            published="hunto/image_classification_sota",
        ),
        Loss(
            "zipf_ls",
            "Zipf's LS",
            "ZipfLSLoss",
            "β KL(ẑ ‖ p̂), ẑ by the rank of each class in the votes of the positions",
            "Liang et al. 2022, arXiv:2207.12980",
            sources=(),
            published="megvii-research/zipfls",
        ),
    )
}


def catalogue() -> list[Loss]:
    """Every loss of the package.

    Example:
        >>> for loss in fused_kd.catalogue():
        ...     print(loss.title, loss.formula, loss.defaults, loss.backends["cuda"])
    """
    return list(LOSSES.values())
