"""Ordinary calls with a top-k teacher: the results of the other way, and its errors."""

import math

import pytest
import torch

import fused_kd
from fused_kd import TopK, direct, kd_loss
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES

pytestmark = pytest.mark.skipif(direct._loss is None, reason="this PyTorch has no interface that the core knows")
FUSED = [(name, rest) for name, loss in ROW_LOSSES.items() for rest in loss.rests]


def make(dtype=torch.float32, rows=7, classes=41, kept=9, kind=torch.float32):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    log_probs, indices = teacher.log_softmax(-1).topk(kept)
    log_probs[1, -2:], indices[1, -2:] = -math.inf, -1
    target = torch.randint(classes, (rows,), generator=generator)
    target[2] = -100
    return student.to(dtype), log_probs.to(kind), indices, target


def mixed(given, dtype=torch.float32):
    """Labels of two classes in place of indices."""
    student, log_probs, indices, target = given
    labels = 0.6 * torch.nn.functional.one_hot(target.clamp(min=0), student.shape[1])
    return student, log_probs, indices, labels.scatter_add(1, indices[:, :1], torch.full((7, 1), 0.4)).to(dtype)


def call(name, given, rest, scale=1.0, **options):
    student, log_probs, indices, target = given
    leaf = student.clone().requires_grad_()
    function = getattr(fused_kd, LOSSES[name].function)
    loss, parts = function(leaf, TopK(log_probs, indices, rest), target, return_parts=True, **options)
    (loss * scale).backward()
    return [loss.detach(), *parts, leaf.grad]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "rest"), FUSED)
def test_the_other_ways_results(taken, monkeypatch, name, rest, dtype):
    asked = [
        {},
        {"reduction": "sum", "temperature": 3.0},
        {"ce_weight": 0.5, "label_smoothing": 0.1, "backend": "native"},
    ]
    cases = [make(dtype), make(dtype, kind=torch.float16), make(dtype, classes=5000, kept=60), mixed(make(dtype))]
    found = [call(name, given, rest, 0.37, **options) for given in cases for options in asked]
    assert all(taken)
    assert len(taken) == len(found)
    monkeypatch.setattr(direct, "_loss", None)
    others = [call(name, given, rest, 0.37, **options) for given in cases for options in asked]
    assert not any(taken[len(found) :])
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 3e-7, "atol": 1e-9}
    for ours, theirs in zip(found, others, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert x.dtype == y.dtype
            rounding = {"rtol": 2**-8, "atol": 1e-9} if x.dtype == torch.bfloat16 else tolerance
            torch.testing.assert_close(x, y, **rounding)


def test_strides_and_no_labels(taken):
    student, log_probs, indices, target = make()
    plain = call("kd", (student, log_probs, indices, target), "bucket")
    apart = [each.mT.contiguous().mT for each in (student, log_probs, indices)]
    for x, y in zip(plain, call("kd", (*apart, target), "bucket"), strict=True):
        torch.testing.assert_close(x, y)
    unlabelled = kd_loss(student, TopK(log_probs, indices, "bucket"))
    torch.testing.assert_close(
        unlabelled, kd_loss(student, TopK(log_probs, indices, "bucket"), torch.zeros_like(target))
    )
    assert taken == [True] * 4


def test_what_is_not_ordinary_is_left_to_the_other_way(taken):
    student, log_probs, indices, target = make()
    for given, rest, options in (
        ((student, log_probs, indices.int(), target), "bucket", {}),
        ((student[None], log_probs[None], indices[None], target[None]), "bucket", {}),
        ((student.half(), log_probs, indices, target), "bucket", {}),
        ((student, log_probs, indices, target), "bucket", {"weight": torch.ones(7)}),
        ((student, log_probs, indices, target), "bucket", {"backend": "reference"}),
    ):
        call("kd", given, rest, **options)
        assert taken.pop() is False, options


def test_errors_are_those_of_the_other_way(taken):
    student, log_probs, indices, target = make()
    wants = torch.zeros((), requires_grad=True)
    twice, out, infinite = indices.clone(), indices.clone(), log_probs.clone()
    twice[3, 1] = twice[3, 0]
    out[3, 1] = 41
    infinite[3, 0] = math.inf
    for given, rest, options, error, message in (
        ((student, log_probs + 1, indices, target), "bucket", {}, ValueError, "sum to at most 1"),
        ((student, log_probs + 1, indices, target), "drop", {}, ValueError, "sum to at most 1"),
        ((student, infinite, indices, target), "bucket", {}, ValueError, "sum to at most 1"),
        ((student, log_probs, twice, target), "bucket", {}, ValueError, "teacher_logits.indices"),
        ((student, log_probs, out, target), "bucket", {}, IndexError, "teacher_logits.indices"),
        ((student, log_probs, indices.float(), target), "bucket", {}, TypeError, "teacher_logits.indices"),
        ((student, log_probs[:, :-1], indices, target), "bucket", {}, ValueError, "teacher_logits.indices"),
        ((student, log_probs + wants, indices, target), "bucket", {}, ValueError, "do not require grad"),
        ((student, log_probs, indices, target + 100), "bucket", {}, IndexError, "target"),
        ((student, log_probs, indices, torch.ones(7, 41) / 40), "bucket", {}, ValueError, "target"),
        ((student, log_probs, indices, target), "Bucket", {}, ValueError, "teacher_logits.rest"),
        ((student, log_probs, indices, target), ["bucket"], {}, (TypeError, ValueError), "teacher_logits.rest"),
        ((student, log_probs, indices, target), "drop", {"logit_standardization": True}, ValueError, "TopK"),
    ):
        with pytest.raises(error, match=message):
            call("kd", given, rest, **options)
    with pytest.raises(ValueError, match="beta: at 1"):
        call("js", (student, log_probs, indices, target), "renormalize", beta=1)
    with pytest.raises(NotImplementedError, match="rest: 'drop'"):
        call("js", (student, log_probs, indices, target), "drop")
    assert not any(taken)


def test_rows_that_do_not_count_may_hold_anything(taken):
    student, log_probs, indices, target = make()
    plain = call("nkd", (student, log_probs, indices, target), "bucket")
    log_probs[2], indices[2] = 7.0, 3  # row 2 is ignored
    for x, y in zip(plain, call("nkd", (student, log_probs, indices, target), "bucket"), strict=True):
        assert torch.equal(x, y)
    assert taken == [True, True]


def test_any_numbers_are_right_where_only_differences_matter(taken):
    student, log_probs, indices, target = make(torch.float64, kind=torch.float64)
    plain = call("kd", (student, log_probs, indices, target), "renormalize")
    for x, y in zip(plain, call("kd", (student, log_probs + 5, indices, target), "renormalize"), strict=True):
        torch.testing.assert_close(x, y)
    assert taken == [True, True]
