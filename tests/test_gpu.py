"""What only a GPU can show: graphs, streams, no synchronisation, sizes beyond 2^31, other devices."""

import pytest
import torch

import fused_kd
from fused_kd import check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
NKD = check.runnable("cuda", "nkd")
USKD = check.runnable("cuda", "uskd")
PLACES = [*(("nkd", name) for name in NKD), *(("uskd", name) for name in USKD)]
every_place = pytest.mark.parametrize("place", PLACES, ids="-".join)


def make(rows=64, classes=1000, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    student, other = (2 * torch.randn(2, rows, classes, device="cuda", generator=generator)).to(dtype)
    return student.contiguous(), other.contiguous(), torch.randint(classes, (rows,), device="cuda", generator=generator)


def step(place, student, other, target, **options):
    """One forward and backward pass; the loss and the student's gradient."""
    loss, name = place
    student = student.detach().requires_grad_()
    if loss == "uskd":
        other = other.detach().requires_grad_()
    value = getattr(fused_kd, f"{loss}_loss")(student, other, target, backend=name, **options)
    value.sum().backward()
    return value.detach(), student.grad


def close(ours, wanted):
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@every_place
def test_graph_capture_and_replay(place):
    """Forward and backward captured once, replayed on other contents of the same tensors."""
    student, other, target = make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(place, student, other, target, ce_weight=1.0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(place, student, other, target, ce_weight=1.0)
    for seed in (1, 2):
        for tensor, contents in zip((student, other, target), make(seed=seed), strict=True):
            tensor.copy_(contents)
        graph.replay()
        close(captured, step((place[0], "reference"), student, other, target, ce_weight=1.0))


@every_place
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_nothing_synchronises(place, dtype):
    student, other, target = make(dtype=dtype)
    step(place, student, other, target, ce_weight=1.0)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for reduction in ("mean", "none"):
            step(place, student, other, target, ce_weight=1.0, reduction=reduction)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_place
def test_autocast_with_grad_scaler(place):
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 100, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
    data, target = torch.randn(16, 32, device="cuda"), torch.randint(100, (16,), device="cuda")
    other = torch.randn(16, 100, device="cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        logits = model(data)
        assert logits.dtype == torch.float16
        value = getattr(fused_kd, f"{place[0]}_loss")(logits, other, target, ce_weight=1.0, backend=place[1])
    before = model.weight.detach().clone()
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    ours = model.weight.grad.clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before, model.weight)
    with torch.no_grad():
        model.weight.copy_(before)
    model.zero_grad()
    exact = getattr(fused_kd, f"{place[0]}_loss")(
        torch.nn.functional.linear(data, before.requires_grad_(), model.bias.detach()), other, target, ce_weight=1.0,
        backend="reference",
    )  # fmt: skip
    (wanted,) = torch.autograd.grad(exact, before)
    torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=2e-3)


@every_place
def test_targets_out_of_range_are_nan_rows(place):
    student, other, target = make(rows=8)
    target[2], target[5] = 1000, -7
    value, gradient = step(place, student, other, target, reduction="none")
    torch.cuda.synchronize()
    bad = torch.tensor([2, 5], device="cuda")
    assert value[bad].isnan().all()
    assert gradient[bad].isnan().all()
    if place[0] == "nkd":  # USKD's batch mean takes them to the other rows
        assert value[[0, 1, 3, 4, 6, 7]].isfinite().all()


@every_place
def test_two_streams(place):
    inputs = [make(rows=512, seed=seed) for seed in (0, 1)]
    wanted = [step(place, *each) for each in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    found = []
    for _ in range(5):
        found = []
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(place, *each))
    torch.cuda.synchronize()
    for ours, exact in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


@every_place
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_another_device(place):
    student, other, target = (tensor.to("cuda:1") for tensor in make())
    value, gradient = step(place, student, other, target)
    assert value.device == gradient.device == torch.device("cuda:1")
    close((value, gradient), step((place[0], "reference"), student, other, target))


@every_place
def test_the_same_bits_twice(place):
    inputs = make(rows=300, classes=21841, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(step(place, *inputs), step(place, *inputs), strict=True))


@pytest.mark.parametrize("name", NKD)
def test_more_than_two_to_the_31_elements(name):
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs some 20 GB of GPU memory")
    rows, classes = 16800, 128256
    student = torch.empty(rows, classes, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    target = torch.randint(classes, (rows,), device="cuda")
    assert student.numel() > 2**31
    fused_kd.nkd_loss(student, student.detach(), target, reduction="sum", backend=name).backward()
    tail = student[-3:].detach().clone().requires_grad_()
    fused_kd.nkd_loss(tail, tail.detach(), target[-3:], reduction="sum", backend=name).backward()
    assert torch.equal(student.grad[-3:], tail.grad)


@every_place
def test_reduce_overhead(place):
    student, other, target = make()

    @torch.compile(fullgraph=True, mode="reduce-overhead")
    def compiled(s, o, y):
        return getattr(fused_kd, f"{place[0]}_loss")(s, o, y, ce_weight=1.0, backend=place[1])

    for seed in range(4):
        student, other, target = make(seed=seed)
        student.requires_grad_()
        value = compiled(student, other, target)
        value.backward()
        close((value.detach(), student.grad), step((place[0], "reference"), student, other, target, ce_weight=1.0))
    torch._dynamo.reset()
