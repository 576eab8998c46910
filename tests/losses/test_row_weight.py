"""A weight per row, of every loss on every backend that runs here: against a weighted sum of the reference's rows."""

import pytest
import torch
import torch._dynamo.testing
from loss_cases import HERE, function, make, mixed
from torch.nn import functional as F
from uskd_cases import FUSED as USKD_FUSED
from uskd_cases import make as make_uskd

import fused_kd
from fused_kd import backends
from fused_kd.backends.triton import layout
from fused_kd.core.catalogue import LOSSES
from fused_kd.core.options import HyperParameters

INF, NAN = float("inf"), float("nan")
PLACES = [*HERE, *(("uskd", name, "cpu") for name in (*USKD_FUSED, "reference"))]
here = pytest.mark.parametrize("place", PLACES, ids="-".join)
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0, 0.25], dtype=torch.float64)


def inputs(loss, classes=9, dtype=torch.float64, device="cpu"):
    """The logits that have a gradient, the further tensors, and the target; the last row is ignored."""
    if loss == "uskd":
        student, weak, target = make_uskd(6, classes, dtype=dtype)
        leaves, others = [student, weak], []
    else:
        student, others, target = make(loss, 6, classes, dtype, device)
        leaves = [student]
    target[5] = -100
    return leaves, others, target


def call(loss, backend, leaves, others, target, **options):
    return function(loss)(*leaves, *others, target, backend=backend, **options)


def run(loss, backend, leaves, others, target, grad_output=None, **options):
    """Loss, parts and gradients, in float64."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value, parts = call(loss, backend, leaves, others, target, return_parts=True, **options)
    value.backward(torch.ones_like(value) if grad_output is None else grad_output.to(value.dtype))
    return [x.double() for x in (value.detach(), torch.stack(tuple(parts)), *(leaf.grad for leaf in leaves))]


def by_hand(loss, leaves, others, target, weight, reduction, **options):
    """The same from the reference's rows without weights, of which those of weight 0 are left out; but not of USKD's,
    whose batch mean is of all."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    kept = weight != 0 if target.is_floating_point() else (weight != 0) & (target != -100)
    there = torch.ones_like(kept) if loss == "uskd" else weight != 0
    given = [leaf[there] for leaf in leaves], [other.double()[there] for other in others], target[there]
    values, parts = call(loss, "reference", *given, return_parts=True, reduction="none", **options)
    whole = [torch.zeros_like(weight).masked_scatter(there, each) for each in (values, *parts)]
    rows = [torch.where(kept, weight * each, 0.0) for each in whole]
    if reduction != "none":
        total = torch.where(kept, weight, 0.0).sum() if reduction == "mean" else 1.0
        rows = [each.sum() / total for each in rows]
    rows[0].sum().backward()
    return [rows[0].detach(), torch.stack(rows[1:]), *(leaf.grad for leaf in leaves)]


def assert_close(ours, theirs, tolerance=1e-11):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


OPTIONS = ({}, {"ce_weight": 0.7, "label_smoothing": 0.1})


@here
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "smoothed"))
def test_is_the_weighted_sum(place, reduction, options):
    loss, name, device = place
    leaves, others, target = inputs(loss, device=device)
    weight = WEIGHT.to(device)
    for labels in (target, mixed(device=device)):
        given = (leaves, others, labels)
        expected = by_hand(loss, *given, weight, reduction, **options)
        assert_close(run(loss, name, *given, weight=weight, reduction=reduction, **options), expected)


@pytest.mark.parametrize(
    "place", [place for place in PLACES if place[0] not in ("uskd", "zipf_ls", "tf_kd")], ids="-".join
)
def test_with_standardization(place):
    loss, name, device = place
    given = inputs(loss, device=device)
    options = {"logit_standardization": True, "ce_weight": 0.7, "temperature": 2.0}
    expected = by_hand(loss, *given, WEIGHT.to(device), "mean", **options)
    assert_close(run(loss, name, *given, weight=WEIGHT.to(device), **options), expected)


@pytest.fixture
def long_rows(monkeypatch):
    """Triton's layouts of rows that are too long for a chip, for rows that are not."""
    for name in ("ON_CHIP", "ON_CHIP_MORE", "ON_CHIP_WIDE"):
        monkeypatch.setattr(layout, name, ())
    monkeypatch.setattr(layout, "LOOPED_WARPS", 1)
    layout.row_config.cache_clear()
    yield
    layout.row_config.cache_clear()


@pytest.mark.parametrize("place", [place for place in PLACES if place[1] == "triton"], ids="-".join)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_long_rows_by_triton(place, reduction, long_rows):
    loss, name, device = place
    leaves, others, target = inputs(loss, 130, device=device)
    leaves[0][2, 3] = INF  # of weight 0
    weight = WEIGHT.to(device)
    for labels in (target, mixed(classes=130, device=device)):
        if loss == "uskd":  # the row is in the batch's mean
            leaves[0][2, 3] = 0.0
        expected = run(loss, "reference", leaves, others, labels, weight=weight, reduction=reduction)
        assert_close(run(loss, name, leaves, others, labels, weight=weight, reduction=reduction), expected)


