"""What a loss keeps from its forward pass to the backward one: a tensor for each gradient and no more, whichever loss,
reduction, weights, backend and dtype; and what happens where it keeps its inputs instead."""

import gc

import pytest
import torch
import torch._dynamo.testing
from derivative_cases import FUSED, ids
from loss_cases import INF, function, make, mixed, run
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile

import fused_kd
from fused_kd import backends
from fused_kd.core.options import HyperParameters

ROWS, CLASSES = 4, 600
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DIST = [place for place in FUSED if place[0] == "dist"]
everywhere = pytest.mark.parametrize("place", FUSED, ids=ids(FUSED))
dist = pytest.mark.parametrize("place", DIST, ids=ids(DIST))


def requested():
    """Bytes asked of CUDA's allocator, which rounds each request up."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def held(call, device):
    """Bytes that a call has allocated and that are there as long as its result."""
    call()
    gc.collect(1)  # Triton's interpreter leaves circles behind
    if device == "cuda":
        before = requested()
        result = call()
        return requested() - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = call()
        gc.collect(1)
    return sum(event.self_cpu_memory_usage for event in found.key_averages()), result


def problem(place, dtype=torch.float32, rows=ROWS):
    """The logits that have a gradient, and the loss as a function of them and of options."""
    loss, name, device = place
    student, others, target = make(loss, rows, CLASSES, dtype, device)
    target[1] = -100
    leaves = [student, *(others if loss == "uskd" else ())]
    fixed = () if loss == "uskd" else tuple(others)

    def call(*leaves, **options):
        return function(loss)(*leaves, *fixed, target, backend=name, **options)

    return [leaf.requires_grad_() for leaf in leaves], call


def tensors_kept(place, call, leaves):
    """In tensors of the logits' size, rounded to one decimal: statistics are a thousandth of it."""
    size, _ = held(call, place[2])
    return round(size / leaves[0].nbytes, 1)


@everywhere
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("weighted", (False, True), ids=("", "weighted"))
def test_a_tensor_for_each_gradient(place, reduction, weighted):
    leaves, call = problem(place)
    options = {"weight": torch.rand(ROWS, device=place[2])} if weighted else {}
    found = tensors_kept(place, lambda: call(*leaves, reduction=reduction, **options), leaves)
    # Of DIST's rows one by one the inputs are kept.
    assert found == (0 if (place[0], reduction) == ("dist", "none") else len(leaves))


@everywhere
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_of_the_logits_dtype(place, dtype):
    """What float16 is computed in is gone when the loss is there."""
    if place[1:] == ("triton", "cpu") and place[0] not in ("kd", "dist"):
        pytest.skip("seconds in the interpreter")
    leaves, call = problem(place, dtype)
    for options in ({}, {"weight": torch.rand(ROWS, device=place[2])}):
        assert tensors_kept(place, lambda options=options: call(*leaves, **options), leaves) == len(leaves)


@pytest.mark.parametrize("place", [place for place in FUSED if place[0] in ("nkd", "dist")], ids="-".join)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_of_logits_that_are_copied_to_be_rows(place, reduction):
    loss, name, device = place
    student, teacher = 2 * torch.randn(2, 2, 400, 2, 1, device=device)
    target = torch.randint(400, (2, 2, 1), device=device)
    student.requires_grad_()
    options = {"class_dim": 1, "reduction": reduction, "backend": name}
    for weight in (None, torch.rand(2, 2, 1, device=device)):
        found = tensors_kept(
            place, lambda weight=weight: function(loss)(student, teacher, target, weight=weight, **options), [student]
        )
        assert found == (0 if (loss, reduction) == ("dist", "none") else 1)


@pytest.mark.parametrize("place", [place for place in FUSED if place[1] == "native"], ids="-".join)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("how", ("aot_eager", "inductor", "export"))
def test_in_a_recorded_graph(place, reduction, how):
    loss, _, device = place
    if how == "inductor" and (loss != "dist" or device != "cpu"):
        pytest.skip("as aot_eager, and slow")
    leaves, call = problem(place)
    weight = torch.rand(ROWS, device=device)

    class Loss(torch.nn.Module):
        def forward(self, *leaves):
            return call(*leaves, weight=weight, reduction=reduction)

    torch._dynamo.reset()
    graph = (
        torch.export.export(Loss(), tuple(leaves)).module()
        if how == "export"
        else torch.compile(Loss(), backend=how, fullgraph=True)
    )
    assert tensors_kept(place, lambda: graph(*leaves), leaves) == (
        0 if (loss, reduction) == ("dist", "none") else len(leaves)
    )
    incoming = torch.randn(graph(*leaves).shape, device=device)
    ours = torch.autograd.grad(graph(*leaves), leaves, incoming)
    theirs = torch.autograd.grad(call(*leaves, weight=weight, reduction=reduction), leaves, incoming)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    torch._dynamo.reset()


@dist
@pytest.mark.parametrize("soft", (False, True), ids=("", "soft"))
def test_inputs_that_are_kept_must_not_change(place, soft):
    _, name, device = place
    for changed in range(4):
        student, (teacher,), target = make("dist", device=device)
        inputs = [student, teacher, mixed(device=device) if soft else target, torch.rand(6, device=device)]
        student = student.requires_grad_() * 1.0  # a leaf cannot be changed
        loss = fused_kd.dist_loss(student, *inputs[1:3], weight=inputs[3], reduction="none", backend=name)
        with torch.no_grad():
            (student, *inputs[1:])[changed].add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()
    # Where the gradient is stored nobody looks at them again.
    student, (teacher,), target = make("dist", device=device)
    options = {"weight": torch.rand(6, device=device), "backend": name}
    leaf = student.requires_grad_()
    expected = torch.autograd.grad(fused_kd.dist_loss(leaf, teacher, target, **options), leaf)
    loss = fused_kd.dist_loss(leaf, teacher, target, **options)
    with torch.no_grad():
        teacher.zero_()
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected[0])


