"""USKD: published values, agreement with the reference, ranking, and what a user meets besides plain numbers."""

import math

import golden
import pytest
import torch
import torch.nn.functional as F
from uskd_cases import FUSED, assert_same, make, run, zipf_labels

from fused_kd import reference, uskd_loss, uskd_soft_labels

GOLDEN = [case for case in golden.CASES if case["loss"] == "uskd"]
RANKS = ("normalized", "cls_kd", "weak", "final", "sum")
LABELS = ("index", "mixed", "smoothed", "one_hot")
INF = float("inf")
#: Both gradients' entries are differences of terms of order (alpha + beta + mu + ce_weight) / N.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=FUSED)
def fused(request):
    return request.param


@pytest.fixture(params=[*FUSED, "reference"])
def backend(request):
    return request.param


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_matches_the_published_values(case, backend):
    inputs = {key: torch.tensor(value) for key, value in case["inputs"].items()}
    target = torch.tensor(case["inputs"]["target"], dtype=inputs["target"].dtype)
    if target.is_floating_point():
        target = torch.tensor(case["inputs"]["target"], dtype=torch.float64)
    logits = [torch.tensor(case["inputs"][k], dtype=torch.float64) for k in ("student_logits", "weak_logits")]
    loss, _, *gradients = run(backend, *logits, target, **case["params"])
    assert loss.item() == pytest.approx(case["value"], rel=1e-8, abs=1e-8)
    for gradient, key in zip(gradients, ("student_logits", "weak_logits"), strict=True):
        expected = torch.tensor(case["grads"][key], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("square", (True, False))
@pytest.mark.parametrize("rank", RANKS)
def test_every_option_agrees_with_the_reference(fused, rank, square, kind):
    options = {"alpha": 0.8, "beta": 0.5, "mu": 0.3, "ce_weight": 0.7, "rank": rank, "square": square}
    options["label_smoothing"] = 0.0 if square else 0.2
    # Triton's interpreter takes a second for what the others do in milliseconds.
    for classes in (2, 5, 600) if fused == "triton" else (2, 3, 5, 17, 100, 1000):
        student, weak, target = make(6, classes, kind)
        if classes > 5:
            student[1, 3] = -INF  # takes no Zipf mass
        if kind == "index":
            target[0] = -100
            target[1] = 0
        assert_same(
            run(fused, student, weak, target, **options), run("reference", student, weak, target, **options), 1e-10, 6
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("rows", (0, 1, 7, 33))
@pytest.mark.parametrize("classes", (2, 10, 1000, 1001, 4097, 21841))
def test_dtypes_and_shapes_agree_with_float64(fused, dtype, rows, classes):
    """Ranked by the weak logits as rounded to the dtype: their order, unlike that of a key, survives the conversion."""
    if fused == "triton" and classes > 10:
        rows = min(rows, 3)  # of its interpreter's time
    student, weak, target = make(rows, classes, dtype=dtype)
    options = {"ce_weight": 1.0, "mu": 0.3, "rank": "weak"}
    ours = run(fused, student, weak, target, **options)
    exact = run("reference", student.double(), weak.double(), target, **options)
    assert (ours[2].dtype, ours[3].dtype) == (dtype, dtype)
    assert_same(ours, exact, TOLERANCE[dtype], rows)


def test_mixed_dtypes_and_strides(fused):
    student, weak, target = make(7, 40)
    options = {"ce_weight": 1.0, "mu": 0.5}
    exact = run("reference", student.float().double(), weak.bfloat16().double(), target, **options)
    ours = run(fused, student.float(), weak.bfloat16(), target, **options)
    assert (ours[2].dtype, ours[3].dtype) == (torch.float32, torch.bfloat16)
    assert_same((*ours[:3], ours[3].double()), exact, 2**-8, 7)
    transposed = student.t().contiguous().t(), weak.t().contiguous().t()
    wide = torch.stack([student, weak], 2)
    for pair in (transposed, (wide[..., 0], wide[..., 1])):
        leaves = [x.detach().requires_grad_() for x in pair]
        uskd_loss(*leaves, target, backend=fused, **options).backward()
        expected = run("reference", student, weak, target, **options)
        torch.testing.assert_close(leaves[0].grad, expected[2])
        torch.testing.assert_close(leaves[1].grad, expected[3])


def test_blocks_without_a_class_that_can_occur(fused):
    """A row's maximum is that of the classes that can occur, however many neighbours cannot and however low it is."""
    student, weak, target = make(4, 5000, spread=2.0)
    student, weak, target = student - 300, weak - 300, target % 100
    student[:, 100:4200] = -INF
    ours = run(fused, student, weak, target, mu=0.0)
    assert_same(ours, run("reference", student, weak, target, mu=0.0), 1e-10, 4)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("classes", (30, 9000))
def test_equal_logits_rank_by_class_index(fused, classes, rank):
    """The lower index first, exactly, targets too, however far apart equal logits lie and whatever rounds."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randint(-3, 3, (8, classes), generator=generator).float()
    weak, target = student / 2, torch.randint(classes, (8,), generator=generator)
    order = student.sort(dim=1, descending=True, stable=True).indices
    zipf = torch.zeros(student.shape).scatter(1, order, (1 / torch.arange(1, classes + 1)).expand(8, -1))
    zipf = zipf.scatter(1, target.unsqueeze(1), 0.0)
    labels = zipf_labels(fused, student, weak, target, rank)
    torch.testing.assert_close(labels, zipf / zipf.sum(1, keepdim=True), rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize("keys", ("ties", "constant", "zeros", "negative", "crowded", "probabilities", "random"))
@pytest.mark.parametrize("classes", (2, 3, 15, 16, 17, 64, 65, 100, 1000, 1024, 1025, 4097, 21841, 300_000))
def test_ranking_is_a_stable_descending_sort(native, classes, keys):
    generator = torch.Generator().manual_seed(classes)
    values = torch.randn(3, classes, generator=generator)
    if keys == "ties":
        values = values.bfloat16().float().round()
    elif keys == "constant":
        values = torch.ones_like(values)
    elif keys == "zeros":
        values = torch.where(values > 0, values, torch.where(values < -1, 0.0, -0.0))
    elif keys == "negative":
        values = -values.abs() * 1e3
        values[:, 1] = -INF
    elif keys == "crowded":  # a few units in the last place apart, but for an outlier on either side
        values = 1 + 1e-6 * values
        values[:, 0], values[:, 1] = 1e9, 1e-9
    elif keys == "probabilities":
        values = (3 * values).softmax(1)
    expected = values.sort(dim=1, descending=True, stable=True).indices
    for name in native.instruction_sets():
        native.instruction_set = name
        assert torch.equal(native.argsort_descending(values), expected), name


def test_equal_keys_give_the_lower_class_the_higher_rank(backend):
    student = torch.zeros(1, 6, dtype=torch.float64)
    zipf = torch.tensor([1.0, 1 / 2, 0.0, 1 / 4, 1 / 5, 1 / 6], dtype=torch.float64)
    zipf /= zipf.sum()
    torch.testing.assert_close(zipf_labels(backend, student, student, torch.tensor([2]))[0], zipf)
    zipf[2] = 1.0  # P = p^2 + 1 - mean(p^2)
    torch.testing.assert_close(uskd_soft_labels(student, student, torch.tensor([2]))[0], zipf)


def test_tie_heavy_bfloat16(fused):
    student, weak, target = make(8, 500, dtype=torch.bfloat16, spread=0.02)
    for rank in RANKS:
        ours = run(fused, student, weak, target, rank=rank, beta=2.0)
        theirs = run("reference", student.float(), weak.float(), target, rank=rank, beta=2.0)
        # Near-equal keys may swap neighbouring ranks, which moves the student's gradient but not the weak logits'.
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours[3].float(), theirs[3], rtol=2**-7, atol=1e-7)


def test_one_hot_row_has_one_target(backend):
    """Published code invents a second one among the zeros."""
    student, weak, target = make(kind="one_hot")
    soft = run(backend, student, weak, target, ce_weight=1.0)
    hard = run(backend, student, weak, target.argmax(1), ce_weight=1.0)
    for a, b in zip(soft, hard, strict=True):
        torch.testing.assert_close(a, b)


def test_soft_labels_are_what_the_loss_uses(backend):
    student, weak, target = make(kind="mixed")
    labels = uskd_soft_labels(student, weak, target)
    log_p = student.log_softmax(1)
    is_target = target > 0
    parts = run(backend, student, weak, target)[1]
    expected = -(labels * log_p)[is_target].sum() / 6
    torch.testing.assert_close(parts[0], expected)
    log_p_hat = student.masked_fill(is_target, -INF).log_softmax(1).masked_fill(is_target, 0.0)
    torch.testing.assert_close(parts[1], -0.1 * (labels.masked_fill(is_target, 0.0) * log_p_hat).sum() / 6)
    torch.testing.assert_close(labels.masked_fill(is_target, 0.0).sum(1), torch.ones(6, dtype=torch.float64))


def test_gradcheck_with_the_soft_labels_frozen(backend):
    """P and the Zipf labels are constants to the gradient, so the check is of a function that has them as constants."""
    student, weak, target = make(4, 9, "mixed")
    labels = uskd_soft_labels(student, weak, target)
    is_target, smoothed = target > 0, 0.9 * target + 0.1 / 9

    def frozen(student, weak):
        log_p_hat = student.masked_fill(is_target, -INF).log_softmax(1).masked_fill(is_target, 0.0)
        rows = -(labels * torch.where(is_target, student.log_softmax(1), 0.3 * log_p_hat)).sum(1)
        return (rows - 0.2 * (smoothed * weak.log_softmax(1)).sum(1)).mean() + F.cross_entropy(student, target)

    leaves = student.clone().requires_grad_(), weak.clone().requires_grad_()
    assert torch.autograd.gradcheck(frozen, leaves)
    expected = torch.autograd.grad(frozen(*leaves), leaves)
    ours = run(backend, student, weak, target, beta=0.3, mu=0.2, ce_weight=1.0)
    torch.testing.assert_close(ours[0], frozen(*leaves).detach())
    torch.testing.assert_close(ours[2:], expected)


def test_ignored_rows_count_nowhere(backend):
    student, weak, target = make()
    kept = run(backend, student[:4], weak[:4], target[:4], ce_weight=1.0)
    target[4:] = -100
    student[4], weak[5] = math.nan, INF
    ours = run(backend, student, weak, target, ce_weight=1.0)
    torch.testing.assert_close(ours[:2], kept[:2])
    for gradient, expected in zip(ours[2:], kept[2:], strict=True):
        torch.testing.assert_close(gradient[:4], expected)
        assert not gradient[4:].any()
    nothing = run(backend, student, weak, torch.full_like(target, -100))
    assert nothing[0] == 0
    assert not nothing[2].any()
    empty = run(backend, student[:0], weak[:0], target[:0])
    assert empty[0] == 0


def test_nan_stays_in_its_row_but_for_the_batch_mean(backend):
    student, weak, target = make()
    weak[2, (target[2] + 1) % 12] = math.nan
    loss, _, *gradients = run(backend, student, weak, target, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    for gradient in gradients:
        assert gradient[2].isnan().all()
        assert gradient[[0, 1, 3, 4, 5]].isfinite().all()
    student[2, (target[2] + 1) % 12] = math.nan  # p of its target is NaN, and so is the mean
    assert run(backend, student, weak, target, reduction="none")[0].isnan().all()


@pytest.mark.parametrize("kind", ("mixed", "one_hot"))
def test_the_batch_mean_passes_on_a_nan_among_labels(backend, kind):
    """To the target terms of all rows, and so to the student's gradient; the weak logits' has nothing of it."""
    student, weak, target = make(kind=kind)
    target[2, target[2].argmin()] = math.nan
    loss, parts, student_gradient, weak_gradient = run(backend, student, weak, target, reduction="none", ce_weight=1.0)
    row = [False, False, True, False, False, False]
    assert loss.isnan().all()
    assert [part.isnan().tolist() for part in parts] == [[True] * 6, row, row, row]
    assert student_gradient.isnan().any(1).all()
    assert weak_gradient.isnan().any(1).tolist() == weak_gradient.isnan().all(1).tolist() == row
    sums = reference.uskd_batch_sums(student, target)
    if backend != "reference":
        sums = torch.ops.fused_kd.uskd_batch_sums(student, target, True, -100, backend)
    assert sums.isnan().tolist() == [True, True, False]


def test_classes_that_cannot_occur(backend):
    student, weak, target = make()
    target = target % 11
    student[:, 11] = -INF
    loss, parts, gradient, weak_gradient = run(backend, student, weak, target, ce_weight=1.0)
    assert loss.isfinite()
    assert not gradient[:, 11].any()
    assert weak_gradient[:, 11].all()
    weak[0, 11] = -INF
    loss, parts, _, weak_gradient = run(backend, student, weak, target, reduction="none")
    assert parts[2].tolist()[0] == INF
    assert loss[1:].isfinite().all()
    assert weak_gradient[0, 11] == 0
    assert weak_gradient.isfinite().all()


def test_two_classes_have_no_non_target_term(backend):
    student, weak, target = make(classes=2)
    assert not run(backend, student, weak, target % 2, beta=1e6)[1][1].any()


def test_ranks_do_not_mix_probabilities_with_logarithms(backend):
    """The published code's newest commit does; the default is the paper's Eq. 10, and the other is offered by name."""
    weak = torch.tensor([[0.0, 2.0, 0.0, 0.5]], dtype=torch.float64).log_softmax(1)
    student = torch.tensor([[3.0, -2.0, 1.0, 1.5]], dtype=torch.float64)
    by_rank = {rank: zipf_labels(backend, student, weak, torch.tensor([0]), rank)[0, 1:] for rank in RANKS}
    p, v = student.softmax(1)[0], weak.softmax(1)[0]
    keys = {
        "normalized": v / (1 - v[0] + 1e-6) + p / (1 - p[0] + 1e-6),
        "cls_kd": v / (1 - v[0] + 1e-6) + p.log() / (1 - p[0].log() + 1e-6),
        "weak": v,
        "final": p,
        "sum": v + p,
    }
    for rank, key in keys.items():
        assert by_rank[rank].argsort(descending=True).tolist() == key[1:].argsort(descending=True).tolist(), rank


def test_same_bits_whatever_the_thread_count(native):
    student, weak, target = make(33, 3001, dtype=torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run("native", student, weak, target))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_every_instruction_set(native):
    for name in native.instruction_sets():
        native.instruction_set = name
        for kind in LABELS:
            student, weak, target = make(5, 2100, kind)
            ours = run("native", student, weak, target, ce_weight=1.0)
            assert_same(ours, run("reference", student, weak, target, ce_weight=1.0), 1e-10, 5)


def test_reference_batch_sums_match(fused):
    for kind in LABELS:
        student, _, target = make(7, 40, kind)
        sums = torch.ops.fused_kd.uskd_batch_sums(student, target, True, -100, fused)
        torch.testing.assert_close(sums, reference.uskd_batch_sums(student, target))


def test_the_op_sums_its_own_rows(fused):
    student, weak, target = make(7, 40)
    options = (None, [1.0, 0.1, 0.0, 0.005, *[0.0] * 2, 1.0, 1.0, 0.0], "normalized", True, -100, "mean", True, True)
    sums = torch.ops.fused_kd.uskd_batch_sums(student, target, True, -100, fused)
    wanted = torch.ops.fused_kd.uskd(student, weak, target, sums, *options, fused)
    torch.testing.assert_close(torch.ops.fused_kd.uskd(student, weak, target, None, *options, fused), wanted)
