"""Direct calls of the C++ core: the same bits as through the ops, and only ordinary calls are direct."""

import gc
import itertools
import math
import weakref

import numpy as np
import pytest
import torch
import torch._dynamo.compiled_autograd
from torch.utils.checkpoint import checkpoint

import fused_kd
from fused_kd import check, direct, nkd_loss, uskd_loss
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES
from fused_kd.losses._options import checked

pytestmark = pytest.mark.skipif(direct._loss is None, reason="this PyTorch has no interface that the core knows")
NAMES = tuple(LOSSES)


def make(name, dtype=torch.float32, rows=5, classes=37, soft=False):
    case = check.Case(dtype, rows, classes, {}, loss=name, soft=soft)
    student, other, target = case.inputs("cpu")
    return [student] if name == "tf_kd" else [student, other], target


def call(name, logits, target, scale=1.0, **options):
    """Loss, parts if there are, and gradients."""
    leaves = [each.detach().requires_grad_(k == 0 or name == "uskd") for k, each in enumerate(logits)]
    result = getattr(fused_kd, LOSSES[name].function)(*leaves, target, **options)
    loss, parts = result if isinstance(result, tuple) else (result, ())
    (loss * scale if scale != 1.0 else loss).backward()
    return [loss.detach(), *parts, *(leaf.grad for leaf in leaves if leaf.requires_grad)]


@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_other_ways_bits(taken, monkeypatch, name, dtype, soft):
    logits, target = make(name, dtype, soft=soft)
    asked = [
        *({"reduction": reduction, **options} for reduction in ("mean", "sum") for options in check.OPTIONS[name]),
        {"return_parts": True, "ce_weight": 0.5, "backend": "native"},
        {"ce_weight": 1, "label_smoothing": 0.1},
        *([{"logit_standardization": True}] if name in ROW_LOSSES and name != "tf_kd" else []),
    ]
    found = [call(name, logits, target, scale, **options) for options in asked for scale in (1.0, 0.37)]
    assert all(taken)
    assert len(taken) == len(found)
    monkeypatch.setattr(direct, "_loss", None)
    others = [call(name, logits, target, scale, **options) for options in asked for scale in (1.0, 0.37)]
    for a, b in zip(found, others, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            assert torch.equal(x, y) or bool((x.isnan() & y.isnan()).all())


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_padding(taken, monkeypatch, name):
    logits, target = make(name)
    target = target.clamp(max=29)
    if len(logits) > 1:
        logits[1] = logits[1][:, :33]
    soft = torch.rand(5, 30).softmax(1)
    asked = [(labels, scale) for labels in (target, soft) for scale in (1.0, 0.37)]
    found = [call(name, logits, labels, scale, num_classes=30) for labels, scale in asked]
    assert all(taken)
    monkeypatch.setattr(direct, "_loss", None)
    for ours, (labels, scale) in zip(found, asked, strict=True):
        for x, y in zip(ours, call(name, logits, labels, scale, num_classes=30), strict=True):
            assert torch.equal(x, y)


def test_wrong_padding_is_left_to_the_checks(taken):
    (student, teacher), target = make("nkd")
    for wrong in (1, 0, -3, 38, 2**70, True, 30.0, "30"):
        with pytest.raises((TypeError, ValueError), match=r"^num_classes: expected"):
            nkd_loss(student, teacher, target, num_classes=wrong)
    with pytest.raises(ValueError, match=r"^num_classes: expected at most the 33 classes of teacher_logits"):
        nkd_loss(student, teacher[:, :33], target, num_classes=35)
    assert not any(taken)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes(taken, monkeypatch, name):
    logits, target = make(name, torch.float64)
    pairs = [
        [each.to(dtype) for each, dtype in zip(logits, dtypes, strict=False)]
        for dtypes in itertools.permutations((torch.float32, torch.float64, torch.bfloat16), 2)
    ]
    found = [call(name, pair, target) for pair in pairs]
    assert all(taken)
    monkeypatch.setattr(direct, "_loss", None)
    for ours, pair in zip(found, pairs, strict=True):
        for x, y in zip(ours, call(name, pair, target), strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_strides(taken, monkeypatch, name):
    logits, target = make(name, rows=6, classes=11)
    turned = [each.mT.contiguous().mT for each in logits]
    sparse = [each.repeat_interleave(3, dim=0)[::3] for each in logits]
    found = [call(name, some, target) for some in (logits, turned, sparse)]
    assert taken == [True] * 3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_what_is_not_ordinary_is_left_to_the_other_way(taken):
    (student, teacher), target = make("nkd")
    mine = student.clone().requires_grad_()
    half = student.half(), teacher.half()
    images = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.long)
    for tensors, options in (
        ((mine, teacher, target), {"reduction": "none"}),
        ((mine, teacher, target), {"weight": torch.ones(5)}),
        ((mine, teacher, target), {"normalizer": 3.0}),
        ((mine, teacher, target), {"class_dim": 1}),
        ((mine, teacher, target), {"backend": "reference"}),
        ((torch.nn.Parameter(student), teacher, target), {}),
        ((*half, target), {}),
        ((mine, teacher, target.int()), {}),
        ((mine, teacher, target[:, None]), {}),
        (images, {}),
        ((student[:0], teacher[:0], target[:0]), {}),
    ):
        nkd_loss(*tensors, **options)
        assert taken.pop() is False, options
    nkd_loss(mine, half[1], target)
    assert taken.pop() is True, "a teacher's float16 gradient is not wanted"


def test_a_view_that_stands_for_its_negative(taken):
    (student, teacher), target = make("nkd")
    for place in range(2):
        given = [student, teacher]
        given[place] = torch._neg_view(-given[place])
        assert torch.equal(nkd_loss(*given, target), nkd_loss(student, teacher, target))
        assert taken == [False, True]
        taken.clear()


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_under_what_watches_or_transforms(taken):
    (student, teacher), target = make("nkd")
    with Watching():
        nkd_loss(student, teacher, target)
    with torch.autograd.forward_ad.dual_level():
        nkd_loss(student, teacher, target)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        nkd_loss(student, teacher, target)
    assert "fused_kd::row_loss" in {event.key for event in profile.key_averages()}
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda each: nkd_loss(each, teacher, target))(student)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda each: nkd_loss(each, teacher, target), student)
    assert not any(taken)