@here
def test_a_row_of_weight_0_is_not_there(place):
    """Whatever it holds: its own loss may be infinite or NaN."""
    loss, name, device = place
    leaves, others, target = inputs(loss, device=device)
    weight = WEIGHT.to(device)
    rows = [0, 1, 3, 4, 5]
    for labels in (target, mixed(device=device)):
        spoilt = [leaf.clone() for leaf in leaves]
        if loss == "uskd":  # the student's row is in the batch mean, in which a NaN would be every row's
            spoilt[1][2] = NAN
            spoilt[0][2, labels[2] if labels is target else labels[2].argmax()] = -INF
        else:
            spoilt[0][2] = NAN
        for reduction in ("mean", "none"):
            value, parts, *gradients = run(loss, name, spoilt, others, labels, weight=weight, reduction=reduction)
            assert all(result.isfinite().all() for result in (value, parts, *gradients))
            assert not any(gradient[2].any() for gradient in gradients)
            if loss == "uskd":
                continue
            kept = [leaf[rows] for leaf in leaves], [other[rows] for other in others], labels[rows]
            expected = run(loss, name, *kept, weight=weight[rows], reduction=reduction)
            assert_close([gradients[0][rows]], expected[2:])
            if reduction == "mean":
                assert_close([value, parts], expected[:2])


@here
def test_ones_are_no_weights_and_zeros_no_rows(place):
    loss, name, device = place
    leaves, others, target = inputs(loss, device=device)
    for reduction in ("mean", "sum"):
        ones = run(loss, name, leaves, others, target, weight=torch.ones(6, device=device), reduction=reduction)
        assert_close(ones, run(loss, name, leaves, others, target, reduction=reduction), 1e-12)
        nothing = run(loss, name, leaves, others, target, weight=torch.zeros(6, device=device), reduction=reduction)
        assert not any(result.any() for result in nothing)


@here
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_half_precision_of_large_and_small_weights(place, dtype):
    """A mean of large weights is one of ordinary size; float16 keeps its gradients in range, and a GradScaler's factor
    brings them back from where the format has no digits."""
    loss, name, device = place
    leaves, others, target = inputs(loss, dtype=dtype, device=device)
    # Eager's error in this dtype is that of storing its gradient, and of the arithmetic in float32.
    unit = max(torch.finfo(dtype).eps, 1e-5)
    for size in (1e-6, 1.0, 3e5):
        weight = (size * WEIGHT).to(device)
        exact = by_hand(loss, leaves, others, target, weight.float().double(), "mean", ce_weight=0.5)
        scale = 1024.0
        factor = torch.tensor(scale, device=device)
        ours = run(loss, name, leaves, others, target, factor, weight=weight.float(), ce_weight=0.5)
        for a, b in zip(ours[2:], exact[2:], strict=True):
            assert ((a / scale - b).abs() <= 2 * unit * b.abs().max()).all()
        torch.testing.assert_close(ours[0], exact[0], rtol=1e-5, atol=1e-6)
    # Of a sum small weights and a GradScaler's factor come to a gradient of ordinary size, which neither alone has.
    weight = (2.0**-14 * WEIGHT).float().to(device)
    exact = by_hand(loss, leaves, others, target, weight.double(), "sum", ce_weight=0.5)
    ours = run(
        loss, name, leaves, others, target, torch.tensor(2.0**14, device=device), weight=weight, reduction="sum",
        ce_weight=0.5,
    )  # fmt: skip
    for a, b in zip(ours[2:], exact[2:], strict=True):
        assert ((a / 2.0**14 - b).abs() <= 2 * unit * b.abs().max()).all()


@here
def test_bad_weights(place):
    loss, name, device = place
    leaves, others, target = inputs(loss, device=device)

    def fails(error, match, weight):
        with pytest.raises(error, match=match):
            call(loss, name, leaves, others, target, weight=weight)

    ones = torch.ones(6, device=device)
    fails(TypeError, "weight: expected a Tensor with one weight per row, or None, got float", 0.5)
    fails(
        TypeError,
        "weight: expected float64, float32, float16 or bfloat16 weights or a boolean mask, got torch.int64; pass "
        r"weight.bool\(\) if it is a mask",
        ones.long(),
    )
    fails(ValueError, r"weight: expected one per row, of shape \(6,\), got \(5,\)", ones[:5])
    fails(ValueError, r"weight: expected one per row, of shape \(6,\), got \(6, 1\)", ones[:, None])
    per_class = r"weight: expected one per row, of shape \(6,\), got \(9,\); a weight per class is not supported"
    fails(ValueError, per_class, torch.ones(9, device=device))
    fails(ValueError, "weight: expected weights that do not require grad", ones.clone().requires_grad_())
    if device == "cpu":
        for bad in (-1.0, NAN, INF):
            fails(ValueError, f"weight: expected finite numbers of at least 0, got {bad}", ones * bad)


