"""Logits whose last columns are padding: losses and gradients of the first columns, and no copy of the gradient."""

import pytest
import torch
from loss_cases import FUSED, INF, function, has, make
from torch.profiler import ProfilerActivity, profile

import fused_kd
from benchmarks.measure.timing import ALLOCATION, trace_events
from fused_kd import Head, TopK
from fused_kd.core.catalogue import ROW_LOSSES

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROWS = [place for place in FUSED if place[0] in ROW_LOSSES]
rows = pytest.mark.parametrize("place", ROWS, ids="-".join)
native = pytest.mark.parametrize("loss", ROW_LOSSES)


def padded(logits, columns, value, dim=1):
    shape = [*logits.shape]
    shape[dim] = columns
    return torch.cat([logits, logits.new_full(shape, value)], dim)


def of(place, student, others, target, incoming=1.0, **options):
    """The loss and its gradient, which is the one of the logits as given."""
    loss, name, _ = place
    leaf = student.detach().requires_grad_()
    value = function(loss)(leaf, *others, target, backend=name, **options)
    (value * incoming).sum().backward()
    return value.detach(), leaf.grad


def assert_padded(found, wanted, classes, dim=1):
    """The same bits, NaN among them, and zeros in the padding."""
    assert torch.equal(found[0].nan_to_num(7.0), wanted[0].nan_to_num(7.0))
    ours, padding = found[1].split([classes, found[1].shape[dim] - classes], dim)
    assert torch.equal(ours.isnan(), wanted[1].isnan())
    assert torch.equal(ours.nan_to_num(7.0), wanted[1].nan_to_num(7.0))
    assert not padding.any()


@rows
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_the_classes_and_zeros(place, dtype):
    loss, _, device = place
    student, others, target = make(loss, classes=11, dtype=dtype, device=device)
    target[3] = -100
    wide, value = padded(student, 5, torch.nan), padded(student, 1, INF)
    other = [padded(each, 8, torch.nan) for each in others]
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 3.0], device=device)
    asked = [{"reduction": "mean"}, {"reduction": "sum", "weight": weight}, {"reduction": "none"}]
    asked += [{"logit_standardization": True}] if has(loss, "logit_standardization") else []
    for options, incoming in zip(asked, (1.0, 2.0, 0.5, 1.0), strict=False):
        wanted = of(place, student, others, target, incoming, **options)
        assert_padded(of(place, wide, other, target, incoming, num_classes=11, **options), wanted, 11)
        assert_padded(of(place, value, others, target, incoming, num_classes=11, **options), wanted, 11)


@rows
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_whatever_comes_in(place, reduction):
    loss, _, device = place
    student, others, target = make(loss, dtype=torch.float32, device=device)
    wide = padded(student, 4, torch.nan)
    for incoming in (2.0, 0.0, INF, -INF, torch.nan):
        wanted = of(place, student, others, target, incoming, reduction=reduction)
        found = of(place, wide, others, target, incoming, reduction=reduction, num_classes=9)
        assert_padded(found, wanted, 9)


@rows
def test_strides_and_dimensions(place):
    loss, _, device = place
    student, others, target = make(loss, rows=12, dtype=torch.float32, device=device)
    wide, other = padded(student, 4, torch.nan), [padded(each, 2, torch.nan) for each in others]
    wanted = of(place, student, others, target)
    turned, sparse = wide.mT.contiguous().mT, wide.repeat_interleave(3, 0)[::3]
    for given in (turned, sparse):
        found = of(place, given, other, target, num_classes=9)
        torch.testing.assert_close(found[1][:, :9], wanted[1])
        assert not found[1][:, 9:].any()
    for shape, dim in (((3, 4), -1), ((3, 2, 2), -1), ((3, 4), 1), ((2, 2, 3), 1)):
        given, *teachers = (each.reshape(*shape, -1).movedim(-1, dim).contiguous() for each in (wide, *other))
        found = of(place, given, teachers, target.reshape(shape), num_classes=9, class_dim=dim)
        rows = found[1].movedim(dim, -1).reshape(12, 13)
        assert_padded((found[0], rows), wanted, 9)


@rows
def test_probability_targets_and_no_rows(place):
    loss, _, device = place
    student, others, target = make(loss, dtype=torch.float32, device=device)
    labels = torch.rand(6, 9, device=device).softmax(1)
    wide = padded(student, 3, torch.nan)
    assert_padded(of(place, wide, others, labels, num_classes=9), of(place, student, others, labels), 9)
    _, gradient = of(place, wide[:0], [each[:0] for each in others], target[:0], num_classes=9)
    assert gradient.shape == (0, 12)


