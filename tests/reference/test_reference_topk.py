"""Losses of a top-k teacher, against loops over classes in NumPy."""

import math

import numpy as np
import pytest
import torch

from fused_kd import reference

RESTS = ("drop", "renormalize", "bucket", "uniform")
HYPER = {"alpha": 0.7, "beta": 0.4, "gamma": 1.3, "ce_weight": 0.6, "label_smoothing": 0.1}
LOSSES = {"kd": RESTS, "nkd": RESTS, "dkd": RESTS, "wsld": RESTS, "js": ("renormalize", "bucket", "uniform")}


def make(classes, k, inside, rows=2, seed=0, left=0.3, pads=0):
    """Rows whose target is in K, not in it, or (None) by chance; ``left`` is what the teacher has outside K."""
    rng = np.random.default_rng(seed)
    student = rng.normal(size=(rows, classes)) * 2
    indices, log_probs, target = np.full((rows, k + pads), -1), np.full((rows, k + pads), 7.0), np.zeros(rows, int)
    for i in range(rows):
        order = rng.permutation(classes)
        places = rng.permutation(k + pads)[:k]
        indices[i, places] = order[:k]
        p = rng.random(k) + 0.01
        log_probs[i, places] = np.log(p / p.sum() * (1.0 if k == classes else 1.0 - left))
        chosen = order if inside is None else order[:k] if inside else order[k:]
        target[i] = rng.choice(chosen)
    return student, log_probs, indices, target


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def ratio(q, log):
    return 0.0 if q == 0 else q * log