@here
def test_a_mask_is_a_weight_of_0_and_1(place):
    loss, name, device = place
    leaves, others, target = inputs(loss, device=device)
    mask = (WEIGHT > 0.6).to(device)
    leaves[-1][0, 3] = NAN  # of weight 0
    if loss == "uskd":  # the row is in the batch's mean
        leaves[-1][0, 3] = 0.0
    for labels in (target, mixed(device=device)):
        for reduction in ("mean", "none"):
            given = (leaves, others, labels)
            expected = run(loss, name, *given, weight=mask.double(), reduction=reduction)
            assert_close(run(loss, name, *given, weight=mask, reduction=reduction), expected, 0.0)


def test_a_negative_weight_where_values_are_not_read(native):
    """As on a GPU: the row is NaN, and a mean."""
    student, (teacher,), target = make("nkd")
    row_weight = torch.ones(6)
    row_weight[1] = -1.0
    rest = ("nkd", list(HyperParameters(gamma=1.5)), False, None, -100)
    loss, _, gradient, _ = torch.ops.fused_kd.row_loss(
        student, teacher, target, row_weight, *rest, "none", True, "native"
    )
    assert loss.isnan().tolist() == gradient.isnan().all(1).tolist() == [row == 1 for row in range(6)]
    assert torch.ops.fused_kd.row_loss(student, teacher, target, row_weight, *rest, "mean", False, "native")[0].isnan()


@here
def test_shapes_modules_and_untouched_inputs(place):
    loss, name, device = place
    leaves, others, target = inputs(loss, device=device)
    weight = WEIGHT.to(device)
    flat = call(loss, name, leaves, others, target, weight=weight, reduction="none")
    folded = [[x.reshape(2, 3, *x.shape[1:]) for x in group] for group in (leaves, others, [target, weight])]
    again = call(loss, name, *folded[:2], folded[2][0], weight=folded[2][1], reduction="none")
    assert torch.equal(again, flat.reshape(2, 3))
    strided = torch.stack([weight, weight + 1], 1)[:, 0]
    assert torch.equal(call(loss, name, leaves, others, target, weight=strided, reduction="none"), flat)
    assert torch.equal(weight.cpu(), WEIGHT)
    if loss == "uskd":
        module = fused_kd.USKDLoss(9, 9, reduction="none", backend=name).double()
        torch.nn.init.eye_(module.weak_classifier.weight)
        torch.nn.init.zeros_(module.weak_classifier.bias)
    else:
        module = getattr(fused_kd, LOSSES[loss].module)(reduction="none", backend=name)
    torch.testing.assert_close(module(*leaves, *others, target, weight=weight), flat)


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_whole_and_once_for_other_weights(loss):
    leaves, others, target = inputs(loss, dtype=torch.float32)
    if backends.choose("auto", "cpu", loss) == "reference":
        pytest.skip("the reference is ordinary PyTorch")
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()

    @torch.compile(backend=counter, fullgraph=True)
    def step(weight, *leaves):
        return function(loss)(*leaves, *others, target, weight=weight, ce_weight=1.0)

    for turn in range(3):
        weight = (turn + WEIGHT).float()
        ours = [leaf.clone().requires_grad_() for leaf in leaves]
        value = step(weight, *ours)
        value.backward()
        expected = run(loss, "auto", leaves, others, target, weight=weight, ce_weight=1.0)
        assert_close(
            [value.detach().double(), *(leaf.grad.double() for leaf in ours)], [expected[0], *expected[2:]], 1e-6
        )
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", [name for loss, name, device in HERE if (loss, device) == ("nkd", "cpu")])
def test_a_detection_head(backend):
    """Class logits of a batch's boxes, the last class the background, labels of -1 that take no part, and weights that
    sampling has set: the weighted sum over what counts, divided by the sum of the weights."""
    generator = torch.Generator().manual_seed(3)
    images, boxes, classes = 2, 50, 81
    student, teacher = torch.randn(2, images, boxes, classes, generator=generator, dtype=torch.float64)
    background = torch.rand(images, boxes, generator=generator) < 0.7
    target = torch.randint(classes - 1, (images, boxes), generator=generator)
    target[background] = classes - 1
    target[torch.rand(images, boxes, generator=generator) < 0.1] = -1
    weight = torch.where(background, 0.25, 1.0) * (torch.rand(images, boxes, generator=generator) < 0.8)
    student.requires_grad_()
    loss = fused_kd.nkd_loss(student, teacher, target, ce_weight=1.0, weight=weight, ignore_index=-1, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)

    kept = (target != -1) & (weight > 0)
    s, q, y, w = student[kept], teacher[kept].softmax(1), target[kept], weight[kept].double()
    log_p, own = s.log_softmax(1), F.one_hot(y, classes).bool()
    p_hat = s.masked_fill(own, -INF).log_softmax(1).masked_fill(own, 0.0)
    q_hat = q.masked_fill(own, 0.0) / q.masked_fill(own, 0.0).sum(1, keepdim=True)
    rows = -(q * log_p)[own] - 1.5 * (q_hat * p_hat).sum(1) - log_p[own]
    expected = (w * rows).sum() / w.sum()
    (wanted,) = torch.autograd.grad(expected, student)
    assert_close([loss.detach(), gradient], [expected.detach(), wanted])
    assert not gradient[~kept].any()
