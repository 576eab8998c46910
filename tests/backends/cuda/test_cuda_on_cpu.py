"""Run the CUDA kernels' sources on the CPU, as C++ with stand-ins for CUDA's headers (tests/cuda_on_cpu).

This tests the kernels' logic: indices, masks, barriers, formulas, conversions. tests/compiled/test_cuda_ptx.py tests
some cases as nvcc and CUB compile and launch them. With ``-p tools.ptx.cuda.plugin`` this file tests all cases so.
"""

import math

import pytest
import torch
from cuda_cases import TOLERANCE, asking, check, expected, inputs, mixed, ours

from fused_kd import reference
from fused_kd.backends.native import cuda

INF, NAN = float("inf"), float("nan")


# Around every arrangement's capacity, chunks that are cut off, and rows whose vectors are not aligned.
@pytest.mark.parametrize(
    "classes",
    (2, 3, 5, 100, 127, 128, 129, 256, 257, 512, 513, 1000, 1001, 1025, 2049, 4097, 8191, 12289, 24576, 24577),
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_arrangement(core, dtype, classes):
    student, weak, target = inputs(3, classes, dtype)
    target[1] = -100
    check(core, student, weak, target, ce_weight=1.0)


@pytest.mark.parametrize("rank", reference.RANKS)
@pytest.mark.parametrize("square", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_rank_modes(core, rank, square, dtype):
    student, weak, target = inputs(5, 40, dtype)
    for reduction in ("none", "sum", "mean"):
        check(core, student, weak, target, rank=rank, square=square, mu=0.1, alpha=0.3, reduction=reduction)
    for labels in (target, mixed(target, 40)):
        check(core, student, weak, labels, rank=rank, square=square, mu=0.1, ce_weight=0.5, label_smoothing=0.2)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("label_dtype", TOLERANCE, ids=str)
def test_mixed_labels(core, dtype, label_dtype):
    student, weak, target = inputs(6, 130, dtype)
    for labels in (
        torch.nn.functional.one_hot(target, 130).float(),  # one target
        mixed(target, 130),
        mixed(target, 130, share=0.5),  # the lower index first
        mixed(target, 130, smoothing=0.1),
        torch.full((6, 130), 1 / 130),  # none
        torch.rand(6, 130, generator=torch.Generator().manual_seed(1)),
    ):
        check(core, student, weak, labels.to(label_dtype), ce_weight=1.0, reduction="none")


@pytest.mark.parametrize("classes", (12, 300, 9000))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_ties_go_to_the_lower_class(core, classes, dtype):
    generator = torch.Generator().manual_seed(0)
    student = torch.randint(3, (4, classes), generator=generator).to(dtype)
    weak = torch.zeros_like(student)
    student[0] = weak[0] = 1.5  # a constant row, in which the target ties too
    target = torch.tensor([classes // 2, 0, classes - 1, 5])
    for rank in reference.RANKS:
        check(core, student, weak, target, rank=rank)


@pytest.mark.parametrize("classes", (12, 300))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_a_target_that_ties_or_stands_alone(core, classes, dtype):
    generator = torch.Generator().manual_seed(0)
    ranking = torch.randint(3, (6, classes), generator=generator).to(dtype)
    other, target = torch.randn(6, classes, generator=generator).to(dtype), torch.arange(6)
    other[torch.arange(6), target] = torch.linspace(3, 200, 6, dtype=dtype)  # far above, where it does not rank
    for labels in (target, mixed(target, classes)):
        check(core, other, ranking, labels, rank="weak", beta=1.0)
        check(core, ranking, other, labels, rank="final", beta=1.0)
    weak = torch.full_like(other, -INF)
    weak[torch.arange(6), target] = torch.linspace(-3, 3, 6, dtype=dtype)
    for rank in reference.RANKS:
        check(core, ranking + torch.arange(classes) / 500, weak, target, rank=rank, beta=1.0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_classes_that_cannot_occur(core, dtype):
    student, weak, target = inputs(6, 12, dtype)
    student[0, 3] = student[1, :] = -INF
    student[1, target[1]] = 0.0  # nothing but the target
    student[2, target[2]] = -INF  # the target itself
    student[3, 0], student[3, 1] = 1e4, -1e4
    student[4, target[4]] = 60.0
    for options in ({}, {"rank": "cls_kd"}, {"rank": "final", "mu": 0.0}):
        check(core, student, weak, target, reduction="none", **options)
    check(core, student[:1], weak[:1], mixed(target, 12)[:1], reduction="none", ce_weight=1.0)
    weak[0, 5] = -INF
    check(core, student, weak, target, reduction="none")
    weak[1], student[4, 2:5], student[4, 7] = -INF, -INF, NAN  # their gradient is 0 in rows without a value too
    check(core, student, weak, target, reduction="none")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_rows_without_a_value(core, dtype):
    student, weak, target = inputs(4, 12, dtype)
    weak[1, 3] = NAN
    for bad in (NAN, INF):
        weak[1, 3] = bad
        loss, parts, student_gradient, weak_gradient, sums = ours(core, student, weak, target, reduction="none")
        assert parts[:, 1].isnan().all()
        assert student_gradient[1].isnan().all()
        assert weak_gradient[1].isnan().all()
        rest = [0, 2, 3]
        assert not any(bool(x.isnan().any()) for x in (loss[rest], student_gradient[rest], weak_gradient[rest], sums))
    student[2, 0] = NAN
    weak[1, 3] = 0.0
    loss, parts, student_gradient, weak_gradient, sums = ours(core, student, weak, target, reduction="none")
    assert loss.isnan().all(), "through the batch mean"
    assert parts.isnan().all(1).tolist() == [True, False, False, False], "the target term alone"
    assert student_gradient.isnan().all()
    assert weak_gradient.isnan().any(1).tolist() == [False, False, True, False]
    assert sums.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_the_batch_mean_passes_on_a_nan_among_labels(core, dtype):
    student, weak, target = inputs(4, 12, dtype)
    labels = mixed(target, 12)
    labels[1, labels[1].argmin()] = NAN
    check(core, student, weak, labels, reduction="none", ce_weight=1.0)
    check(core, student, weak, labels.round(), reduction="none", ce_weight=1.0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("index", (-1, 12, 2**40, -(2**40)))
def test_target_out_of_range(core, dtype, index):
    student, weak, target = inputs(3, 12, dtype)
    target[1] = index
    sums = cuda.uskd_batch_sums(core, student, target, True, -100)
    assert sums.isnan().tolist() == [True, False, False]
    sums = torch.tensor([0.5, 0.0, 3.0], dtype=torch.float64)
    asked = asking(reduction="none")
    loss, _, student_gradient, weak_gradient, *_ = cuda.uskd(core, student, weak, target, sums, None, asked)
    for result in (loss.unsqueeze(1), student_gradient, weak_gradient):
        assert result.isnan().all(dim=1).tolist() == [False, True, False]
        assert result.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_ignored_and_no_rows(core, dtype):
    student, weak, target = inputs(4, 12, dtype)
    target[2] = -100
    student[2], weak[2, 3] = NAN, INF
    check(core, torch.where(student.isnan(), 0.0, student), torch.where(weak.isinf(), 0.0, weak), target)
    loss, _, *gradients, _ = ours(core, student, weak, target)
    assert loss.isfinite()
    assert not any(gradient[2].any() for gradient in gradients)
    for reduction in ("mean", "sum", "none"):
        everywhere = ours(core, student, weak, torch.full_like(target, 7), ignore_index=7, reduction=reduction)
        assert not any(result.any() for result in everywhere)
        nothing = ours(core, student[:0], weak[:0], target[:0], reduction=reduction)
        assert nothing[0].shape == ((0,) if reduction == "none" else ())
        assert not any(result.any() for result in nothing)


@pytest.mark.parametrize("classes", (300, 301, 8201))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_strides(core, dtype, classes):
    student, weak, target = inputs(4, classes, dtype)
    padded = torch.empty(4, classes + 9, dtype=dtype).fill_(NAN)
    padded[:, 5 : 5 + classes] = weak
    for a, b in (
        (student.t().contiguous().t(), weak),
        (student, padded[:, 5 : 5 + classes]),
        (student[:1].expand(4, classes), weak.flip(0)),
        (student.repeat_interleave(2, 1)[:, ::2], weak),
    ):
        check(core, a, b, torch.stack([target, target], 1)[:, 0])
    check(core, student, weak, mixed(target, classes).t().contiguous().t(), ce_weight=1.0)


@pytest.mark.parametrize(
    "pair", ((torch.float16, torch.float32), (torch.float64, torch.bfloat16), (torch.float32, torch.float64))
)
def test_logits_of_two_dtypes(core, pair):
    student, weak, target = inputs(3, 150)
    check(core, student.to(pair[0]), weak.to(pair[1]), target)


@pytest.mark.parametrize("rows", (1500, 2049))
def test_many_rows(core, rows):
    """Each block counts the rows, or an earlier launch does; several blocks copy the parts."""
    student, weak, target = inputs(rows, 4)
    target[::3] = -100
    before = core.launches()
    for reduction in ("mean", "none"):
        check(core, student, weak, target, reduction=reduction)
    # Batch sums 2, rows 1, reduction 1, two gradients scaled; and the count.
    assert core.launches() - before == 12 + (rows > 2048)


def test_float16_is_divided_in_the_backward_pass(core):
    student, weak, target = inputs(300, 20, torch.float16)
    exact = expected(student, weak, target)
    for scale in (1.0, 2.0**13):
        loss, _, student_gradient, *_ = ours(core, student, weak, target, scale=scale)
        assert abs(loss - exact[0]) < 1e-6
        # Rounded to float16 twice: when stored, and here, after the division.
        assert (student_gradient.double() - exact[2]).abs().max() <= 2**-10 * exact[2].abs().max()
    scales = [core.cuda_stored_scale(3, 2.0**13, rows) for rows in (1, 2, 3, 1000, 2**20)]
    assert all(2.0**12 < scale <= 2.0**13 for scale, _ in scales)
    assert [norm * 2.0**13 for _, norm in scales] == [1, 1 / 2, 1 / 2, 1 / 512, 2.0**-20]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_scale_gradient(core, dtype):
    generator = torch.Generator().manual_seed(0)
    for rows, classes in ((1, 3), (5, 1001), (3, 8193), (70, 300)):
        gradient = torch.randn(rows, classes, generator=generator).to(dtype)
        accumulate = reference.accumulation_dtype(gradient)
        each = torch.randn(rows, generator=generator).to(accumulate)
        norm = torch.tensor(0.25, dtype=accumulate)
        for incoming in (each, each[:1].expand(rows), each[0], torch.tensor(4.0, dtype=accumulate)):
            factor = (incoming * norm).reshape(-1, 1)
            wanted = (gradient.to(accumulate) * factor).to(dtype)
            out = torch.empty_like(gradient)
            cuda.scale_gradient(core, gradient, incoming, norm, out)
            assert torch.equal(out, wanted)
            in_place = gradient.clone()
            cuda.scale_gradient(core, in_place, incoming, norm, in_place)
            assert torch.equal(in_place, wanted)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_stored_zero_stays_whatever_comes_in(core, dtype):
    accumulate = torch.promote_types(dtype, torch.float32)
    one = torch.ones((), dtype=accumulate)
    for classes in (3, 8, 1001, 8193):
        gradient = torch.randn(3, classes, generator=torch.Generator().manual_seed(0)).to(dtype)
        gradient[:, ::3] = gradient[1] = 0.0
        gradient[2, -2] = NAN
        zeros = gradient == 0
        for bad in (INF, NAN):
            each = torch.tensor([bad, bad, bad], dtype=accumulate)
            for incoming, norm in ((each, one), (each[:1].expand(3), one), (each[0], one), (one, each[0])):
                in_place = gradient.clone()
                for stored, out in ((gradient, torch.empty_like(gradient)), (in_place, in_place)):
                    cuda.scale_gradient(core, stored, incoming, norm, out)
                    assert torch.equal(out == 0, zeros)
                    assert not out[~zeros].isfinite().any()
                    assert out[2, -2].isnan()


def test_half_precision_conversions(core):
    """Every 16-bit pattern through the kernels' loads and stores, in vectors and one by one."""
    for dtype in (torch.bfloat16, torch.float16):
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        for rows in (patterns.reshape(256, 256), torch.nn.functional.pad(patterns, (0, 1)).reshape(-1, 65537)):
            out = torch.empty_like(rows)
            cuda.scale_gradient(core, rows, torch.tensor(1 / 3), torch.tensor(1.0), out)
            wanted = (rows.float() * torch.tensor(1 / 3)).to(dtype)
            assert torch.equal(out.isnan(), wanted.isnan())
            assert torch.equal(out.nan_to_num(0.0), wanted.nan_to_num(0.0))


def test_an_incoming_one_touches_nothing(core):
    gradient = torch.randn(3, 50)
    before = gradient.clone()
    cuda.scale_gradient(core, gradient, torch.tensor(4.0), torch.tensor(0.25), gradient)
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("classes", (100, 200, 500, 1000, 2000, 4000, 8000, 13000, 25000))
@pytest.mark.parametrize("soft", (False, True))
def test_same_bits_in_both_orders(core, classes, soft):
    """Run a block's threads first to last, then last to first: one of the orders exposes a missing barrier."""
    for dtype in (torch.bfloat16, torch.float64):
        student, weak, target = inputs(3, classes, dtype)
        target = mixed(target, classes) if soft else target
        results = []
        for backwards in (False, True):
            core.run_backwards(backwards)
            results.append(ours(core, student, weak, target, ce_weight=1.0))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("classes", (12, 1000, 9000))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_row_weights(core, dtype, classes):
    """Factors of the parts and of both gradients. A row with factor 0 does not count, whatever it holds."""
    student, weak, target = inputs(5, classes, dtype)
    sums = cuda.uskd_batch_sums(core, student, target, True, -100)
    factors = torch.tensor([[0.5, 2, 0, 1, 3], [0.25, 1, 0, 2, 1], [1, 0.5, 0, 4, 2]], dtype=torch.float64)
    asked = asking(reduction="none", ce_weight=1.0)

    def run(student, weak, factors):
        return cuda.uskd(core, student, weak, target, sums, factors, asked)

    plain = run(student, weak, None)
    spoilt = weak.clone()
    spoilt[2] = NAN
    loss, parts, student_gradient, weak_gradient, *norms = run(student, spoilt, factors)
    assert [norm.item() for norm in norms] == [1.0, 1.0]
    for result in (loss[2], parts[:, 2], student_gradient[2], weak_gradient[2]):
        assert not result.any()
    kept = [0, 1, 3, 4]
    for result, before, factor in (
        (loss, plain[0], factors[0]),
        (parts.t(), plain[1].t(), factors[0, :, None]),
        (student_gradient, plain[2], factors[1, :, None]),
        (weak_gradient, plain[3], factors[2, :, None]),
    ):
        wanted = factor[kept] * before[kept].double()
        unit = TOLERANCE[before.dtype]
        torch.testing.assert_close(result[kept].double(), wanted, rtol=2 * unit, atol=unit * wanted.abs().max().item())


def test_a_gradient_that_is_not_wanted(core):
    student, weak, target = inputs(3, 200)
    sums = cuda.uskd_batch_sums(core, student, target, True, -100)
    both = cuda.uskd(core, student, weak, target, sums, None, asking())
    for wanted in ((True, False), (False, True), (False, False)):
        some = cuda.uskd(core, student, weak, target, sums, None, asking(wanted))
        assert torch.equal(some[0], both[0])
        for gradient, full, want in zip(some[2:4], both[2:4], wanted, strict=True):
            assert torch.equal(gradient, full) if want else gradient.shape == (0,)


def sorted_call(core):
    """A call with rows sorted in global memory."""
    student, weak, target = inputs(1, 20, torch.float64)
    sums = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    return cuda.uskd(core, student, weak, target, sums, None, asking())


def refused_device(core):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cuda, "_place", lambda device: (3, 0))
        cuda.uskd_batch_sums(core, *inputs(2, 5)[::2], True, -100)


def refused_launch(core):
    one = torch.ones(())
    at = one.data_ptr()
    core.cuda_scale_gradient((0, 0), at, at, 0, (at, 0, (1,)), at, 0, (-1, 1))


@pytest.mark.parametrize(
    "refused, words",
    ((refused_device, "invalid device ordinal"), (refused_launch, "invalid configuration argument")),
)
def test_an_error_of_cuda_is_raised_once(core, refused, words):
    """CUDA keeps an error until it is read, and CUB takes any error for its own."""
    before = sorted_call(core)
    with pytest.raises(RuntimeError, match=f"CUDA says: {words}"):
        refused(core)
    assert all(torch.equal(a, b) for a, b in zip(before, sorted_call(core), strict=True))


def test_a_ruined_context_is_told_by_every_call(core):
    core.ruin_context(700)
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="illegal memory access"):
                sorted_call(core)
            with pytest.raises(RuntimeError, match="illegal memory access"):
                cuda.uskd_batch_sums(core, *inputs(2, 5)[::2], True, -100)
        assert "illegal memory access" in core.cuda_problem()
    finally:
        core.ruin_context(0)
    sorted_call(core)


def test_more_classes_than_32_bits_index(core):
    assert core.cuda_uskd_workspace(0, 0, 2**31 - 2049, 0) > 0
    with pytest.raises(ValueError, match="expected at most 2147481599 classes, got 2147481600"):
        core.cuda_uskd_workspace(0, 0, 2**31 - 2048, 0)


def test_infinite_loss_is_the_cross_entropys(core):
    """A label on a class that the student excludes."""
    student, weak, target = inputs(2, 10)
    labels = mixed(target, 10, smoothing=0.1)
    student[0, (labels[0].argmin())] = -INF
    loss, _, student_gradient, *_ = check(core, student, weak, labels, ce_weight=1.0, reduction="none")
    assert math.isinf(loss[0])
    assert student_gradient.isfinite().all()