@rows
@pytest.mark.parametrize("classes", (5003, 9000), ids=str)
def test_long_rows(place, classes):
    """Where Triton's walk starts depends on the width."""
    loss, name, device = place
    if name == "triton" and loss not in ("nkd", "js", "dist"):
        pytest.skip("the same walk")
    student, others, target = make(loss, rows=3, classes=classes, dtype=torch.float32, device=device)
    target[1] = -100
    wanted = of((loss, "reference", device), student, others, target)
    for columns in (5, 8):
        wide, other = padded(student, columns, torch.nan), [padded(each, columns + 8, torch.nan) for each in others]
        value, gradient = of(place, wide, other, target, num_classes=classes)
        torch.testing.assert_close(value, wanted[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient[:, :classes], wanted[1], rtol=1e-3, atol=1e-7)
        assert not gradient[:, classes:].any()


def allocations(bytes_of, run):
    """The number of PyTorch's allocations of so many bytes or more."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    return sum(event["args"]["Bytes"] >= bytes_of for event in trace_events(prof, ALLOCATION))


@native
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_nothing_but_the_gradient_is_of_its_size(loss, dtype):
    student, others, target = make(loss, rows=16, classes=1000, dtype=dtype)
    size = student.numel() * student.element_size()
    wide = padded(student, 24, torch.nan).requires_grad_()
    weight = torch.ones(16)

    def step(**options):
        wide.grad = None
        function(loss)(wide, *others, target, num_classes=1000, backend="native", **options).sum().mul(2.0).backward()

    asked = [{}, {"weight": weight}, {"reduction": "none"}, {"class_dim": 1}]
    if dtype == torch.bfloat16 and loss == "dist":
        asked.pop(2)  # its backward pass has float32 logits
    for options in asked:
        assert allocations(size, lambda options=options: step(**options)) == 1, options


@pytest.mark.parametrize("weighted", (False, True))
def test_nothing_but_the_gradient_with_sources(weighted):
    student, (teacher,), target = make("kd", rows=16, classes=1000, dtype=torch.float32)
    wide = padded(student, 24, torch.nan).requires_grad_()
    kept = TopK(*teacher.log_softmax(1).topk(8), rest="bucket")
    options = {"weight": torch.ones(16)} if weighted else {}

    def step():
        wide.grad = None
        fused_kd.kd_loss(wide, kept, target, num_classes=1000, **options).mul(2.0).backward()

    assert allocations(student.numel() * 4, step) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sources(fused, dtype):
    """A top-k teacher, and a head in chunks."""
    name, device = fused
    student, (teacher,), target = make("kd", classes=40, dtype=dtype, device=device)
    target[2] = -100
    kept = TopK(*teacher.log_softmax(1).topk(5), rest="bucket")
    hidden, weight = torch.randn(6, 8).to(device, dtype), torch.randn(40, 8).to(device, dtype)
    wide = padded(student, 8 if name == "triton" else 7, torch.nan)  # the same vectors there
    each_row = torch.rand(6).to(device)
    for options in ({}, {"weight": each_row}, {"reduction": "none"}):
        options |= {"ce_weight": 0.5}
        wanted = of(("kd", *fused), student, [kept], target, 2.0, **options)
        assert_padded(of(("kd", *fused), wide, [kept], target, 2.0, num_classes=40, **options), wanted, 40)
        wanted = of(("kd", *fused), student, [Head(hidden, weight, chunk_rows=4)], target, 2.0, **options)
        teacher = Head(hidden, padded(weight, 3, 7.0, 0), chunk_rows=4)
        value, gradient = of(("kd", *fused), wide, [teacher], target, 2.0, num_classes=40, **options)
        torch.testing.assert_close((value, gradient[:, :40]), wanted)  # a product may depend on where its results go
        assert not gradient[:, 40:].any()


@pytest.mark.parametrize(
    "reduction, dynamic",
    [
        ("mean", False),
        ("none", True),
        pytest.param("none", False, marks=pytest.mark.slow),
        pytest.param("mean", True, marks=pytest.mark.slow),
    ],
)
@rows
def test_compiled(place, reduction, dynamic):
    loss, name, device = place
    student, others, target = make(loss, dtype=torch.float32, device=device)
    wide = padded(student, 4, torch.nan)

    def call(leaf, *tensors):
        value = function(loss)(leaf, *tensors, num_classes=9, backend=name, reduction=reduction)
        return value * 2.0

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    leaf = wide.clone().requires_grad_()
    value = compiled(leaf, *others, target)
    value.sum().backward()
    wanted = of(place, student, others, target, 2.0, reduction=reduction)
    assert_padded((value.detach(), leaf.grad), (wanted[0] * 2.0, wanted[1]), 9)


@native
def test_exported(loss):
    student, others, target = make(loss, dtype=torch.float32)
    wide = padded(student, 4, torch.nan)

    class Call(torch.nn.Module):
        def forward(self, logits, *tensors):
            return function(loss)(logits, *tensors, num_classes=9, reduction="none", backend="native")

    leaf = wide.clone().requires_grad_()
    module = torch.export.export(Call(), (leaf, *others, target)).module()
    value = module(leaf, *others, target)
    value.sum().backward()
    wanted = of((loss, "native", "cpu"), student, others, target, reduction="none")
    assert_padded((value.detach(), leaf.grad), wanted, 9)
