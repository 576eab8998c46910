"""Rows cut into pieces at any columns, for the tests of the staged schedule on every backend."""

import itertools
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from fused_kd import check
from fused_kd.backends import staged
from fused_kd.core.catalogue import ROW_LOSSES
from fused_kd.core.options import HyperParameters, Options, in_order
from fused_kd.core.rows import Piece

NO_TEACHER = ("tf_kd",)


class Problem(NamedTuple):
    student: torch.Tensor
    teacher: torch.Tensor | None
    target: torch.Tensor
    factors: torch.Tensor | None
    options: Options
    cuts: tuple[int, ...]

    def to(self, dtype):
        teacher = None if self.teacher is None else self.teacher.to(dtype)
        return self._replace(student=self.student.to(dtype), teacher=teacher)


def make(
    loss, classes, cuts, seed=0, rows=4, labels="index", weighted=False, impossible=0.0, spread=2.0, **options: Any
):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * spread for _ in "st")
    if impossible:
        # The first class stays, so that no row is without any.
        student[:, 1:][torch.rand(rows, classes - 1, generator=generator) < impossible] = -torch.inf
        teacher[student == -torch.inf] = -torch.inf
    target = torch.randint(classes, (rows,), generator=generator)
    target[student.gather(1, target[:, None])[:, 0] == -torch.inf] = 0
    if labels == "probability":
        mixed = torch.rand(rows, classes, generator=generator, dtype=torch.float64).mul(4).softmax(1)
        target = mixed.where(student > -torch.inf, 0.0)
        target /= target.sum(1, keepdim=True)
    elif rows > 2:
        target[1] = -100
    factors = torch.rand(2, rows, generator=generator, dtype=torch.float64) if weighted else None
    if weighted:
        factors[:, rows - 1] = 0.0
    shared = {"temperature": 1.0, "ce_weight": 0.0, "label_smoothing": 0.0}
    own = dict(zip(ROW_LOSSES[loss].own, (0.7, 0.4), strict=False))
    hyper = HyperParameters._make(in_order(own | {name: options.pop(name, value) for name, value in shared.items()}))
    scales = (options.pop("gradient_scale", 1.0),)
    asked = Options(hyper, -100, "none", (True,), scales, loss, options.pop("standardize", False))
    assert not options
    return Problem(student, None if loss in NO_TEACHER else teacher, target, factors, asked, tuple(cuts))


def without_columns(problem):
    """DIST's rows alone."""
    options = problem.options
    if options.loss != "dist":
        return problem
    return problem._replace(options=options._replace(hyper=options.hyper._replace(gamma=0.0)))


def pieces_of(problem):
    student, teacher, target, _, _, cuts = problem
    probabilities = target.is_floating_point()
    edges = [0, *cuts, student.shape[1]]
    spans = [slice(*edge) for edge in itertools.pairwise(edges)]
    index = target
    if probabilities:
        found = [staged.likeliest(target[:, span], span.start) for span in spans]
        index = staged.likeliest_of_all(torch.stack(found))
    return [
        Piece(
            student[:, span],
            None if teacher is None else teacher[:, span],
            target[:, span] if probabilities else None,
            index,
            span.start,
            student.shape[1],
        )
        for span in spans
    ]


def run(kernels, problem):
    """Parts and gradient of the pieces, and of the whole rows."""
    parts, gradients = staged.run(kernels, pieces_of(problem), problem.options, problem.factors)
    return (parts, torch.cat(gradients, 1)), run_whole(kernels, problem)


def run_whole(kernels, problem):
    student, teacher, target, factors, options, _ = problem
    return kernels.row_loss(student, teacher, target, factors, None, options)[1:3]


def assert_same(kernels, problem, tolerance=1e-9):
    found, whole = run(kernels, problem)
    for ours, exact in zip(found, whole, strict=True):
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_within_the_whole_rows_error(kernels, problem, dtype):
    """In a narrower dtype, against whole rows in float64: as near as whole rows in that dtype, and a few units."""
    narrow = problem.to(dtype)
    exact = [each.double() for each in run_whole(kernels, narrow.to(torch.float64))]
    found, whole = run(kernels, narrow)
    slack = check._SLACK_ULPS[torch.float32] * torch.finfo(torch.float32).eps + 2 * torch.finfo(dtype).eps
    for ours, theirs, right in zip(found, whole, exact, strict=True):
        size = right.abs().amax()
        error, budget = ((each.double() - right).abs().amax() / size.clamp(min=1e-30) for each in (ours, theirs))
        assert error <= budget + slack, (float(error), float(budget))


def assert_beta_0_is_kd(kernels):
    """Jensen–Shannon of beta = 0, whose own sums are all 0 there."""
    problem = make("js", 40, (9, 30), temperature=2.0, ce_weight=1.0)
    asked = problem.options._replace(hyper=problem.options.hyper._replace(beta=0.0))
    parts, gradients = staged.run(kernels, pieces_of(problem), asked)
    given = problem.student, problem.teacher, problem.target, None, None, asked._replace(loss="kd")
    _, whole_parts, whole_gradient, _ = kernels.row_loss(*given)
    for ours, exact in ((parts, whole_parts), (torch.cat(gradients, 1), whole_gradient)):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@st.composite
def problems(draw, most=300):
    loss, number = draw(st.sampled_from(tuple(ROW_LOSSES))), draw(st.integers(2, most))
    cuts = sorted(draw(st.sets(st.integers(1, number - 1), max_size=5)))
    standardize = loss not in NO_TEACHER and draw(st.booleans())
    return make(
        loss,
        number,
        cuts,
        seed=draw(st.integers(0, 2**31)),
        rows=draw(st.integers(1, 5)),
        labels=draw(st.sampled_from(("index", "probability"))),
        weighted=loss != "dist" and draw(st.booleans()),
        impossible=draw(st.sampled_from((0.0, 0.0, 0.3))),
        spread=draw(st.sampled_from((0.3, 2.0, 20.0))),
        temperature=draw(st.sampled_from((1.0, 2.0, 3.0))),
        ce_weight=draw(st.sampled_from((0.0, 1.0))),
        label_smoothing=draw(st.sampled_from((0.0, 0.1))),
        standardize=standardize,
    )
