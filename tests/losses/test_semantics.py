"""What a user meets besides plain numbers: ignored rows, infinities, NaN, reductions, empty batches."""

import math

import pytest
import torch
import torch.nn.functional as F

import fused_kd
from fused_kd import TopK
from fused_kd.core import checks

INF = float("inf")


@pytest.fixture
def rows(backend):
    _name, device = backend
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 12, generator=generator, dtype=torch.float64).to(device)
    teacher = torch.randn(6, 12, generator=generator, dtype=torch.float64).to(device)
    target = torch.randint(12, (6,), generator=generator).to(device)
    return student, teacher, target


def run(backend, student, teacher, target, **options):
    student = student.detach().clone().requires_grad_()
    loss, parts = fused_kd.nkd_loss(student, teacher, target, backend=backend[0], return_parts=True, **options)
    loss.sum().backward()
    return loss.detach(), parts, student.grad


def test_parts_sum_to_the_loss_and_are_detached(backend, rows):
    for reduction in ("mean", "sum", "none"):
        loss, parts, _ = run(backend, *rows, ce_weight=0.7, reduction=reduction)
        assert not any(part.requires_grad for part in parts)
        assert all(part.shape == loss.shape for part in parts)
        torch.testing.assert_close(parts.target + parts.non_target + parts.ce, loss)
    torch.testing.assert_close(parts.ce, 0.7 * F.cross_entropy(rows[0], rows[2], reduction="none"))


def test_reductions_agree(backend, rows):
    each, _, gradient = run(backend, *rows, reduction="none")
    total, _, gradient_of_sum = run(backend, *rows, reduction="sum")
    mean, _, gradient_of_mean = run(backend, *rows, reduction="mean")
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(each.mean(), mean)
    torch.testing.assert_close(gradient, gradient_of_sum)
    torch.testing.assert_close(gradient / 6, gradient_of_mean)


def test_dtypes_of_loss_and_gradient(backend, rows):
    student, teacher, target = rows
    for student_dtype, teacher_dtype, loss_dtype in (
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float16, torch.float64),
    ):
        loss, parts, gradient = run(backend, student.to(student_dtype), teacher.to(teacher_dtype), target)
        assert (loss.dtype, parts.ce.dtype, gradient.dtype) == (loss_dtype, loss_dtype, student_dtype)


@pytest.mark.parametrize("ignore_index", (-100, 5))
def test_ignored_rows_count_nowhere(backend, rows, ignore_index):
    student, teacher, target = rows
    target = torch.where(target == ignore_index, 0, target)
    kept, _, kept_gradient = run(backend, student[:4], teacher[:4], target[:4], ce_weight=1.0)
    student, teacher, target = student.clone(), teacher.clone(), target.clone()
    target[4:] = ignore_index
    student[4], teacher[5] = math.nan, INF  # not even a NaN comes through
    loss, _parts, gradient = run(backend, student, teacher, target, ce_weight=1.0, ignore_index=ignore_index)
    torch.testing.assert_close(loss, kept)
    torch.testing.assert_close(gradient[:4], kept_gradient)
    assert torch.equal(gradient[4:], torch.zeros_like(gradient[4:]))
    each, _, _ = run(backend, student, teacher, target, ignore_index=ignore_index, reduction="none")
    assert torch.equal(each[4:], torch.zeros_like(each[4:]))


def test_all_rows_ignored_or_none_there(backend, rows):
    student, teacher, target = rows
    loss, _, gradient = run(backend, student, teacher, torch.full_like(target, -100))
    assert loss.item() == 0.0
    assert not gradient.any()
    for reduction in ("mean", "sum", "none"):
        loss, _, gradient = run(backend, student[:0], teacher[:0], target[:0], reduction=reduction)
        assert gradient.shape == (0, 12)
        assert loss.sum().item() == 0.0


def test_two_classes_have_no_non_target_term(backend, rows):
    student, teacher, target = rows
    _loss, parts, gradient = run(backend, student[:, :2], teacher[:, :2], target % 2, gamma=1e6, reduction="none")
    assert not parts.non_target.any()
    q, p = teacher[:, :2].softmax(1), student[:, :2].softmax(1)
    column = (target % 2).unsqueeze(1)
    expected = q.gather(1, column) * (p - F.one_hot(target % 2, 2))
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_class_that_cannot_occur(backend, rows, temperature):
    """-inf from both: as if the class were not there. Its own gradient is 0."""
    student, teacher, target = rows
    target = target % 11
    student, teacher = student.clone(), teacher.clone()
    student[:, 11] = teacher[:, 11] = -INF
    loss, _, gradient = run(backend, student, teacher, target, temperature=temperature, ce_weight=1.0)
    expected, _, expected_gradient = run(
        backend, student[:, :11], teacher[:, :11], target, temperature=temperature, ce_weight=1.0
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[:, :11], expected_gradient)
    assert not gradient[:, 11].any()


