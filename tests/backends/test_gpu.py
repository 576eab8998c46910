"""Tests that need a GPU: graphs, streams, no synchronization, sizes beyond 2^31, other devices. They cover every loss
with a kernel there, on every backend that runs it."""

import pytest
import torch

import fused_kd
from fused_kd import check
from fused_kd.core.catalogue import LOSSES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
DEVICE = "cuda"
PLACES = [(loss, name) for loss in LOSSES for name in check.runnable(DEVICE, loss)]
every_place = pytest.mark.parametrize("place", PLACES, ids="-".join)
#: The rows of a batch are coupled, so a row without a value takes others with it.
COUPLED = ("uskd", "dist")
#: What leaves each row to itself there.
UNCOUPLED = {"uskd": {"alpha": 0.0}, "dist": {"gamma": 0.0}}


def make(loss, rows=64, classes=1000, dtype=torch.float32, seed=0, device=DEVICE):
    """Student logits, other logits and a target with one ignored row; rounding cannot change a rank."""
    return check.Case(dtype, rows, classes, {}, spread=2.0, seed=seed, loss=loss).inputs(device)


def step(place, tensors, grad_output=None, **options):
    """One forward and backward pass: the loss and the gradients."""
    return check.evaluate(place[1], *tensors, options, grad_output, place[0])


def call(place, student, other, target, **options):
    others = [] if place[0] == "tf_kd" else [other]
    return getattr(fused_kd, LOSSES[place[0]].function)(student, *others, target, backend=place[1], **options)


def close(ours, wanted, tolerance=1e-4):
    for a, b in zip(ours, wanted, strict=True):
        assert check.relative_error(a, b) <= tolerance


def reference(place):
    return place[0], "reference"


