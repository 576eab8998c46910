"""A divisor in place of the mean's, and logits whose last columns are padding, of every loss that takes them."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import fused_kd
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES

BACKENDS = ("native", "reference")


def make(loss, dtype=torch.float64, rows=7, classes=33):
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(rows, classes, generator=generator).to(dtype).requires_grad_()
    other = torch.randn(rows, classes, generator=generator).to(dtype)
    target = torch.randint(classes - 5, (rows,), generator=generator)
    target[2] = -100
    others = {"tf_kd": (), "zipf_ls": (torch.randn(rows, 4, classes, generator=generator).to(dtype),)}
    return student, others.get(loss, (other,)), target


def value_and_gradient(loss, student, others, target, **options):
    value = getattr(fused_kd, LOSSES[loss].function)(student, *others, target, ce_weight=0.5, **options)
    return value.detach(), *torch.autograd.grad(value, student)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_it_divides_the_sum(loss, backend):
    student, others, target = make(loss)
    weight = torch.rand(7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for given in (None, weight):
        wanted = value_and_gradient(loss, student, others, target, backend=backend, weight=given, reduction="sum")
        for normalizer in (12.5, torch.tensor(12.5), torch.tensor(12.5, dtype=torch.float16)):
            options = {"backend": backend, "weight": given, "normalizer": normalizer}
            found = value_and_gradient(loss, student, others, target, **options)
            for each, expected in zip(found, wanted, strict=True):
                torch.testing.assert_close(each, expected / 12.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if "Head" in loss.sources])
def test_it_divides_the_sum_over_a_source(loss, backend):
    _, others, target = make(loss)
    hidden, weight = (torch.randn(rows, 5, dtype=torch.float64, requires_grad=True) for rows in (7, 33))
    row_weight, function = torch.rand(7, dtype=torch.float64), getattr(fused_kd, LOSSES[loss].function)
    given = [others]
    if "TopK" in LOSSES[loss].sources:
        given.append((fused_kd.TopK(*others[0].log_softmax(1).topk(4), rest="renormalize"),))
    elif others:
        given.append((fused_kd.Head(torch.randn(7, 4).double(), torch.randn(33, 4).double()),))
    options = {"backend": backend, "return_parts": True} | ({"gamma": 0.0} if loss == "dist" else {})
    for each in given:
        for of_row in (None, row_weight):
            results = []
            for how in ({"reduction": "sum"}, {"normalizer": 12.5}, {"normalizer": torch.tensor(12.5)}):
                student = fused_kd.Head(hidden, weight, chunk_rows=3)
                value, parts = function(student, *each, target, weight=of_row, **how, **options)
                results.append([value.detach(), *parts, *torch.autograd.grad(value, (hidden, weight))])
            for found in results[1:]:
                torch.testing.assert_close(found, [wanted / 12.5 for wanted in results[0]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_zero_is_allowed(loss, backend):
    student, others, target = make(loss, torch.float32)
    for normalizer in (0, torch.tensor(0)):
        value, gradient = value_and_gradient(loss, student, others, target, backend=backend, normalizer=normalizer)
        assert value == 0 and not gradient.any()


class _NoCopies(TorchDispatchMode):
    """Raises where a CPU tensor is copied to meta tensors' device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._to_copy.default or (kwargs or {}).get("device") in (None, args[0].device)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("normalizer", [12.5, torch.tensor(12.5), torch.tensor(12)], ids=str)
def test_it_is_not_copied_to_the_device(normalizer):
    """A CUDA graph would record the address of a copy's source, and read it again after that is freed."""
    student, others, target = make("nkd")
    student, *others, target = (each.to("meta") for each in (student, *others, target))
    with _NoCopies():
        loss = fused_kd.nkd_loss(student, *others, target, normalizer=normalizer, backend="reference")
    assert loss.dtype == torch.float64


def test_half_precision_keeps_small_gradients():
    """Of a million items a gradient in float16 would underflow before the incoming one scales it."""
    student, others, target = make("nkd", torch.float16)
    loss = fused_kd.nkd_loss(student, *others, target, normalizer=2**20)
    (gradient,) = torch.autograd.grad(loss * 2**20, student)
    (expected,) = torch.autograd.grad(fused_kd.nkd_loss(student, *others, target, reduction="sum"), student)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("normalizer", "error", "words"),
    [
        (-1, ValueError, "at least 0, got -1"),
        (float("nan"), ValueError, "a finite number"),
        (torch.tensor(-1.0), ValueError, "at least 0"),
        (torch.ones(1), ValueError, r"without dimensions .* got one of shape \(1,\)"),
        (torch.ones((), requires_grad=True), ValueError, "does not require grad"),
        ("3", TypeError, "got str"),
        (True, TypeError, "got bool"),
        (10**400, ValueError, "no float can hold"),
        (torch.tensor(True), TypeError, "a real number, got torch.bool"),
        (torch.tensor(3j), TypeError, "a real number, got torch.complex64"),
        (torch.tensor(3.0, device="meta"), ValueError, "the device cpu or that of student_logits, cpu, got meta"),
    ],
)
def test_what_it_cannot_be(normalizer, error, words):
    student, others, target = make("kd")
    with pytest.raises(error, match=f"^normalizer: expected .*{words}"):
        fused_kd.kd_loss(student, *others, target, normalizer=normalizer)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_it_goes_with_a_mean(reduction):
    student, others, target = make("kd")
    with pytest.raises(ValueError, match=f"^normalizer: expected None unless reduction is 'mean'.*'{reduction}'"):
        fused_kd.KDLoss(reduction=reduction)(student, *others, target, normalizer=3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_padding_is_no_class(loss, backend, dtype):
    student, others, target = make(loss, dtype)
    wider = [torch.cat([other, torch.full((7, 4), torch.nan, dtype=dtype)], 1) for other in others]
    options = {"backend": backend, "temperature": 2.0, "label_smoothing": 0.1}
    found = value_and_gradient(loss, student, wider, target, num_classes=28, **options)
    narrow = student.detach()[:, :28].requires_grad_()
    wanted = value_and_gradient(loss, narrow, [other[:, :28] for other in others], target, **options)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1][:, :28], wanted[1])
    assert not found[1][:, 28:].any()


def test_padding_in_any_dimension():
    student, (teacher,), target = make("nkd")
    images = [each.detach().reshape(7, 33, 1, 1).expand(7, 33, 2, 2) for each in (student, teacher)]
    found = fused_kd.nkd_loss(*images, target[:, None, None].expand(7, 2, 2), class_dim=1, num_classes=30)
    torch.testing.assert_close(found, fused_kd.nkd_loss(student[:, :30], teacher[:, :30], target).detach())


def test_compiled_schedules_of_a_normalizer():
    """A number of items that changes with each step compiles nothing anew."""
    student, (teacher,), target = make("nkd", torch.float32)
    counter = CompileCounter()
    counted = torch.compile(fused_kd.nkd_loss, fullgraph=True, backend=counter)
    for normalizer in (torch.tensor(3), torch.tensor(5), torch.tensor(0)):
        expected = fused_kd.nkd_loss(student, teacher, target, normalizer=normalizer)
        torch.testing.assert_close(counted(student, teacher, target, normalizer=normalizer), expected)
    assert counter.frame_count == 1
    for number in (3, 5, 7, 11):
        counted(student, teacher, target, normalizer=number)
    assert counter.frame_count <= 4