def test_teacher_minus_infinity_alone(backend, rows):
    student, teacher, target = rows
    teacher = teacher.clone()
    teacher[:, 11] = -INF
    loss, _, gradient = run(backend, student, teacher, target % 11)
    expected, _, expected_gradient = run(("reference", None), student, teacher.clamp(min=-1e9), target % 11)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_student_minus_infinity_where_the_teacher_has_mass(backend, rows):
    student, teacher, target = rows
    student = student.clone()
    student[2, 11] = -INF
    loss, _, gradient = run(backend, student, teacher, target % 11, reduction="none")
    assert loss[2] == INF
    assert loss[[0, 1, 3, 4, 5]].isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[2, 11] == 0
    p = student[2].double().softmax(0)
    assert gradient[2, target[2] % 11] < 0 < p[target[2] % 11]


def test_target_that_cannot_occur(backend, rows):
    student, teacher, target = rows
    student, teacher = student.clone(), teacher.clone()
    student[1, target[1]] = -INF
    student[3, target[3]] = teacher[3, target[3]] = -INF  # 0 * log 0
    loss, parts, gradient = run(backend, student, teacher, target, reduction="none")
    assert parts.target[1] == INF
    assert parts.target[3] == 0
    assert loss[3].isfinite()
    assert gradient.isfinite().all()
    assert gradient[1, target[1]] == gradient[3, target[3]] == 0


def test_only_the_target_can_occur(backend, rows):
    """No non-target class left to the student: infinite where the teacher has mass there, else 0."""
    student, teacher, target = (x[:2].clone() for x in rows)
    alone = F.one_hot(target, 12).bool()
    student = torch.where(alone, student, -INF)
    teacher[1] = torch.where(alone[1], teacher[1], -INF)
    loss, parts, gradient = run(backend, student, teacher, target, ce_weight=1.0, reduction="none")
    assert parts.non_target.tolist() == [INF, 0.0]
    assert parts.target.tolist() == [0.0, 0.0]
    assert loss.tolist() == [INF, 0.0]
    assert not gradient.any()


@pytest.mark.parametrize("which", ("student", "teacher", "target_class"))
def test_nan_stays_in_its_row(backend, rows, which):
    student, teacher, target = (x.clone() for x in rows)
    clean, _, clean_gradient = run(backend, student, teacher, target, reduction="none")
    if which == "student":
        student[2, (target[2] + 1) % 12] = math.nan
    elif which == "teacher":
        teacher[2, (target[2] + 1) % 12] = math.nan
    else:
        student[2, target[2]] = math.nan
    loss, _, gradient = run(backend, student, teacher, target, reduction="none")
    assert loss[2].isnan()
    assert gradient[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(loss[others], clean[others])
    torch.testing.assert_close(gradient[others], clean_gradient[others])
    assert run(backend, student, teacher, target)[0].isnan()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_nan_with_any_payload(fused, dtype):
    """Whatever bits a NaN has, arithmetic on exponents must not turn it into a number."""
    _name, device = fused
    integers, exponent = (torch.int32, 0x7F800000) if dtype == torch.float32 else (torch.int64, 0x7FF << 52)
    teacher = torch.randn(4, 40, dtype=dtype, device=device)
    for payload in (1, 255, 511, 12345):
        bits = torch.tensor(exponent + payload, dtype=integers, device=device)
        for row in range(4):
            teacher[row, 5 * row + 7] = bits.view(dtype)
        loss, _, gradient = run(
            fused, torch.randn_like(teacher), teacher, torch.zeros(4, dtype=torch.int64, device=device)
        )
        assert loss.isnan()
        assert gradient.isnan().all()


@pytest.mark.parametrize("ce_weight", (0.0, 1.0))
def test_nan_among_probabilities_makes_the_row_nan(backend, rows, ce_weight):
    student, teacher, target = rows
    soft = F.one_hot(target, 12).double()
    soft[1, (target[1] + 1) % 12] = math.nan
    loss, _, gradient = run(backend, student, teacher, soft, ce_weight=ce_weight, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False, False, False]
    assert gradient[1].isnan().all()
    assert gradient[[0, 2, 3, 4, 5]].isfinite().all()


def test_gamma_zero_switches_the_term_off_at_infinities_too(backend, rows):
    student, teacher, target = rows
    student = student.clone()
    student[:, 11] = -INF
    loss, parts, gradient = run(backend, student, teacher, target % 11, gamma=0.0)
    assert parts.non_target == 0
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_infinite_logit_is_nan(backend, rows):
    student, teacher, target = (x.clone() for x in rows)
    student[0, target[0]], student[1, (target[1] + 1) % 12], teacher[2, target[2]] = INF, INF, INF
    loss, _, _ = run(backend, student, teacher, target, reduction="none")
    assert loss.isnan().tolist() == [True, True, True, False, False, False]


def test_huge_logits(fused):
    """-1e30 as a mask, maxima beyond the fast range reduction, gaps of 60 000 in float16."""
    _name, device = fused
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(5, 40, generator=generator).to(device) for _ in range(2))
    target = torch.tensor([0, 1, 2, 3, 4], device=device)
    plain = run(fused, student[:, :30], teacher[:, :30], target)
    for low in (-1e30, torch.finfo(torch.float32).min):
        masked_student, masked_teacher = student.clone(), teacher.clone()
        masked_student[:, 30:] = masked_teacher[:, 30:] = low
        loss, _, gradient = run(fused, masked_student, masked_teacher, target)
        torch.testing.assert_close(loss, plain[0])
        torch.testing.assert_close(gradient[:, :30], plain[2])
        assert not gradient[:, 30:].any()
    for scale in (1e5, 1e7, 1e12, 1e30):
        moved = run(fused, student * scale, teacher * scale, target, reduction="none")
        eager = run(("reference", device), student * scale, teacher * scale, target, reduction="none")
        torch.testing.assert_close(moved[0], eager[0])
        torch.testing.assert_close(moved[2], eager[2])
    half = torch.tensor([[0.0, 60000.0, -60000.0, 1.0]], device=device, dtype=torch.float16)
    loss, _, gradient = run(fused, half, half.flip(1), torch.tensor([1], device=device))
    eager, _, eager_gradient = run(("reference", device), half, half.flip(1), torch.tensor([1], device=device))
    torch.testing.assert_close(loss, eager)
    torch.testing.assert_close(gradient, eager_gradient)


