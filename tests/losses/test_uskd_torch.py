"""USKD as a citizen of PyTorch: ops, compile, its module, process groups, and its refusals."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import worlds
from torch import nn
from torch.library import opcheck
from uskd_cases import FUSED, make, run

from fused_kd import USKDLoss, uskd_loss
from fused_kd.core.options import HyperParameters


@pytest.fixture(params=FUSED)
def fused(request):
    return request.param


@pytest.fixture(params=[*FUSED, "reference"])
def backend(request):
    return request.param


def test_opcheck_and_second_backward(fused):
    student, weak, target = make(dtype=torch.float16)
    sums = torch.ops.fused_kd.uskd_batch_sums.default
    opcheck(sums, (student, target, True, -100, fused))
    totals = sums(student, target, True, -100, fused)
    for reduction in ("mean", "none"):
        options = (
            list(HyperParameters(1.0, 0.1, mu=0.005, ce_weight=1.0, label_smoothing=0.1)),
            "normalized",
            True,
            -100,
            reduction,
            True,
            True,
            fused,
        )
        for row_weight in (None, torch.arange(6.0)):
            opcheck(torch.ops.fused_kd.uskd.default, (student, weak, target, totals, row_weight, *options))
        opcheck(torch.ops.fused_kd.uskd.default, (student, weak, target, None, None, *options))
    leaves = student.requires_grad_(), weak.requires_grad_()
    loss = uskd_loss(*leaves, target, backend=fused) * 4.0
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))
    for wanted in (leaves, leaves[:1], leaves[1:]):
        with pytest.raises(RuntimeError, match="do not support double backward"):
            torch.autograd.grad(uskd_loss(*leaves, target, backend=fused), wanted, create_graph=True)


def test_fullgraph(backend):
    torch._dynamo.reset()
    student, weak, target = make(dtype=torch.float32)
    compiled = torch.compile(
        lambda s, w: uskd_loss(s * 2, w * 2, target, backend=backend), fullgraph=True, backend="aot_eager"
    )
    results = []
    for function in (compiled, lambda s, w: uskd_loss(s * 2, w * 2, target, backend=backend)):
        leaves = student.clone().requires_grad_(), weak.clone().requires_grad_()
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*results)


def test_only_the_gradient_that_is_wanted_is_stored(fused):
    student, weak, target = make(32, 50, dtype=torch.float32)
    weak.requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        loss = uskd_loss(student, weak, target, backend=fused)
    assert sum(sizes) <= weak.numel() + 2
    loss.backward()
    assert weak.grad is not None
    assert student.grad is None


@pytest.mark.parametrize("feature_shape", [(6, 5), (6, 5, 3, 4)])
def test_module(backend, feature_shape):
    torch.manual_seed(0)
    criterion = USKDLoss(5, 12, mu=0.5, ce_weight=1.0, backend=backend).double()
    student, _, target = make()
    feature = torch.randn(feature_shape, dtype=torch.float64, requires_grad=True)
    loss, parts = criterion(student, feature, target, return_parts=True)
    loss.backward()
    pooled = feature.mean((2, 3)) if feature.dim() == 4 else feature
    expected = uskd_loss(student, criterion.weak_classifier(pooled), target, mu=0.5, ce_weight=1.0, backend=backend)
    torch.testing.assert_close(loss, expected)
    assert feature.grad.abs().sum() > 0
    assert criterion.weak_classifier.weight.grad.abs().sum() > 0
    assert parts._fields == ("target", "non_target", "weak", "ce")
    assert set(criterion.state_dict()) == {"weak_classifier.weight", "weak_classifier.bias"}
    assert "rank='normalized'" in repr(criterion)


def test_forward_hook_on_a_network():
    """As in the README: the feature of an inner stage reaches the criterion, and its gradient the network below."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 12)
    )
    feature = {}
    model[0].register_forward_hook(lambda module, inputs, output: feature.update(weak=output))
    criterion = USKDLoss(in_features=8, num_classes=12, alpha=0.0, beta=0.0, mu=1.0)
    target = torch.randint(12, (4,))
    criterion(model(torch.randn(4, 3, 8, 8)), feature["weak"], target).backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert not model[1].weight.grad.any()  # only the weak term is on, and it enters below


REFUSALS = [
    ({"rank": "zipf"}, ValueError, "rank: expected one of 'normalized'.* got 'zipf'"),
    ({"square": 2}, TypeError, "square: expected"),
    ({"alpha": -1.0}, ValueError, "alpha: expected a finite number of at least 0, got -1.0"),
    ({"process_group": object()}, (ValueError, TypeError), "process_group: expected"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSALS)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        uskd_loss(*make(), **options)


def test_refusals_of_shapes_and_features():
    student, weak, target = make()
    with pytest.raises(
        ValueError, match=r"weak_logits: expected the shape of student_logits, \(6, 12\), got \(6, 11\)"
    ):
        uskd_loss(student, weak[:, :11], target)
    with pytest.raises(IndexError, match=r"target: expected class indices from 0 to 11, .* got 12"):
        uskd_loss(student, weak, torch.full_like(target, 12))
    criterion = USKDLoss(5, 12)
    for shape in ((6, 4), (6, 5, 3), (5, 5)):
        with pytest.raises(ValueError, match=r"feature: expected shape \(6, 5\) or \(6, 5, H, W\), of in_features=5"):
            criterion(student.float(), torch.randn(shape), target)
    with pytest.raises(ValueError, match=r"student_logits: expected shape \(N, 12\)"):
        criterion(student[:, :4].float(), torch.randn(6, 5), target)


def test_arguments_in_another_order():
    student, _, target = make(dtype=torch.float32)
    criterion = USKDLoss(5, 12)
    logits = r"feature: expected width in_features=5, got shape \(6, 12\), which fits logits of .*; the order is"
    for feature in (torch.randn(6, 5), torch.randn(6, 5, 3, 4)):
        for given in ((feature, student, target), (student, student, target), (target, student, feature)):
            with pytest.raises(ValueError, match=logits):
                criterion(*given)
        for given in ((student, target, feature), (feature, target, student)):
            with pytest.raises(
                TypeError, match=r"feature: expected a floating-point Tensor, got torch\.int64; the order"
            ):
                criterion(*given)


def _group_worker(rank, store, backend, queue):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    student, weak, target = make(8, 20)
    target[5] = -100
    part = slice(0, 3) if rank == 0 else slice(3, 8)
    options = {"process_group": dist.group.WORLD, "reduction": "sum", "ce_weight": 1.0}
    loss, _, *gradients = run(backend, student[part], weak[part], target[part], **options)
    queue.put((rank, loss.item(), [gradient.numpy() for gradient in gradients]))
    dist.destroy_process_group()
    worlds.leave()


def test_batch_mean_over_two_processes(backend):
    if backend == "triton":
        pytest.skip("the interpreter in two more processes proves nothing that native does not")
    with tempfile.TemporaryDirectory() as folder:
        queue = mp.get_context("spawn").SimpleQueue()
        workers = mp.spawn(_group_worker, (os.path.join(folder, "store"), backend, queue), nprocs=2, join=False)
        results = sorted(queue.get() for _ in range(2))
        workers.join()
    student, weak, target = make(8, 20)
    target[5] = -100
    loss, _, *gradients = run(backend, student, weak, target, reduction="sum", ce_weight=1.0)
    assert results[0][1] + results[1][1] == pytest.approx(loss.item(), rel=1e-12)
    for index, gradient in enumerate(gradients):
        together = torch.cat([torch.from_numpy(result[2][index]) for result in results])
        torch.testing.assert_close(together, gradient, rtol=1e-12, atol=1e-14)
