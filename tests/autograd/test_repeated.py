"""Repeated calls, which skip checks and dispatcher on a GPU; here CPU tensors pass for a GPU's."""

import gc
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

import fused_kd
from fused_kd import check, direct, repeated
from fused_kd.core.catalogue import LOSSES

NAMES = tuple(LOSSES)


@pytest.fixture
def recalled(watch, monkeypatch):
    """Of each call whether one like it was known."""
    monkeypatch.setattr(direct, "_loss", None)  # it takes no tensors of a GPU
    monkeypatch.setattr(repeated, "_known", {})
    monkeypatch.setattr(repeated, "on_gpu", lambda logits: type(logits) is torch.Tensor)
    return watch(repeated)


def tensors_of(name, seed=0, dtype=torch.float32, soft=False):
    torch.manual_seed(seed)
    student, other, target = check.Case(dtype, 5, 37, {}, loss=name, soft=soft).inputs("cpu")
    student = student + 0.1 * torch.randn_like(student)
    return [student] if name == "tf_kd" else [student, other], target


def call(name, seed=0, dtype=torch.float32, soft=False, scale=0.37, **options):
    """Return the loss, the parts if there are, and the gradients."""
    logits, target = tensors_of(name, seed, dtype, soft)
    leaves = [each.detach().requires_grad_(k == 0 or name in ("uskd", "zipf_ls")) for k, each in enumerate(logits)]
    result = getattr(fused_kd, LOSSES[name].function)(*leaves, target, **{"backend": "native", **options})
    loss, parts = result if isinstance(result, tuple) else (result, ())
    (loss * scale).sum().backward()
    return [loss.detach(), *parts, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def plain_call(*given, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated, "on_gpu", lambda logits: False)
        return call(*given, **options)


@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_ordinary_ways_bits(recalled, name, dtype, soft):
    asked = [
        *({"reduction": reduction, **options} for reduction in ("mean", "sum") for options in check.OPTIONS[name]),
        {"reduction": "none"},
        {"return_parts": True, "ce_weight": 0.5},
        {"return_parts": True, "ce_weight": 1, "label_smoothing": 0.1},
    ]
    for options in asked:
        first = call(name, 0, dtype, soft, **options)
        second = call(name, 1, dtype, soft, **options)
        for found, seed in ((first, 0), (second, 1)):
            wanted = plain_call(name, seed, dtype, soft, **options)
            assert len(found) == len(wanted)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))
    # DIST row by row keeps the logits for its backward pass: its calls are never known.
    assert recalled == [known for options in asked for known in (False, name != "dist" or "none" not in str(options))]


def test_numbers_are_known_by_their_value(recalled):
    call("nkd", gamma=1, temperature=2.0)
    call("nkd", gamma=1.0, temperature=2)
    call("nkd", gamma=1.5, temperature=2)
    assert recalled == [False, True, False]


def test_a_gradient_has_calls_of_its_own(recalled):
    logits, target = tensors_of("kd")
    student = logits[0].requires_grad_()
    for wants in (True, False, True, False):
        with torch.set_grad_enabled(wants):
            loss = fused_kd.kd_loss(student, logits[1], target, backend="native")
        assert loss.requires_grad == wants
    loss = fused_kd.kd_loss(student.detach(), logits[1], target, backend="native")
    assert not loss.requires_grad
    assert recalled == [False, False, True, True, False]


WRONG = {
    "a number that is a flag": {"gamma": True},
    "a flag that is a number": {"logit_standardization": 0},
    "parts by a number": {"return_parts": 0},
    "a class index that is no int": {"ignore_index": -100.0},
    "a negative number": {"gamma": -1.0},
    "an unknown reduction": {"reduction": "average"},
    "an unknown backend": {"backend": "nativ"},
    "a backend that is no text": {"backend": ["native"]},
}


@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG)
def test_wrong_options_after_a_good_call(recalled, options):
    call("nkd", gamma=1.0)
    call("nkd", gamma=1.0)
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        call("nkd", **{"gamma": 1.0, **options})
    assert recalled == [False, True, False]