def test_probability_targets_follow_their_largest_entry(backend, rows):
    student, teacher, target = rows
    soft = 0.6 * F.one_hot(target, 12).double() + 0.4 / 12
    loss, parts, _ = run(backend, student, teacher, soft, ce_weight=1.0)
    _hard, hard_parts, _ = run(backend, student, teacher, target, ce_weight=1.0)
    torch.testing.assert_close(parts.target, hard_parts.target)
    torch.testing.assert_close(parts.non_target, hard_parts.non_target)
    torch.testing.assert_close(parts.ce, F.cross_entropy(student, soft))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        loss, _, _ = run(backend, student, teacher, soft.to(dtype), ce_weight=1.0)
        assert loss.dtype == torch.float64
    tied = torch.zeros(6, 12, dtype=torch.float64, device=student.device)
    tied[:, 3] = tied[:, 7] = 0.5
    threes = torch.full_like(target, 3)
    torch.testing.assert_close(run(backend, student, teacher, tied)[0], run(backend, student, teacher, threes)[0])


def test_probability_target_with_nan_or_impossible_class(backend, rows):
    student, teacher, target = (x.clone() for x in rows)
    soft = F.one_hot(target, 12).double()
    soft[1, 0] = math.nan
    student[2, (target[2] + 1) % 12] = -INF
    teacher[2, (target[2] + 1) % 12] = -INF  # no mass in soft either: 0 * log 0
    loss, _, gradient = run(backend, student, teacher, soft, ce_weight=1.0, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False, False, False]
    assert loss[2].isfinite()
    assert gradient[2].isfinite().all()


def test_column_of_indices_is_taken_as_indices(backend, rows):
    student, teacher, target = rows
    expected, _, _ = run(backend, student, teacher, target)
    for column in (target.unsqueeze(1), *map(target.to, checks.INDEX_DTYPES)):
        torch.testing.assert_close(run(backend, student, teacher, column)[0], expected)


def test_a_top_k_teacher_takes_indices_of_the_same_dtypes(backend, rows):
    """Stored teachers have 16 unsigned bits, as stored tokens do."""
    student, teacher, target = rows
    log_probs, indices = teacher.log_softmax(-1).topk(3)
    expected = fused_kd.kd_loss(student, TopK(log_probs, indices, "bucket"), target, backend=backend[0])
    for dtype in checks.INDEX_DTYPES:
        kept = TopK(log_probs, indices.to(dtype), "bucket")
        loss = fused_kd.kd_loss(student, kept, target.to(dtype), backend=backend[0])
        torch.testing.assert_close(loss, expected)


def test_inputs_are_never_modified(backend, rows):
    student, teacher, target = (x.clone() for x in rows)
    run(backend, student, teacher, target)
    soft = F.one_hot(target, 12).double()
    run(backend, student, teacher, soft, ce_weight=1.0)
    leaf = student.clone().requires_grad_()
    fused_kd.nkd_loss(leaf, teacher, target, backend=backend[0]).mul(3.0).backward()
    for before, after in zip(rows, (leaf.detach(), teacher, target), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("classes", (3, 10, 1000))
def test_target_gradient_keeps_its_digits_as_p_approaches_one(fused, classes):
    """(q_y + ce)(p_y - 1) where p_y rounds to 1: published forms return 0 or noise there."""
    _name, device = fused
    student = torch.zeros(1, classes, device=device)
    student[0, 1] = 25.0
    teacher = student.clone()
    loss, _, gradient = run(fused, student, teacher, torch.tensor([1], device=device), gamma=0.0)
    rest = (classes - 1) * math.exp(-25.0)
    assert gradient[0, 1].item() == pytest.approx(-rest / (1 + rest) / (1 + rest), rel=1e-5)
    assert gradient[0].sum().item() == pytest.approx(0.0, abs=1e-6 * rest)
    assert loss.item() == pytest.approx(math.log1p(rest) / (1 + rest), abs=1e-7)