@every_place
@pytest.mark.parametrize("classes", (1000, 21841))
def test_graph_capture_and_replay(place, classes):
    """Capture forward and backward once, and replay them on new values in the same tensors."""
    tensors = make(place[0], classes=classes)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and gets memory, which a capture cannot do
        for _ in range(3):
            step(place, tensors, ce_weight=1.0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(place, tensors, ce_weight=1.0)
    for seed in (1, 2):
        for tensor, contents in zip(tensors, make(place[0], classes=classes, seed=seed), strict=True):
            tensor.copy_(contents)
        graph.replay()
        close(captured, step(reference(place), tensors, ce_weight=1.0))


@every_place
def test_a_training_step_never_waits(place):
    """Forward, backward and optimizer, in autocast, with PyTorch's synchronization errors on."""
    torch.manual_seed(0)
    features = torch.randn(64, 32, device=DEVICE)
    model, weak = (torch.nn.Linear(32, 1000, device=DEVICE) for _ in range(2))
    _, other, target = make(place[0])
    optimizer = torch.optim.SGD([*model.parameters(), *weak.parameters()], lr=0.1, momentum=0.9)

    def train(reduction):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            logits, weak_logits = model(features), weak(features)
            others = weak_logits if place[0] == "uskd" else other
            value = call(place, logits, others, target, ce_weight=1.0, reduction=reduction)
        value.sum().backward()
        optimizer.step()

    reductions = ("mean", "none")
    for reduction in reductions:
        train(reduction)  # compiles
    before = model.weight.detach().clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            before.sum().item()
        for reduction in reductions * 2:
            train(reduction)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(before, model.weight)


@every_place
def test_autocast_with_grad_scaler(place):
    """The gradient of float16 logits, scaled so that nothing underflows, against float64 on the same logits."""
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 100, device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    features = torch.randn(16, 32, device=DEVICE)
    _, other, target = make(place[0], 16, 100)
    before = model.weight.detach().clone()
    with torch.autocast(DEVICE, dtype=torch.float16):
        logits = model(features)
        assert logits.dtype == torch.float16
        logits.retain_grad()
        if place[0] == "uskd":
            other = logits.detach() / 2
        value = call(place, logits, other, target, ce_weight=1.0)
    assert value.dtype == torch.float32
    scaler.scale(value).backward()
    ours = logits.grad.double() / scaler.get_scale()
    exact = step(reference(place), (logits.detach().double(), other.double(), target), ce_weight=1.0)
    close((value.detach(), ours), exact[:2], 2.0**-9)  # rounded to float16 when stored and when scaled
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10, "an infinity was found"
    assert not torch.equal(before, model.weight)


@every_place
@pytest.mark.parametrize("classes", (1000, 21841))
def test_targets_out_of_range_are_nan_rows(place, classes):
    student, other, target = make(place[0], rows=8, classes=classes)
    target[2], target[5] = classes, -7
    ones = torch.ones(8, device=DEVICE)
    value, *gradients = step(place, (student, other, target), ones, reduction="none", ce_weight=1.0)
    torch.cuda.synchronize()  # where an access out of bounds would show
    bad = torch.tensor([2, 5], device=DEVICE)
    assert value[bad].isnan().all()
    assert gradients[0][bad].isnan().all()
    if place[0] not in COUPLED:
        rest = torch.tensor([0, 1, 3, 4, 6, 7], device=DEVICE)
        assert value[rest].isfinite().all()
        assert gradients[0][rest].isfinite().all()


@every_place
def test_two_streams(place):
    inputs = [make(place[0], rows=512, seed=seed) for seed in (0, 1)]
    wanted = [step(place, each) for each in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(5):
        found = []
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(place, each))
        torch.cuda.synchronize()
        for ours, exact in zip(found, wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


@every_place
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
@pytest.mark.parametrize("current, index", ((0, 1), (1, 0), (1, 1)))
def test_another_device(place, current, index):
    """Tensors on one device while another is current, and on a current device that is not the first."""
    tensors = make(place[0], device=f"cuda:{index}")
    with torch.cuda.device(current):
        found = step(place, tensors)
        assert torch.cuda.current_device() == current
        assert all(tensor.device == torch.device("cuda", index) for tensor in found)
        close(found, step(reference(place), tensors))


@every_place
def test_the_same_bits_twice(place):
    tensors = make(place[0], rows=300, classes=21841, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(step(place, tensors), step(place, tensors), strict=True))


@every_place
def test_more_than_two_to_the_31_elements(place):
    """Offsets are 64-bit: the last rows equal a small matrix. Runs twice, so that the gradient is also scaled."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    loss, (rows, classes) = place[0], (16800, 128256)
    assert rows * classes > 2**31
    generator = torch.Generator(DEVICE).manual_seed(0)
    student = torch.empty(rows, classes, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator)
    target = torch.randint(classes, (rows,), device=DEVICE, generator=generator)
    other = student.unsqueeze(1) if loss == "zipf_ls" else student.clone() if loss == "uskd" else student
    two, options = torch.tensor(2.0, device=DEVICE), {"reduction": "sum", **UNCOUPLED.get(loss, {})}
    _, *gradients = step(place, (student, other, target), two, **options)
    _, *tails = step(place, (student[-3:], other[-3:], target[-3:]), two, **options)
    for gradient, tail in zip(gradients, tails, strict=True):
        assert torch.equal(gradient[-3:], tail)


@every_place
def test_reduce_overhead(place):
    """One graph without breaks, captured and replayed by the compiler."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()

    @torch.compile(fullgraph=True, mode="reduce-overhead")
    def compiled(student, other, target):
        return call(place, student, other, target, ce_weight=1.0)

    for seed in range(4):  # warms up, captures, and replays on other tensors
        student, other, target = make(place[0], seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        leaves = [student.requires_grad_(), *([other.requires_grad_()] if place[0] == "uskd" else [])]
        value = compiled(student, other, target)
        value.backward()
        ours = (value.detach(), *(leaf.grad for leaf in leaves))
        close(ours, step(reference(place), (student, other, target), ce_weight=1.0))
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch._dynamo.reset()


@every_place
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("classes", (100, 1000, 1001, 2048, 4096, 8192, 21841, 128256))
def test_every_regime(place, dtype, classes):
    """Each layout of the dispatch table, within the budget of fused_kd/check.py."""
    options = {"ce_weight": 1.0}
    for case in (
        check.Case(dtype, 7, classes, options, loss=place[0]),
        check.Case(dtype, 7, classes, {**options, "label_smoothing": 0.1}, soft=True, loss=place[0]),
    ):
        outcome = check.compare(place[1], case, DEVICE)
        assert outcome.passed, (case, outcome)


@every_place
@pytest.mark.parametrize("rows, classes", ((8192, 1000), (1024, 8000)))
def test_peak_memory(place, rows, classes):
    """Beyond inputs and gradients, at most a hundredth of N x C x 4 bytes."""
    loss, name = place
    if loss in ("dist", "zipf_ls"):
        pytest.skip("moments of chunks of columns, or votes, which are more beside so few classes")
    if loss == "uskd" and name == "triton" and classes > 4096:
        pytest.skip("ranked by PyTorch's sort, which needs its room")
    tensors = make(loss, rows=rows, classes=classes, dtype=torch.bfloat16)
    step(place, tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, *gradients = step(place, tensors)
    beyond = torch.cuda.max_memory_allocated() - before - sum(gradient.nbytes for gradient in gradients)
    assert beyond <= 0.01 * rows * classes * 4


@every_place
def test_calls_like_an_earlier_one(place):
    """They skip the checks (fused_kd/repeated.py), in other streams and after another kind of call too."""
    for seed in range(4):
        tensors = make(place[0], seed=seed)
        close(step(place, tensors, ce_weight=1.0), step(reference(place), tensors, ce_weight=1.0))
        step(place, make(place[0], rows=5, seed=seed), ce_weight=1.0)
    stream = torch.cuda.Stream()
    tensors = make(place[0], seed=4)
    wanted = step(place, tensors, ce_weight=1.0)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = step(place, tensors, ce_weight=1.0)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))
    with pytest.raises(ValueError, match="target"):
        call(place, *tensors[:2], tensors[2][1:], ce_weight=1.0)
