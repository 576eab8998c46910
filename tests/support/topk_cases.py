"""Top-k teachers, for the tests of the fused form on every backend."""

import contextlib
from typing import NamedTuple

import torch

from fused_kd import check, reference
from fused_kd.backends import topk
from fused_kd.core.catalogue import ROW_LOSSES
from fused_kd.core.options import HyperParameters, Options, in_order
from fused_kd.core.rows import TopKPiece

#: What a loss is of each of, and which of the op's three parts it has.
FUSED = [(name, rest) for name, loss in ROW_LOSSES.items() for rest in loss.rests]


class _ToldError(Exception):
    """Ends a piece's first visit."""


class Problem(NamedTuple):
    student: torch.Tensor
    log_probs: torch.Tensor
    indices: torch.Tensor
    rest: str
    target: torch.Tensor
    factors: torch.Tensor | None
    options: Options

    def to(self, dtype, log_probs=True):
        kept = self.log_probs.to(dtype) if log_probs else self.log_probs
        target = self.target.to(dtype) if self.target.is_floating_point() else self.target
        return self._replace(student=self.student.to(dtype), log_probs=kept, target=target)


def make(
    loss, rest, classes, k, *, rows=5, seed=0, pads=0, spread=2.0, left=0.2, weighted=False, labels=False, **options
):
    """A row in two has its target among the kept classes; the second is ignored. With ``labels`` the targets are
    probabilities: of two classes, or, in a row in three, of half of them."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * spread
    order = torch.rand(rows, classes, generator=generator).argsort(1)
    kept = torch.randn(rows, k, generator=generator, dtype=torch.float64) * spread
    log_probs = kept.log_softmax(1) + (0.0 if k == classes else torch.tensor(1 - left).log())
    indices = torch.cat([order[:, :k], torch.full((rows, pads), -1)], 1)
    log_probs = torch.cat([log_probs, torch.full((rows, pads), 5.0, dtype=torch.float64)], 1)
    places = torch.rand(rows, k + pads, generator=generator).argsort(1)
    # As a slice, whose rows have a stride of their own.
    wide = torch.full((rows, k + pads + 3), -7)
    wide[:, : k + pads] = indices.gather(1, places)
    target = torch.where(torch.arange(rows) % 2 == 0, order[:, 0], order[:, -1])
    if rows > 2:
        target[1] = -100
    if labels:
        target = soften(target.clamp(min=0), order, generator)
    factors = None
    if weighted:
        factors = torch.rand(2, rows, generator=generator, dtype=torch.float64) + 0.5
        factors[:, rows - 1] = 0.0
    shared = {"temperature": 1.0, "ce_weight": 0.0, "label_smoothing": 0.0}
    own = dict(zip(ROW_LOSSES[loss].own, (0.7, 0.4), strict=False))
    own |= {name: options.pop(name) for name in tuple(options) if name in ROW_LOSSES[loss].own}
    hyper = HyperParameters._make(in_order(own | {name: options.pop(name, value) for name, value in shared.items()}))
    asked = Options(hyper, -100, "none", (True,), (options.pop("gradient_scale", 1.0),), loss)
    assert not options
    return Problem(student, log_probs.gather(1, places), wide[:, : k + pads], rest, target, factors, asked)


def soften(target, order, generator):
    """The second class is the row's last kept one, or one of the rest."""
    rows, classes = order.shape
    spread = torch.rand(rows, classes, generator=generator, dtype=torch.float64) * (torch.arange(classes) % 2)
    spread *= (torch.arange(rows)[:, None] % 3 == 0) * 0.1 / spread.sum(1, keepdim=True)
    spread.scatter_add_(1, order[:, 1:2], torch.full((rows, 1), 0.3, dtype=torch.float64))
    return spread.scatter_add(1, target[:, None], 1.0 - spread.sum(1, keepdim=True))