def labels_of(target, classes, kind, seed):
    """A mixed label (two classes, one of them the target) or a soft one (all classes), as probabilities."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((len(target), classes)) if kind == "mixed" else rng.random((len(target), classes)) * 0.4 / classes
    for row, y in zip(labels, target, strict=True):
        row[(y + 1 + rng.integers(classes - 1)) % classes] += 0.3
        row[y] += 1.0 - row.sum()
    return labels


def oracle(name, s, log_probs, indices, rest, y, temperature, hyper):
    """One row, class by class: groups of classes, each with a mass of the teacher and one of the student. ``y`` is a
    class, or the probabilities of all."""
    classes, kept = len(s), {j: lp for j, lp in zip(indices, log_probs, strict=True) if j >= 0}
    others = classes - len(kept)
    r = max(0.0, 1.0 - sum(math.exp(lp) for lp in kept.values()))
    u = r / others if others and rest != "renormalize" else 0.0

    def teacher(T):
        z = sum(math.exp(lp / T) for lp in kept.values()) + others * u ** (1 / T)
        return {j: (math.exp(kept[j] / T) if j in kept else u ** (1 / T)) / z for j in range(classes)}

    def counts(j):
        return rest != "drop" or j in kept

    def groups(q, p, without=None):
        """(teacher's mass, student's mass) of each class, or of the bucket."""
        pairs = [(q[j], p[j]) for j in range(classes) if j != without and (j in kept or rest == "uniform")]
        outside = [j for j in range(classes) if j != without and j not in kept]
        if rest == "bucket" and outside:
            pairs.append((sum(q[j] for j in outside), sum(p[j] for j in outside)))
        return pairs

    T, q1, qT = temperature, teacher(1.0), teacher(temperature)
    p1, pT = softmax(s), softmax(s / temperature)
    smooth = hyper["label_smoothing"]
    given, y = (np.eye(classes)[y], y) if np.ndim(y) == 0 else (y, int(np.argmax(y)))
    labels = (1 - smooth) * given + smooth / classes
    ce = -hyper["ce_weight"] * float((labels * np.log(p1)).sum())

    def hats():
        pairs = groups(qT, pT, y)
        q_sum = sum(q for q, _ in pairs)
        p_sum = sum(p for j, p in enumerate(pT) if j != y)
        return [(q / q_sum, p / p_sum) for q, p in pairs] if q_sum else []

    if name == "kd":
        return [T * T * sum(ratio(q, math.log(q / p) if q else 0) for q, p in groups(qT, pT)), ce]
    if name == "wsld":
        ce_s = -sum(v * math.log(p1[j]) for j, v in enumerate(given) if v)
        ce_t = sum(-v * math.log(q1[j]) if counts(j) and q1[j] else math.inf for j, v in enumerate(given) if v)
        weight = 1 - math.exp(-ce_s / (ce_t + 1e-7))
        return [hyper["alpha"] * T * T * weight * -sum(ratio(q, math.log(p)) for q, p in groups(qT, pT)), ce]
    if name == "nkd":
        target = -(q1[y] if counts(y) else 0.0) * math.log(p1[y])
        return [target, -hyper["gamma"] * T * T * sum(ratio(q, math.log(p)) for q, p in hats()), ce]
    if name == "dkd":
        q_y = qT[y] if counts(y) else 0.0
        q_rest = sum(qT[j] for j in range(classes) if j != y and counts(j))
        binary = ratio(q_y, math.log(q_y / pT[y]) if q_y else 0)
        binary += ratio(q_rest, math.log(q_rest / (pT.sum() - pT[y])) if q_rest else 0)
        hat = sum(ratio(q, math.log(q / p) if q else 0) for q, p in hats())
        return [hyper["alpha"] * T * T * binary, hyper["beta"] * T * T * hat, ce]
    b, value = hyper["beta"], 0.0
    pairs = [(qT[j], pT[j]) for j in range(classes)] if rest == "renormalize" else groups(qT, pT)
    for q, p in pairs:
        m = b * q + (1 - b) * p
        value += b * ratio(q, math.log(q / m) if q else 0) + (1 - b) * p * math.log(p / m)
    return [T * T * value, ce]


CASES = [
    (9, 3, True, {}),
    (9, 3, False, {}),
    (9, 1, True, {}),
    (9, 1, False, {}),
    (9, 8, None, {"pads": 2}),
    (9, 9, True, {"pads": 1}),
    (9, 4, None, {"left": -0.2}),
    (2, 1, True, {}),
    (2, 1, False, {}),
]


@pytest.mark.parametrize("labels", ["indices", "mixed", "soft"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("name", "rest"), [(name, rest) for name, rests in LOSSES.items() for rest in rests])
def test_a_loss_is_that_of_its_definition(name, rest, temperature, labels):
    for seed, (classes, k, inside, more) in enumerate(CASES):
        student, log_probs, indices, target = make(classes, k, inside, seed=seed, **more)
        if labels != "indices":
            target = labels_of(target, classes, labels, seed)
        loss, parts = reference.topk_loss(
            name, *map(torch.tensor, (student, log_probs, indices)), rest, torch.tensor(target),
            HYPER | {"temperature": temperature}, reduction="none",
        )  # fmt: skip
        for i in range(len(student)):
            rows = student[i], log_probs[i], indices[i]
            exact = oracle(name, *rows, rest, target[i], temperature, HYPER)
            found = [float(part[i]) for part in parts]
            assert found == pytest.approx(exact, rel=1e-11, abs=1e-12), (classes, k, inside, i)
            assert float(loss[i]) == pytest.approx(sum(exact), rel=1e-11, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "rest"), [*((name, rest) for name in LOSSES for rest in LOSSES[name]), *(("dist", "uniform"),)]
)
@pytest.mark.parametrize("probabilities", [False, True])
def test_a_teacher_of_all_classes_is_the_ordinary_one(name, rest, probabilities):
    student, log_probs, indices, target = make(7, 7, True)
    target = labels_of(target, 7, "soft", 0) if probabilities else target
    student, log_probs, indices, target = map(torch.tensor, (student, log_probs, indices, target))
    teacher = torch.empty_like(student).scatter_(1, indices, log_probs)
    hyper = {"temperature": 2.0, "ce_weight": 0.3}
    ordinary = getattr(reference, f"{name}_loss")(student, teacher, target, **hyper)
    sparse = reference.topk_loss(name, student, log_probs, indices, rest, target, hyper)
    torch.testing.assert_close(sparse[0], ordinary[0])
    assert type(sparse[1]) is type(ordinary[1])


@pytest.mark.parametrize("rest", RESTS)
def test_kd_is_decoupled(rest):
    """KD = DKD with alpha 1 and, as beta, what the teacher has beside the target, whatever the rest is."""
    student, log_probs, indices, target = make(8, 4, True, rows=1)
    q = np.exp(log_probs[0] / 2)
    others = 4 * (max(0, 1 - np.exp(log_probs[0]).sum()) / 4) ** 0.5
    z = q.sum() + (0 if rest == "renormalize" else others)
    beta = (q[indices[0] != target[0]].sum() + (others if rest in ("bucket", "uniform") else 0)) / z
    given = *map(torch.tensor, (student, log_probs, indices)), rest, torch.tensor(target)
    kd, _ = reference.topk_loss("kd", *given, {"temperature": 2.0})
    dkd, _ = reference.topk_loss("dkd", *given, {"temperature": 2.0, "alpha": 1.0, "beta": beta})
    torch.testing.assert_close(kd, dkd)


@pytest.mark.parametrize(("k", "inside"), [(1, True), (3, False), (5, True)])
@pytest.mark.parametrize(
    ("name", "rest"), [(name, rest) for name, rests in LOSSES.items() for rest in rests if rest in ("drop", "bucket")]
)
def test_derivatives(name, rest, k, inside):
    """Of those that are not the ordinary loss."""
    student, log_probs, indices, target = map(torch.tensor, make(5, k, inside, rows=1, pads=1))
    student.requires_grad_()

    def loss(logits):
        return reference.topk_loss(name, logits, log_probs, indices, rest, target, HYPER | {"temperature": 2.0})[0]

    if name == "wsld":  # its weight is a constant
        (first,) = torch.autograd.grad(loss(student), student, create_graph=True)
        assert torch.autograd.grad(first.square().sum(), student)[0].isfinite().all()
        return
    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradgradcheck(loss, student)


@pytest.mark.parametrize(("name", "rest"), [(name, rest) for name, rests in LOSSES.items() for rest in rests])
def test_a_class_that_cannot_occur(name, rest):
    """-inf in the rest, at the target and among the kept: no NaN in the gradient, and 0 there."""
    student, log_probs, indices, target = make(7, 3, True, rows=3)
    outside = next(j for j in range(7) if j not in indices[0])
    inside = next(j for j in indices[1] if j != target[1])
    student[0, outside] = student[1, inside] = student[2, target[2]] = -np.inf
    leaf = torch.tensor(student, requires_grad=True)
    hyper = HYPER | {"temperature": 2.0, "label_smoothing": 0.0}
    given = *map(torch.tensor, (log_probs, indices)), rest, torch.tensor(target), hyper
    loss, _ = reference.topk_loss(name, leaf, *given, reduction="none")
    assert not loss.isnan().any()
    loss.sum().backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[leaf == -torch.inf] == 0).all()
    # Under `uniform` every class has a share; elsewhere what is not kept may be impossible.
    if name != "js":
        assert bool(loss[0].isinf()) == (rest == "uniform")
        assert loss[1].isinf()


@pytest.mark.parametrize("rest", RESTS)
def test_rows_that_do_not_count(rest):
    student, log_probs, indices, target = map(torch.tensor, make(7, 3, True, rows=5))
    student[1], log_probs[2], indices[3], target[1] = torch.nan, torch.nan, 99, -100
    weight = torch.tensor([1.0, 1.0, 0.0, 0.0, 2.0])
    student.requires_grad_()
    hyper = {"temperature": 2.0, "ce_weight": 1.0}
    loss, _ = reference.topk_loss("kd", student, log_probs, indices, rest, target, hyper, weight=weight)
    loss.backward()
    each, _ = reference.topk_loss("kd", student, log_probs, indices, rest, target, hyper, reduction="none")
    torch.testing.assert_close(loss, (each[0] + 2 * each[4]) / 3)
    assert (student.grad[1:4] == 0).all() and student.grad[[0, 4]].abs().min() > 0
    assert each[[0, 1, 4]].isfinite().all() and each[2:4].isnan().all()


@pytest.mark.parametrize(("name", "rest"), [(name, rest) for name, rests in LOSSES.items() for rest in rests])
def test_rows_far_from_zero(name, rest):
    """A row's logits lie around 1000, where float32 has four decimals: what is computed from them is relative."""
    student, log_probs, indices, target = map(torch.tensor, make(9, 3, True, rows=6))
    student, log_probs = (student + 1000).float(), log_probs.float()
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = student.detach().to(dtype).requires_grad_()
        hyper = HYPER | {"temperature": 2.0}
        loss, _ = reference.topk_loss(name, leaf, log_probs.to(dtype), indices, rest, target, hyper, reduction="none")
        loss.sum().backward()
        found.append((loss.detach().double(), leaf.grad.double()))
    torch.testing.assert_close(*found, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rest", RESTS)
def test_no_rows_and_no_targets(rest):
    student, log_probs, indices, target = map(torch.tensor, make(7, 3, False, rows=4))
    empty = [each[:0] for each in (student, log_probs, indices)]
    assert reference.topk_loss("nkd", *empty, rest, target[:0], {})[0] == 0
    without = reference.topk_loss("kd", student, log_probs, indices, rest, None, {"temperature": 2.0})[0]
    torch.testing.assert_close(
        without, reference.topk_loss("kd", student, log_probs, indices, rest, target, {"temperature": 2.0})[0]
    )


@pytest.mark.parametrize("rest", RESTS)
def test_indices_that_are_none(rest):
    student, log_probs, indices, target = map(torch.tensor, make(7, 3, True, rows=4))
    indices[0, 0], indices[1, 0], indices[2, 0] = indices[0, 1], 7, -2
    loss, _ = reference.topk_loss("nkd", student, log_probs, indices, rest, target, {}, reduction="none")
    assert loss[:3].isnan().all() and loss[3].isfinite()


@pytest.mark.parametrize(
    ("name", "rest", "hyper", "error", "text"),
    [
        ("kd", "rest", {}, ValueError, "rest: expected one of 'drop'"),
        ("tf_kd", "drop", {}, ValueError, "loss: 'tf_kd' has no teacher"),
        ("js", "drop", {}, NotImplementedError, "rest: 'drop' is not defined for js_loss"),
        ("dist", "bucket", {}, NotImplementedError, "rest: 'bucket' .*take rest='renormalize' or 'uniform'"),
        ("js", "renormalize", {"beta": 1.0}, ValueError, "beta: at 1"),
        ("kd", "drop", {"logit_standardization": True}, ValueError, "logit_standardization: z-scores"),
    ],
)
def test_what_has_no_meaning(name, rest, hyper, error, text):
    student, log_probs, indices, target = map(torch.tensor, make(7, 3, True))
    with pytest.raises(error, match=text):
        reference.topk_loss(name, student, log_probs, indices, rest, target, hyper)
    if name == "kd" and rest == "drop":
        with pytest.raises(ValueError, match="target: nkd_loss needs"):
            reference.topk_loss("nkd", student, log_probs, indices, rest, None, {})
