"""Rows with any mixture of finite logits, -inf, +inf and NaN: every backend has the reference's loss and gradient, and
the parts of a loss that is a number. A class whose logit is -inf has no gradient, in a row without a value either."""

import itertools

import pytest
import torch
from loss_cases import INF, function, has
from test_row_weight import PLACES
from topk_cases import FUSED as KEPT
from uskd_cases import alone_in_the_weak_softmax

from fused_kd import TopK, check

NAN = float("nan")
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
#: What a row is: "-" some classes of -inf, "*" all but the first, "1" all but the second, "!" all; "+" and "n" an inf
#: and a NaN besides.
KINDS = ("", "-", "*", "1", "!", "+", "n", "-+", "-n", "*+", "*n", "+n")
#: A term that counts 0 times does not hide a row without a value.
WITHOUT_A_TERM = {
    "nkd": [{"gamma": 0.0}],
    "dkd": [{"alpha": 0.0}, {"beta": 0.0}, {"alpha": 0.0, "beta": 0.0}],
    "wsld": [{"alpha": 0.0}],
}
PAIRS = [
    (student, teacher)
    for student, teacher in itertools.product(KINDS, KINDS)
    if student in ("", "-", "*", "!") or teacher in ("", "!")
]


def spoilt(shape, kinds, seed):
    """Logits of rows of these kinds."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    drawn = torch.rand(shape, generator=generator)
    places = torch.randint(shape[-1], (len(kinds), 2), generator=generator)
    for row, kind, at, (first, second) in zip(logits, kinds, drawn, places.tolist(), strict=True):
        row[at < 0.4] = -INF if "-" in kind else row[at < 0.4]
        if "*" in kind:
            row[..., 1:] = -INF
        if "1" in kind:
            row[..., [0, *range(2, shape[-1])]] = -INF
        if "!" in kind:
            row[:] = -INF
        if "+" in kind:
            row[..., first] = INF
        if "n" in kind:
            row[..., second] = NAN
    return logits


def labels(rows, classes, soft):
    target = torch.arange(rows) % classes
    one_hot = torch.eye(classes, dtype=torch.float64)
    return 0.7 * one_hot[target] + 0.3 * one_hot[(target + 1) % classes] if soft else target


def run(loss, backend, logits, others, target, **options):
    """Loss, parts and gradients, row by row; the parts of a loss that is NaN are too."""
    leaves = [each.clone().requires_grad_() for each in logits]
    value, parts = function(loss)(
        *leaves, *others, target, backend=backend, reduction="none", return_parts=True, **options
    )
    value.sum().backward()
    value = value.detach()
    return value, *(torch.where(value.isnan(), value, part) for part in parts), *(leaf.grad for leaf in leaves)


def tolerances(backend, options):
    """Triton's interpreter takes seconds, and an option does nothing with the dtype."""
    return {torch.float64: TOLERANCE[torch.float64]} if backend == "triton" and options else TOLERANCE


def pairs_for(place):
    """Half of them in Triton's interpreter, which takes as long as there are rows."""
    if place[1:] != ("triton", "cpu"):
        return PAIRS
    return [pair for pair in PAIRS if sum(map(KINDS.index, pair)) % 2 == 0]


def compare(loss, backend, logits, others, target, device="cpu", **options):
    expected = run(loss, "reference", logits, others, target, **options)
    for gradient, given in zip(expected[-len(logits) :], logits, strict=True):
        assert not gradient[given == -INF].any()
    for dtype, tolerance in tolerances(backend, options).items():
        given = [[each.to(device, dtype) for each in several] for several in (logits, others)]
        aim = target.to(device, dtype if target.is_floating_point() else target.dtype)
        found = run(loss, backend, *given, aim, **options)
        for ours, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.cpu().double(), exact, rtol=tolerance, atol=tolerance, equal_nan=True)


def options_of(loss):
    yield {}
    yield {"ce_weight": 0.5}
    yield {"ce_weight": 0.5, "label_smoothing": 0.1}
    if has(loss, "logit_standardization"):
        yield {"logit_standardization": True, "ce_weight": 0.5}
    if loss in ("nkd", "kd", "dkd", "wsld"):
        yield {"temperature": 2.0}
    if loss == "js":
        yield {"beta": 0.0}
        yield {"beta": 1.0}
    yield from WITHOUT_A_TERM.get(loss, ())


@pytest.mark.parametrize("place", [place for place in PLACES if place[1] != "reference"], ids="-".join)
@pytest.mark.parametrize("classes", (2, 5))
@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
def test_every_backend_has_the_references(place, classes, soft):
    loss, name, device = place
    pairs = pairs_for(place) if loss != "tf_kd" else [(kind, "") for kind in KINDS]
    student = spoilt((len(pairs), classes), [kind for kind, _ in pairs], 1)
    shape = (len(pairs), 3, classes) if loss == "zipf_ls" else (len(pairs), classes)
    teacher = spoilt(shape, [kind for _, kind in pairs], 2)
    logits, others = [student], [] if loss == "tf_kd" else [teacher]
    target = labels(len(pairs), classes, soft)
    if loss == "uskd":
        logits, others = [student, teacher], []
        # The student's rows that have a value: those that have none spoil all, through the batch means.
        fine = (student == INF).any(1) | student.isnan().any(1) | (student == -INF).all(1)
        valid = [each[~fine] for each in (student, teacher, target)]
    for options in options_of(loss):
        more = {"gamma": 0.0} if loss == "dist" else {}
        compare(loss, name, logits, others, target, device, **options, **more)
        if loss == "uskd":
            compare(loss, name, valid[:2], others, valid[2], device, **options)


