"""USKD of last layers that are not applied yet: the student's, the weak one, or both."""

import itertools

import pytest
import torch

import fused_kd
from fused_kd import Head

ROWS, CLASSES = 9, 257


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    made = []
    for width in (12, 7):
        made += [torch.randn(ROWS, width, generator=generator), torch.randn(CLASSES, width, generator=generator) / 3]
        made += [torch.randn(CLASSES, generator=generator)]
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    target[3] = -100
    return [each.to(dtype).requires_grad_() for each in made], target


def logits(hidden, weight, bias):
    return hidden @ weight.T + bias


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_values_and_gradients(reduction, backend):
    given, target = tensors()
    incoming = torch.linspace(-1, 2, ROWS, dtype=torch.float64) if reduction == "none" else 2.0
    mixed = torch.rand(ROWS, CLASSES, dtype=torch.float64).pow(8).softmax(1)
    options = {"reduction": reduction, "ce_weight": 0.5, "alpha": 0.7, "return_parts": True}
    weights = torch.rand(ROWS, dtype=torch.float64)
    some = weights.index_fill(0, torch.tensor([0, 5]), 0.0)  # these rows are still part of the batch mean
    for labels, weight in itertools.product((target, mixed), (None, weights, some)):
        wanted, parts = fused_kd.uskd_loss(
            logits(*given[:3]), logits(*given[3:]), labels, backend="reference", weight=weight, **options
        )
        expected = torch.autograd.grad((wanted * incoming).sum(), given)
        for heads in ((True, True), (True, False), (False, True)):
            both = [
                Head(*of, chunk_rows=4) if head else logits(*of)
                for head, of in zip(heads, (given[:3], given[3:]), strict=True)
            ]
            loss, found = fused_kd.uskd_loss(*both, labels, backend=backend, weight=weight, **options)
            torch.testing.assert_close((loss, *found), (wanted, *parts))
            gradients = torch.autograd.grad((loss * incoming).sum(), given)
            torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """Logits are not rounded, so that no rank differs from those of float32's."""
    given, target = tensors(dtype)
    wide = [each.detach().float().requires_grad_() for each in given]
    loss = fused_kd.uskd_loss(Head(*given[:3]), Head(*given[3:]), target, beta=1.0, mu=1.0)
    wanted = fused_kd.uskd_loss(logits(*wide[:3]), logits(*wide[3:]), target, beta=1.0, mu=1.0)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=0)
    for found, expected in zip(torch.autograd.grad(loss, given), torch.autograd.grad(wanted, wide), strict=True):
        assert (found - expected).norm() <= (torch.finfo(dtype).eps + 1e-4) * expected.norm()


def test_the_module_applies_its_own_layer_as_a_head():
    given, target = tensors()
    criterion = fused_kd.USKDLoss(7, CLASSES, ce_weight=1.0).double()
    feature = given[3]
    dense = criterion(logits(*given[:3]), feature, target)
    loss = criterion(Head(*given[:3]), feature, target, normalizer=ROWS - 1)
    torch.testing.assert_close(loss, dense)
    layer = criterion.weak_classifier.weight
    torch.testing.assert_close(torch.autograd.grad(loss, layer), torch.autograd.grad(dense, layer))


def test_the_module_averages_a_map_beside_a_head():
    given, target = tensors()
    criterion = fused_kd.USKDLoss(7, CLASSES, ce_weight=1.0).double()
    feature = torch.randn(ROWS, 7, 3, 2, dtype=torch.float64, requires_grad=True)
    dense = criterion(logits(*given[:3]), feature, target)
    loss = criterion(Head(*given[:3]), feature, target)
    torch.testing.assert_close(loss, dense)
    torch.testing.assert_close(torch.autograd.grad(loss, feature), torch.autograd.grad(dense, feature))


def test_messages_of_the_module():
    given, target = tensors()
    head, feature = Head(*given[:3]), given[3]
    with pytest.raises(ValueError, match=r"student_logits: expected shape \(N, 11\), .*, got \(9, 257\)"):
        fused_kd.USKDLoss(7, 11).double()(head, feature, target)
    with pytest.raises(
        ValueError, match=r"feature: expected shape \(9, 8\) or \(9, 8, H, W\), of in_features=8 .* \(9, 7\)"
    ):
        fused_kd.USKDLoss(8, CLASSES).double()(head, feature, target)
    with pytest.raises(ValueError, match="class_dim: expected None with a Head"):
        fused_kd.USKDLoss(7, CLASSES, class_dim=1).double()(head, feature, target)
    shard = fused_kd.ClassShard(logits(*given[:3]), 0, CLASSES)
    with pytest.raises(TypeError, match="student_logits: expected a Tensor or a Head, got ClassShard"):
        fused_kd.USKDLoss(7, CLASSES).double()(shard, feature, target)


def test_messages():
    given, target = tensors()
    with pytest.raises(ValueError, match="weak_logits: expected the shape and device of student_logits"):
        fused_kd.uskd_loss(Head(*given[:3]), Head(given[3], given[4][1:]), target)
    with pytest.raises(TypeError, match="weak_logits: expected float64 if student_logits are float64"):
        fused_kd.uskd_loss(Head(*given[:3]), torch.zeros(ROWS, CLASSES), target)


def test_compiled_in_one_graph():
    given, target = tensors(torch.float32)

    def step(*given):
        return fused_kd.uskd_loss(Head(*given[:3]), Head(*given[3:]), target) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*given), given)
    torch.testing.assert_close(found, torch.autograd.grad(step(*given), given))


def test_the_ops_are_in_order():
    given, target = tensors(torch.float32)
    given = [each.detach() for each in given]
    ops = torch.ops.fused_kd
    sums = (*given[:3], target, [1.0, 0.0], True, -100, CLASSES, 4, None, "native")
    torch.library.opcheck(ops.source_uskd_batch_sums.default, sums, test_utils=("test_schema", "test_faketensor"))
    hyper = [1.0, 0.1, 0.0, 0.005, 0.0, 0.0, 1.0, 0.0, 0.0, *[1.0, 0.0] * 2]
    for wanted, reduction in (([True] * 6, "mean"), ([False, True, False] * 2, "none")):
        arguments = (None, target, torch.zeros(3, dtype=torch.float64), None, hyper, "normalized", True, -100)
        where = (CLASSES, 4, None, reduction, wanted, "native")
        utilities = ("test_schema", "test_faketensor")
        torch.library.opcheck(ops.source_uskd.default, (*given, *arguments, *where), test_utils=utilities)