def refused(numbers, settings):
    try:
        checked(numbers, settings)
    except (TypeError, ValueError):
        return True
    return False


VALUES = (
    *(0.0, 0, 1, 0.5, 1.0, 2.5, -0.1, -1, math.inf, -math.inf, math.nan, 10**400, True, "1", None, torch.ones(())),
    *map(np.float64, (0.5, -0.1, math.inf, math.nan)),
)


@pytest.mark.parametrize(
    "name", ("alpha", "beta", "gamma", "mu", "correct", "power", "temperature", "ce_weight", "label_smoothing")
)
def test_no_number_is_taken_that_a_check_refuses(name):
    (student, teacher), target = make("nkd")
    settings = {"logit_standardization": False, "reduction": "mean", "ignore_index": -100}
    common = (None, None, None, None, "auto", False)
    for value in VALUES:
        try:
            wrong = refused({name: value}, settings)
        except OverflowError:
            wrong = True
        made = direct.loss("nkd", fused_kd.LossParts, (student, teacher, target), {name: value}, settings, common)
        assert (made is None) == wrong, value


@pytest.mark.parametrize(
    ("name", "values"),
    (
        ("reduction", ("mean", "sum", "Mean", None, 1)),
        ("ignore_index", (-100, 0, 2**62, 2**70, True, 1.0, None)),
        ("logit_standardization", (True, False, 1, None, "no")),
    ),
)
def test_no_setting_is_taken_that_a_check_refuses(name, values):
    (student, teacher), target = make("nkd")
    target = target.clamp(min=0)
    common = (None, None, None, None, "auto", False)
    for value in values:
        settings = {"logit_standardization": False, "reduction": "mean", "ignore_index": -100, name: value}
        made = direct.loss("nkd", fused_kd.LossParts, (student, teacher, target), {}, settings, common)
        if refused({}, settings):
            assert made is None, value
        elif value != 2**70:  # beyond int64 no class can be
            assert made is not None, value