def test_wrong_tensors_after_a_good_call(recalled):
    logits, target = tensors_of("nkd")
    student, teacher = logits[0].requires_grad_(), logits[1]
    wrong = [
        (student[:, 0], teacher, target),
        (student, teacher[:, 1:], target),
        (student, teacher.double().to(torch.int64), target),
        (student, teacher.detach().requires_grad_(), target),
        (student, teacher, target[1:]),
        (student, teacher, target.to(torch.complex64)),
        (student.to_sparse(), teacher, target),
        (student, torch.nested.nested_tensor([teacher[0], teacher[1, :3]]), target),
        (student, teacher.to("meta"), target),
        (student, None, target),
        (student, teacher.numpy(), target),
    ]
    for _ in range(2):
        fused_kd.nkd_loss(student, teacher, target, backend="native")
    for tensors in wrong:
        with pytest.raises((TypeError, ValueError)):
            fused_kd.nkd_loss(*tensors, backend="native")
    assert recalled == [False, True] + [False] * len(wrong)


def test_one_tensor_in_two_roles(recalled):
    logits, target = tensors_of("kd", soft=True)
    student = logits[0]
    alone = [fused_kd.kd_loss(student, student, target, backend="native") for _ in range(2)]
    apart = [fused_kd.kd_loss(student, logits[1], target, backend="native") for _ in range(2)]
    again = fused_kd.kd_loss(student, student, target, backend="native")
    assert recalled == [False, False, False, True, True]
    assert torch.equal(alone[0], again)
    assert torch.equal(*apart)
    assert not torch.equal(alone[0], apart[0])


def test_a_lazily_negated_tensor(recalled):
    logits, target = tensors_of("kd")
    fused_kd.kd_loss(*logits, target, backend="native")
    negated = torch._neg_view(logits[1])
    found = fused_kd.kd_loss(logits[0], negated, target, backend="native")
    assert torch.equal(found, fused_kd.kd_loss(logits[0], -logits[1], target, backend="native"))
    assert recalled == [False, False, True]


def test_observed_calls_take_the_ops(recalled):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    call("nkd")
    with Mode():
        call("nkd")
    assert any("fused_kd.row_loss" in name for name in seen)
    assert any("fused_kd.scale_gradient_" in name for name in seen)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call("nkd")
    assert {"fused_kd::row_loss", "fused_kd::scale_gradient_"} <= {event.key for event in profile.key_averages()}
    logits, target = tensors_of("nkd")
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda student: fused_kd.nkd_loss(student, logits[1], target, backend="native"))(logits[0])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits[0], torch.ones_like(logits[0]))
        with pytest.raises(RuntimeError, match="forward-mode"):
            fused_kd.nkd_loss(dual, logits[1], target, backend="native")


def test_second_derivatives_and_retained_graphs(recalled):
    for _ in range(2):
        logits, target = tensors_of("nkd")
        student = logits[0].requires_grad_()
        loss = fused_kd.nkd_loss(student, logits[1], target, backend="native")
        first = [torch.autograd.grad(2 * loss, student, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*first)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(loss, student, create_graph=True)
    assert recalled == [False, True]


@pytest.mark.parametrize("name", NAMES)
def test_compiled_calls_are_not_kept(recalled, name):
    """Nor does the compiler see an address: it would make a graph for each batch."""
    function, counter = getattr(fused_kd, LOSSES[name].function), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for rows in (5, 6, 7, 8):
        student, other, target = check.Case(torch.float32, rows, 37, {}, seed=rows, loss=name).inputs("cpu")
        others = [] if name == "tf_kd" else [other]
        found = compiled(student.requires_grad_(), *others, target, backend="native")
        torch.testing.assert_close(found, function(student, *others, target, backend="reference"))
    assert counter.frame_count <= 2
    assert not repeated._known


def test_no_tensor_is_kept(recalled):
    logits, target = tensors_of("uskd")
    kept = [weakref.ref(each) for each in (*logits, target)]
    fused_kd.uskd_loss(*logits, target, backend="native")
    del logits, target
    gc.collect()
    assert not any(each() is not None for each in kept)
    call("uskd")
    assert len(repeated._known) == 2


def test_few_kinds_of_calls_are_kept(recalled, monkeypatch):
    monkeypatch.setattr(repeated, "MOST", 3)
    for step in range(8):
        call("kd", temperature=1.0 + step)
    assert 0 < len(repeated._known) <= 3