@dist
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft", (False, True), ids=("", "soft"))
def test_rows_of_dist_one_by_one(place, dtype, soft):
    """Whatever comes in for a row, below 0 and 0 too, against the reference's in float64."""
    _, name, device = place
    student, (teacher,), target = make("dist", dtype=dtype, device=device)
    target[5] = -100
    target = mixed(device=device) if soft else target
    incoming = torch.tensor([1.0, -2.0, 0.0, 300.0, 0.5, 7.0], device=device)
    weight = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0, 0.25], device=device)
    unit = max(torch.finfo(dtype).eps, 1e-14 if dtype == torch.float64 else 1e-6)
    for options in ({}, {"weight": weight}, {"weight": weight, "ce_weight": 0.7, "logit_standardization": True}):
        found = []
        for backend, accurate in ((name, dtype), ("reference", torch.float64)):
            leaf = student.detach().to(accurate).requires_grad_()
            loss = fused_kd.dist_loss(
                leaf, teacher.to(accurate), target, reduction="none", backend=backend, temperature=2.0, **options
            )
            found.append((loss, *torch.autograd.grad(loss, leaf, incoming.to(loss.dtype))))
        (loss, gradient), (exact, exact_gradient) = found
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
        assert ((gradient.double() - exact_gradient).abs() <= 2 * unit * exact_gradient.abs().max()).all()
        assert gradient.dtype == dtype
        assert not gradient[3].any() or not options
        assert soft or not gradient[5].any()


@dist
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_one_call_of_the_kernel(place, reduction, monkeypatch):
    """Though the rows are multiplied by other numbers than the columns."""
    kernels, calls = backends.get(place[1]), []
    row_loss = kernels.row_loss
    monkeypatch.setattr(kernels, "row_loss", lambda *given: calls.append(given) or row_loss(*given))
    leaves, call = problem(place)
    loss = call(*leaves, weight=torch.rand(ROWS, device=place[2]), reduction=reduction)
    assert len(calls) == 1
    loss.sum().backward()
    assert len(calls) == (2 if reduction == "none" else 1)


@dist
def test_rows_of_weight_0_and_what_comes_in_for_them(place):
    _, name, device = place
    student, (teacher,), target = make("dist", device=device)
    student[2], teacher[4] = INF, float("nan")
    weight = torch.tensor([1.0, 1, 0, 1, 0, 1], device=device)
    incoming = torch.tensor([1.0, 2, INF, 3, float("nan"), 4], device=device, dtype=torch.float64)
    kept = weight != 0
    found = []
    for backend, there in ((name, slice(None)), (name, kept), ("reference", kept)):
        leaf = student[there].clone().requires_grad_()
        loss = fused_kd.dist_loss(
            leaf, teacher[there], target[there], weight=weight[there], reduction="none", backend=backend
        )
        found.append((loss, torch.autograd.grad(loss, leaf, incoming[there])[0]))
    for whole, part, exact in zip(*found, strict=True):
        assert not whole[~kept].any()
        torch.testing.assert_close(whole[kept], part, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(part, exact, rtol=1e-10, atol=1e-12)


@dist
def test_nothing_counts(place):
    _, name, device = place
    student, others, target = make("dist", device=device)
    for rows, options in (
        (6, {"weight": torch.zeros(6, device=device)}),
        (0, {"weight": torch.zeros(0, device=device)}),
        (0, {}),
    ):
        for reduction in ("mean", "sum", "none"):
            given = student[:rows], [other[:rows] for other in others], target[:rows]
            assert not any(x.any() for x in run("dist", name, *given, reduction=reduction, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(native, dtype):
    student, (teacher,), target = make("dist", dtype=dtype)
    accumulate = torch.promote_types(dtype, torch.float32)
    numbers = list(HyperParameters(beta=1.0, gamma=0.5, temperature=2.0, ce_weight=0.7, label_smoothing=0.1))
    for weight in (None, torch.arange(6.0)):
        given = (student, teacher, target, weight)
        after = (-100, torch.rand(6, dtype=accumulate), torch.tensor(0.5, dtype=accumulate), "native")
        padded = (student, teacher[:, :8], target.clamp(max=7), weight, numbers, False, 8, *after)
        opcheck(torch.ops.fused_kd.dist_gradient.default, padded)
        after = (False, None, *after)
        opcheck(torch.ops.fused_kd.dist_gradient.default, (*given, numbers, *after))
        scheduled = torch.tensor(numbers, dtype=torch.float64)
        opcheck(torch.ops.fused_kd.dist_gradient_scheduled.default, (*given, scheduled, *after))


@pytest.mark.parametrize("name", ("beta", "gamma", "temperature", "ce_weight"))
def test_a_schedule_in_a_compiled_graph(native, name):
    student, (teacher,), target = make("dist")
    weight = torch.rand(6)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def rows(leaf, value):
        return fused_kd.dist_loss(leaf, teacher, target, weight=weight, reduction="none", **{name: value})

    compiled = torch.compile(rows, backend=counter, fullgraph=True)
    leaf = student.requires_grad_()
    for value in (0.5, 2.0, 1.0, 1.5, 3.0, 0.25):
        ours, theirs = (
            torch.autograd.grad(each(leaf, value), leaf, torch.arange(1.0, 7.0).double())[0]
            for each in (compiled, rows)
        )
        torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 2
    torch._dynamo.reset()