def test_errors_are_those_of_the_other_way(taken):
    (student, teacher), target = make("nkd")
    for wrong, error, message in (
        ((student, teacher[:, :-1], target), ValueError, "teacher_logits: expected the shape"),
        (
            (student, teacher.requires_grad_(), target),
            ValueError,
            "teacher_logits: expected logits that do not require",
        ),
        ((student, teacher.detach(), target + 100), IndexError, "target"),
        ((student, teacher.detach(), torch.ones(5, 37)), ValueError, "target"),
        ((student, [1.0], target), TypeError, "teacher_logits: expected a Tensor"),
        ((student, teacher.detach(), None), TypeError, "target: expected a Tensor"),
    ):
        with pytest.raises(error, match=message):
            nkd_loss(*wrong)
    assert not any(taken)


@pytest.mark.parametrize("incoming", (1.0, 2.0, -1.0, 0.0, math.inf, math.nan))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_what_comes_in(taken, monkeypatch, incoming, dtype):
    (student, teacher), target = make("nkd", dtype)
    target[1] = -100

    def gradient():
        leaf = student.clone().requires_grad_()
        loss = nkd_loss(leaf, teacher, target)
        loss.backward(torch.tensor(incoming, dtype=loss.dtype))
        return leaf.grad

    ours = gradient()
    assert taken == [True]
    assert not ours[1].any(), "what is 0 stays 0"
    monkeypatch.setattr(direct, "_loss", None)
    assert torch.equal(ours.nan_to_num(7.0), gradient().nan_to_num(7.0))


def test_twice_and_to_be_differentiated():
    (student, teacher), target = make("nkd")
    leaf = student.clone().requires_grad_()
    loss = nkd_loss(leaf, teacher, target)
    first = torch.autograd.grad(2.0 * loss, leaf, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(2.0 * loss, leaf, retain_graph=True)[0], first)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    batched = torch.autograd.grad(
        nkd_loss(leaf, teacher, target), leaf, torch.tensor([1.0, 2.0]), is_grads_batched=True
    )
    torch.testing.assert_close(batched[0][1], first)


@pytest.mark.parametrize("scale", (1.0, 2.0))
@pytest.mark.parametrize("name", ("nkd", "uskd"))
def test_compiled_autograd(taken, name, scale):
    logits, target = make(name)
    plain = call(name, logits, target, scale)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        compiled = call(name, logits, target, scale)
    assert all(taken)
    for a, b in zip(plain, compiled, strict=True):
        assert torch.equal(a, b)
    torch._dynamo.reset()


def test_hooks_and_checkpoints(taken):
    (student, teacher), target = make("nkd")
    leaf = student.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        nkd_loss(leaf, teacher, target).backward()
    plain, leaf.grad = leaf.grad, None
    checkpoint(nkd_loss, leaf, teacher, target, use_reentrant=False).backward()
    assert torch.equal(leaf.grad, plain)
    assert all(taken)


def test_uskd_of_which_one_gradient_is_wanted(taken):
    (student, weak), target = make("uskd")
    both = call("uskd", (student, weak), target)
    for place in range(2):
        leaves = [student.clone(), weak.clone()]
        leaves[place].requires_grad_()
        uskd_loss(*leaves, target).backward()
        assert torch.equal(leaves[place].grad, both[1 + place])
        assert leaves[1 - place].grad is None
    assert all(taken)


def test_nothing_is_kept():
    """What a call makes is freed: tensors that C++ has made are counted by hand."""
    (student, teacher), target = make("uskd")
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    loss, parts = uskd_loss(student, teacher, target, return_parts=True)
    loss.backward()
    made = [weakref.ref(each) for each in (loss, parts.target, student.grad, teacher.grad)]
    with pytest.raises(IndexError):
        uskd_loss(student, teacher, target + 1000)
    student.grad = teacher.grad = None
    del loss, parts
    gc.collect()
    assert [each() for each in made] == [None] * 4