@pytest.mark.parametrize("place", [place for place in PLACES if place[0] == "dist"], ids="-".join)
@pytest.mark.parametrize("which", ("student", "teacher"))
@pytest.mark.parametrize("kind", ("-", "!", "+", "n", "-n"))
def test_dist_spreads_a_row_without_a_value_through_the_columns(place, which, kind):
    loss, name, device = place
    student, teacher = spoilt((4, 5), ["-", "", "", ""], 3), spoilt((4, 5), [""] * 4, 4)
    bad = spoilt((4, 5), ["", "", kind, ""], 5)[2]
    (student if which == "student" else teacher)[2] = bad
    compare(loss, name, [student], [teacher], labels(4, 5, False), device)


@pytest.mark.parametrize("place", [place for place in PLACES if place[0] == "dist"], ids="-".join)
@pytest.mark.parametrize("options", ({}, {"ce_weight": 0.5}, {"beta": 0.0}), ids=str)
def test_dist_with_nan_among_the_labels(place, options):
    """The row and, through the columns, all others are NaN, unless the row does not count."""
    student, teacher = spoilt((4, 5), [""] * 4, 3), spoilt((4, 5), [""] * 4, 4)
    target = labels(4, 5, True)
    target[2, 1] = NAN
    counted = torch.tensor([True, True, False, True])
    value, *_, gradient = run(*place[:2], [student], [teacher], target, weight=counted, **options)
    assert value.isfinite().all() and gradient.isfinite().all() and gradient[counted].any(1).all()
    if place[1] != "triton":  # whose columns do not read the labels
        value, *_, gradient = run(*place[:2], [student], [teacher], target, **options)
        assert value.isnan().all() and gradient.isnan().all()


@pytest.mark.parametrize("name", check.runnable("cpu", "kd"))
@pytest.mark.parametrize("loss, rest", KEPT)
@pytest.mark.parametrize("classes", (7, 3))
def test_kept_classes(name, loss, rest, classes):
    """Some, and all."""
    pairs = [(student, teacher) for student in KINDS for teacher in ("", "!", "n")][:: 2 if name == "triton" else 1]
    student = spoilt((len(pairs), classes), [kind for kind, _ in pairs], 1)
    kept = spoilt((len(pairs), 3), [kind for _, kind in pairs], 2)
    kept[:, 0] = torch.where(torch.arange(len(pairs)) % 6 == 1, -INF, kept[:, 0])  # alone, or with the others
    log_probs = kept.log_softmax(1).where(kept != -INF, -INF) - 0.2 * (classes > 3)
    indices = torch.rand(len(pairs), classes, generator=torch.Generator().manual_seed(3)).argsort(1)[:, :3]
    target = labels(len(pairs), classes, False)
    further = ({"ce_weight": 0.5, "label_smoothing": 0.1}, {"temperature": 2.0}, *WITHOUT_A_TERM.get(loss, ()))
    for options in ({}, *(further if classes == 7 else ())):

        def each(backend, dtype, options=options):
            source = TopK(log_probs.to(dtype), indices, rest)
            return run(loss, backend, [student.to(dtype)], [source], target, **options)

        expected = each("reference", torch.float64)
        assert not expected[-1][student == -INF].any()
        for dtype, tolerance in tolerances(name, options).items():
            for ours, exact in zip(each(name, dtype), expected, strict=True):
                torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_dkd_alone_in_the_students_row(backend):
    """One class has all of the student's probability: DKD of weights 1 and 1 - q_y is KD, and so is its gradient."""
    student = torch.tensor([[0.5, -INF, -INF]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.3, -0.4]], dtype=torch.float64)
    q_y = teacher.softmax(1)[0, 0]
    settings = {"temperature": 1.0, "backend": backend[0]}
    gradients = []
    for loss, options in (("kd", {}), ("dkd", {"alpha": 1.0, "beta": float(1 - q_y)})):
        leaf = student.clone().requires_grad_()
        function(loss)(leaf, teacher, torch.tensor([0]), **options, **settings).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], torch.tensor([[1 - float(q_y), 0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("place", [place for place in PLACES if place[0] == "uskd"], ids="-".join)
@pytest.mark.parametrize("rank", ("normalized", "weak", "sum", "cls_kd"))
def test_a_target_alone_in_the_weak_softmax_ranks_first(place, rank):
    student, weak, target = alone_in_the_weak_softmax()
    compare(place[0], place[1], [student, weak], [], target, rank=rank)
    if place[1] == "reference":
        value = run("uskd", "reference", [student, weak], [], target, rank=rank, beta=1.0)[2]
        # Of the weak logits alone the others tie, and so they do where the student rules out the target of cls_kd.
        ranks = [3.0, 2.0, 5.0, 4.0] if rank in ("normalized", "sum") else [2.0, 3.0, 4.0, 5.0]
        z = torch.tensor(ranks, dtype=torch.float64).reciprocal()
        log_p = student[0, [0, 2, 3, 4]].log_softmax(0)
        torch.testing.assert_close(value, -(z / z.sum() * log_p).sum()[None])
