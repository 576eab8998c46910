"""The loss as a citizen of PyTorch: gradcheck, opcheck, compile, autocast, checkpointing, DDP, double backward."""

import gc
import os
import tempfile

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.multiprocessing as mp
import worlds
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fused_kd
from fused_kd import NKDLoss, nkd_loss
from fused_kd.core.options import HyperParameters


def inputs(device="cpu", rows=6, classes=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(rows, classes, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    teacher = torch.randn(rows, classes, generator=generator, dtype=torch.float64).to(device, dtype)
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    target[2] = -100
    return student, teacher, target


@pytest.mark.parametrize("soft", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("temperature", (1.0, 3.0))
def test_gradcheck(backend, temperature, reduction, soft):
    name, device = backend
    student, teacher, target = inputs(device, rows=4)
    if soft:
        target = torch.rand(4, 11, device=device, dtype=torch.float64).softmax(1)
    assert torch.autograd.gradcheck(
        lambda s: nkd_loss(
            s, teacher, target, temperature=temperature, gamma=2.0, ce_weight=0.7, reduction=reduction, backend=name
        ),
        student,
        fast_mode=(name, device) == ("triton", "cpu"),  # the interpreter takes its time
    )


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16), ids=str)
def test_opcheck(fused, dtype, reduction):
    name, device = fused
    student, teacher, target = inputs(device, dtype=dtype)
    hyper = list(HyperParameters(gamma=1.5, temperature=2.0, ce_weight=1.0))
    for need_gradient in (True, False):
        arguments = (
            student.detach(),
            teacher,
            target,
            None,
            "nkd",
            hyper,
            False,
            None,
            -100,
            reduction,
            need_gradient,
            name,
        )
        opcheck(torch.ops.fused_kd.row_loss.default, arguments)
    shape = (6,) if reduction == "none" else ()
    gradient = torch.randn(6, 11, device=device).to(dtype)
    norm = torch.tensor(0.25, dtype=torch.promote_types(dtype, torch.float32), device=device)
    scale = (gradient, torch.full(shape, 3.0, dtype=norm.dtype, device=device), norm, name)
    opcheck(torch.ops.fused_kd.scale_gradient.default, scale)
    opcheck(torch.ops.fused_kd.scale_gradient_compiled.default, scale)
    opcheck(torch.ops.fused_kd.scale_gradient_.default, scale)


def test_fullgraph(backend):
    name, device = backend
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    options = {"gamma": 0.5, "temperature": 4.0, "ce_weight": 1.0, "backend": name, "return_parts": True}

    @torch.compile(fullgraph=True, backend=graphs)
    def step(student, teacher, target):
        loss, parts = nkd_loss(student * 2.0, teacher, target, **options)
        return loss * 3.0, parts.non_target

    for _ in range(2):
        student, teacher, target = inputs(device, dtype=torch.float32)
        loss, part = step(student, teacher, target)
        loss.backward()
        compiled, student.grad = student.grad, None
        expected, parts = nkd_loss(student * 2.0, teacher, target, **options)
        (expected * 3.0).backward()
        torch.testing.assert_close(loss, expected * 3.0)
        torch.testing.assert_close(part, parts.non_target)
        torch.testing.assert_close(compiled, student.grad)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_inductor(native, reduction):
    torch._dynamo.reset()
    student, teacher, target = inputs(dtype=torch.float32)
    criterion = NKDLoss(reduction=reduction, ce_weight=1.0)
    torch.compile(criterion, fullgraph=True)(student, teacher, target).sum().backward()
    compiled, student.grad = student.grad, None
    criterion(student, teacher, target).sum().backward()
    torch.testing.assert_close(compiled, student.grad)


def test_second_backward_gives_the_same_gradient(fused):
    """The stored gradient is scaled in place only when nothing can ask for it again."""
    name, device = fused
    for dtype in (torch.float32, torch.float16):
        student, teacher, target = inputs(device, dtype=dtype)
        loss = nkd_loss(student, teacher, target, backend=name) * 4.0
        first = torch.autograd.grad(loss, student, retain_graph=True)[0].clone()
        second = torch.autograd.grad(loss, student, retain_graph=True)[0].clone()
        third = torch.autograd.grad(loss, student)[0]
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def test_retained_gradient_is_not_shared(fused):
    name, device = fused
    student, teacher, target = inputs(device)
    loss = nkd_loss(student, teacher, target, backend=name)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    kept = first.clone()
    first.zero_()  # what a gradient hook may do
    assert torch.equal(torch.autograd.grad(loss, student)[0], kept)


def test_double_backward_is_refused(fused):
    name, device = fused
    student, teacher, target = inputs(device)
    with pytest.raises(RuntimeError, match="do not support double backward"):
        torch.autograd.grad(nkd_loss(student, teacher, target, backend=name), student, create_graph=True)


def test_reference_supports_double_backward():
    student, teacher, target = inputs(rows=3, classes=5)
    target = target % 5
    assert torch.autograd.gradgradcheck(lambda s: nkd_loss(s, teacher, target, backend="reference"), student)


def test_torch_func_is_refused_with_advice(fused):
    name, device = fused
    student, teacher, target = inputs(device)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.func.grad(lambda s: nkd_loss(s, teacher, target, backend=name))(student.detach())
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.func.vmap(lambda s: nkd_loss(s, teacher, target, backend=name))(student.detach().unsqueeze(0))
    by_func = torch.func.grad(lambda s: nkd_loss(s, teacher, target, backend="reference"))(student.detach())
    nkd_loss(student, teacher, target, backend=name).backward()
    torch.testing.assert_close(by_func, student.grad)


def test_saves_one_tensor_of_the_students_size(fused):
    name, device = fused
    student, teacher, target = inputs(device, dtype=torch.float32, rows=32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        loss = nkd_loss(student, teacher, target, backend=name)
    assert sum(sizes) <= student.numel() * student.element_size() + 8
    loss.backward()
    sizes.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(sizes.append, lambda t: t):
        nkd_loss(student, teacher, target, backend=name)
    assert not sizes


def test_activation_checkpointing(fused):
    name, device = fused
    student, teacher, target = inputs(device)
    checkpoint(lambda s: nkd_loss(s * 2, teacher, target, backend=name), student, use_reentrant=False).backward()
    checkpointed, student.grad = student.grad, None
    nkd_loss(student * 2, teacher, target, backend=name).backward()
    torch.testing.assert_close(checkpointed, student.grad)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_autocast_with_grad_scaler(fused, dtype):
    name, device = fused
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 40, device=device)
    data, teacher = torch.randn(8, 16, device=device), torch.randn(8, 40, device=device)
    target = torch.randint(40, (8,), device=device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    gradients = []
    for which in (name, "reference"):
        layer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            logits = layer(data)
            assert logits.dtype == dtype
            loss = nkd_loss(logits, teacher, target, backend=which)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        gradients.append(layer.weight.grad.clone())
    assert gradients[0].isfinite().all()
    # The weight's gradient is a sum over rows in half precision, each term with a rounding of its own.
    largest = gradients[1].abs().max().item()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.0, atol=2 * torch.finfo(dtype).eps * largest)


def test_float16_gradients_do_not_underflow(fused):
    """Divided by N and stored in float16, a probability of 1e-6 would be 0 before GradScaler multiplies."""
    name, device = fused
    student = torch.zeros(64, 100, device=device, dtype=torch.float16)
    student[:, 1:50] = -14.0
    teacher, target = student.clone(), torch.zeros(64, dtype=torch.int64, device=device)
    results = []
    for which in (name, "reference"):
        leaf = student.clone().requires_grad_()
        (nkd_loss(leaf, teacher, target, gamma=0.0, backend=which) * 2.0**16).backward()
        results.append(leaf.grad)
    assert (results[0][:, 1:50] != 0).all()
    torch.testing.assert_close(results[0], results[1], rtol=2e-3, atol=6e-8)  # a step of float16's smallest numbers


def test_module_matches_function_and_shows_its_arguments(backend):
    name, device = backend
    student, teacher, target = inputs(device)
    criterion = NKDLoss(gamma=2.0, temperature=3.0, ce_weight=0.5, ignore_index=4, reduction="sum", backend=name)
    expected = nkd_loss(
        student, teacher, target.clamp(min=0), gamma=2.0, temperature=3.0, ce_weight=0.5, ignore_index=4,
        reduction="sum", backend=name,
    )  # fmt: skip
    assert torch.equal(criterion(student, teacher, target.clamp(min=0)), expected)
    assert "gamma=2.0, temperature=3.0, ce_weight=0.5, label_smoothing=0.0" in repr(criterion)
    assert not criterion.state_dict()


def _ddp_worker(rank, port_file, queue):
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 20))
    data, teacher, target = _ddp_data()
    half = slice(4 * rank, 4 * rank + 4)
    fused_kd.nkd_loss(model(data[half]), teacher[half], target[half], ce_weight=1.0).backward()
    queue.put(model.module.weight.grad.numpy())
    # Before the group: its last owner would wait, with Python's lock, for a thread that wants it.
    del model
    gc.collect()
    dist.destroy_process_group()
    worlds.leave()


def _ddp_data():
    generator = torch.Generator().manual_seed(1)
    data, teacher = torch.randn(8, 8, generator=generator), torch.randn(8, 20, generator=generator)
    return data, teacher, torch.randint(20, (8,), generator=generator)


def test_two_processes_equal_one(native):
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        queue = context.SimpleQueue()
        workers = mp.spawn(_ddp_worker, (os.path.join(folder, "store"), queue), nprocs=2, join=False)
        gradients = [torch.from_numpy(queue.get()) for _ in range(2)]
        workers.join()
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 20)
    data, teacher, target = _ddp_data()
    fused_kd.nkd_loss(model(data), teacher, target, ce_weight=1.0).backward()
    for gradient in gradients:
        torch.testing.assert_close(gradient, model.weight.grad)