def run(kernels, problem, widths=()):
    """``widths`` cut the rows, whose pieces exchange what they have found, as processes would."""
    if not widths:
        return topk.row_loss(kernels, *problem)
    classes, pieces = problem.student.shape[1], problem.student.split(widths, 1)
    starts = [sum(widths[:place]) for place in range(len(widths))]
    found = []

    def tell(own):
        found.extend(own)
        raise _ToldError

    for start, student in zip(starts, pieces, strict=True):
        with contextlib.suppress(_ToldError):
            topk.row_loss(kernels, student, *problem[1:], TopKPiece(start, classes, tell))
    every = torch.stack(found)
    each = [
        topk.row_loss(kernels, student, *problem[1:], TopKPiece(start, classes, lambda own: every))
        for start, student in zip(starts, pieces, strict=True)
    ]
    for loss, parts, _ in each:
        torch.testing.assert_close((loss, parts), each[0][:2], rtol=0, atol=0, equal_nan=True)
    gradients = [gradient for *_, gradient in each if gradient is not None]
    return *each[0][:2], torch.cat(gradients, 1) if gradients else None


def expected(problem):
    """The same by the reference, in the problem's dtype."""
    student, log_probs, indices, rest, target, factors, options = problem
    leaf = student.detach().requires_grad_()
    hyper = options.hyper._asdict()
    # Weights that are not one make no difference to a row alone but whether it counts.
    weight = None if factors is None else (factors[0] != 0).double()
    loss, parts = reference.topk_loss(
        options.loss, leaf, log_probs, indices, rest, target, hyper, reduction="none", weight=weight
    )
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    places = ROW_LOSSES[options.loss].parts
    all_parts = loss.new_zeros((3, len(loss)))
    for place, part in zip(places, parts, strict=True):
        all_parts[place] = part
    by_row, by_gradient = (1.0, 1.0) if factors is None else factors.to(loss.dtype)
    gradient = gradient.to(loss.dtype) * torch.as_tensor(by_gradient).reshape(-1, 1) * options.scales[0]
    return loss.detach() * by_row, all_parts * by_row, gradient.to(student.dtype)


def assert_same(kernels, problem, tolerance=1e-11, widths=()):
    for ours, exact in zip(run(kernels, problem, widths), expected(problem), strict=True):
        assert ours.dtype == exact.dtype and ours.shape == exact.shape
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_within_eager_error(kernels, problem, dtype, unit=1.0, widths=()):
    """In a narrower dtype, against float64: as near as the reference in that dtype, and a few units."""
    narrow = problem.to(dtype)
    exact = expected(narrow.to(torch.float64))
    slack = check._SLACK_ULPS[torch.float32] * torch.finfo(torch.float32).eps
    found = zip(run(kernels, narrow, widths), expected(narrow), exact, strict=True)
    for place, (ours, eager, right) in enumerate(found):
        errors = [check.relative_error(each, right.double()) for each in (ours, eager)]
        budget = max(errors[1], unit * torch.finfo(dtype).eps if place == 2 else 0.0)
        assert errors[0] <= budget + slack, (place, errors)


def check_impossible_labels(kernels, loss, rest, classes):
    """A class at -inf, in the rest or kept, with a label or without; and a NaN among the labels."""
    problem = make(loss, rest, classes, 5, rows=7, temperature=2.0, ce_weight=0.5, labels=True)
    student, labels, indices = problem.student, problem.target, problem.indices
    outside = [next(j for j in range(classes) if j not in indices[i] and labels[i, j] == 0) for i in range(7)]
    student[0, outside[0]] = student[1, outside[1]] = student[2, indices[2, 0]] = -torch.inf
    labels[1, outside[1]], labels[1, labels[1].argmax()] = 0.2, labels[1].max() - 0.2
    assert_same(kernels, problem)
    assert (run(kernels, problem)[2][student == -torch.inf] == 0).all()
    labels[3, outside[3]] = labels[4, indices[4, 1]] = torch.nan
    value, _, gradient = run(kernels, problem)
    assert value.isnan().tolist() == gradient.isnan().any(1).tolist() == [False] * 3 + [True] * 2 + [False] * 2
    assert gradient[[3, 4]].isnan().all() and gradient[[0, 1, 2, 5, 6]].isfinite().all()
