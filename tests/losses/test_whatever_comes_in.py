"""A gradient that is stored as 0 stays 0 whatever comes in, as F.cross_entropy has it: a mean that a user guards by
torch.where, or a sum over no items, sends infinity and NaN to rows that count nowhere."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from loss_cases import HERE, INF, function, has, make, mixed

from fused_kd import Head, TopK, autograd, nkd_loss, ops
from fused_kd.backends.topk import is_fused

NAN = float("nan")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLACES = [*HERE, *(("uskd", name, device) for loss, name, device in HERE if loss == "nkd")]
BAD, IGNORED, LIGHT, IMPOSSIBLE = 0, 1, 2, 4  # a row with a NaN, an ignored one, one of weight 0; a class of -inf


def spoilt(loss, device, dtype=torch.float32, soft=False):
    """Student, the others and the target: a row without a value, one to ignore, and a class that cannot occur."""
    student, others, target = make(loss, dtype=dtype, device=device)
    target = torch.where(target == IMPOSSIBLE, 0, target)
    for logits in (student, *(other for other in others if other.dim() == 2)):
        logits[:, IMPOSSIBLE] = -INF
    if loss != "uskd":  # whose batch mean would take it to every row
        student[BAD, 0] = NAN
    if soft:
        probabilities = mixed(device=device).to(dtype)
        probabilities[:, IMPOSSIBLE] = 0.0
        return student, others, probabilities / probabilities.sum(1, keepdim=True)
    target[IGNORED] = -100
    return student, others, target


def gradients(place, student, others, target, send, **options):
    """Of the student, and in USKD of the weak logits."""
    loss, name, _ = place
    leaves = [student.detach().clone().requires_grad_()]
    if loss == "uskd":
        leaves.append(others[0].detach().clone().requires_grad_())
        others = leaves[1:]
    send(function(loss)(leaves[0], *others, target, backend=name, **options))
    return [leaf.grad for leaf in leaves]


def sending(incoming):
    return lambda value: value.backward(torch.full_like(value, incoming))


def check_zeros(found, rows):
    for gradient in found:
        for row in rows:
            assert not gradient[row].any(), gradient[row]  # any() is true of a NaN
        assert not gradient[1:, IMPOSSIBLE].any(), gradient


@pytest.mark.parametrize("incoming", (INF, NAN))
@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_every_loss(place, incoming):
    loss, _, device = place
    weight = torch.ones(6, device=device)
    weight[LIGHT] = 0.0
    for weighted in ({"weight": weight}, {}):
        for more in ({}, {"ce_weight": 1.0, "label_smoothing": 0.1}, {"logit_standardization": True}):
            if not all(has(loss, option) for option in more) or (more and not weighted):
                continue
            for reduction, soft in (("mean", False), ("none", False), ("sum", True)):
                inputs = spoilt(loss, device, soft=soft)
                found = gradients(place, *inputs, sending(incoming), reduction=reduction, **weighted, **more)
                check_zeros(found, [*([] if soft else [IGNORED]), *([LIGHT] if weighted else [])])
                assert loss == "uskd" or found[0][BAD].isnan().any()
                assert not found[0][3].isfinite().all(), "what is not 0 is multiplied"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_every_dtype(place, dtype):
    for reduction in ("mean", "none"):
        student, others, target = spoilt(place[0], place[2], dtype)
        student[BAD] = 0.0
        check_zeros(gradients(place, student, others, target, sending(NAN), reduction=reduction), [IGNORED])
        nothing = torch.full_like(target, -100)
        for gradient in gradients(place, student, others, nothing, sending(INF), reduction=reduction):
            assert not gradient.any()


@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_a_mean_for_each_sequence(place):
    """The second of three sequences has no token that counts. Its 0 / 0 is chosen away, and comes back as a NaN."""
    _, _, device = place
    student, others, target = spoilt(place[0], device)
    student[BAD, 0] = 0.0
    target[2:4] = -100
    counts = (target != -100).reshape(3, 2).sum(1)

    def send(value):
        means = value.reshape(3, 2).sum(1) / counts
        total = torch.where(counts > 0, means, 0.0).sum()
        assert total.isfinite() or place[0] in ("tf_kd", "uskd")  # whose labels have mass where the student has none
        total.backward()

    found = gradients(place, student, others, target, send, reduction="none")
    check_zeros(found, [1, 2, 3])
    for gradient in found:
        assert gradient.isfinite().all()
        assert gradient[0].any()


def test_as_cross_entropy():
    """The same two ways; what PyTorch's own loss does."""
    logits = torch.randn(4, 5, requires_grad=True)
    target = torch.tensor([0, 1, -100, -100])
    for incoming in (INF, NAN):
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, target, reduction="sum") * incoming, logits)
        assert not gradient[2:].any()
        assert gradient[:2].isfinite().sum() == 0


@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_a_sum_over_no_items(place):
    student, others, target = spoilt(place[0], place[2])
    nothing, items = torch.full_like(target, -100), (target != target).sum()

    def send(value):
        (value / items).backward()

    for gradient in gradients(place, student, others, nothing, send, reduction="sum"):
        assert not gradient.any()


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_retained_and_compiled(fused, reduction):
    """Out of place too, and by the op in a compiled graph."""
    name, device = fused
    student, (teacher,), target = spoilt("nkd", device)
    leaf = student.requires_grad_()
    loss = nkd_loss(leaf, teacher, target, reduction=reduction, backend=name)
    for retain in (True, True, False):
        (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, NAN), retain_graph=retain)
        check_zeros([gradient], [IGNORED])
    torch._dynamo.reset()
    compiled = torch.compile(nkd_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(leaf, teacher, target, reduction=reduction, backend=name)
    check_zeros(torch.autograd.grad(loss, leaf, torch.full_like(loss, INF)), [IGNORED])


def scaled(name, gradient, incoming, norm):
    """By the op and, which must not differ, by the one in place."""
    out = ops.scale_gradient(gradient, incoming, norm, name)
    in_place = gradient.clone()
    ops.scale_gradient_(in_place, incoming, norm, name)
    assert torch.equal(out.isnan(), in_place.isnan())
    assert torch.equal(out.nan_to_num(7.0), in_place.nan_to_num(7.0))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op(fused, dtype):
    """A factor for all, one a row, one at a stride of 0; a norm that has no value; the lengths around a vector."""
    name, device = fused
    accumulate = torch.promote_types(dtype, torch.float32)
    one = torch.tensor(1.0, dtype=accumulate, device=device)
    for width in (1, 7, 33, 1030):
        gradient = torch.randn(3, width, device=device).to(dtype)
        gradient[1] = 0.0
        gradient[:, ::3] = 0.0
        gradient[2, -1] = NAN
        for bad in (-INF, NAN):
            factors = torch.tensor([0.5, bad, bad], dtype=accumulate, device=device)
            for incoming, norm in ((factors, one), (factors[2], one), (factors[2:].expand(3), one), (one, factors[1])):
                out = scaled(name, gradient, incoming, norm)
                assert torch.equal(out == 0, gradient == 0)
                assert out[2, -1].isnan()
                assert torch.equal(
                    out.isfinite(), (gradient == 0) | (gradient * (incoming * norm).reshape(-1, 1)).isfinite()
                )


def test_every_instruction_set(native):
    for name in native.instruction_sets():
        native.instruction_set = name
        for dtype in DTYPES:
            test_the_op(("native", "cpu"), dtype)


def test_a_factor_of_one_is_left_alone():
    """Nothing is multiplied then, so that nothing can have become a NaN."""
    assert autograd._is_one(torch.tensor(1.0))
    assert not any(autograd._is_one(torch.tensor(bad)) for bad in (INF, NAN))


@pytest.mark.parametrize("weight", (1e200, 1e-200))
def test_weights_beyond_float32(fused, weight):
    """The power of two that float16's norm takes back may itself be infinite, or 0."""
    name, device = fused
    student, (teacher,), target = make("nkd", dtype=torch.float16, device=device)
    target[IGNORED] = -100
    each = torch.full((6,), weight, dtype=torch.float64, device=device)
    each[LIGHT] = 0.0
    leaf = student.requires_grad_()
    nkd_loss(leaf, teacher, target, weight=each, reduction="sum", backend=name).backward()
    assert not leaf.grad[[IGNORED, LIGHT]].any()


@pytest.mark.parametrize("loss", ("nkd", "kd", "dkd", "wsld", "js", "tf_kd", "uskd"))
@pytest.mark.parametrize("incoming", (INF, NAN))
def test_rows_of_a_head(loss, incoming):
    """The backward pass computes the gradients with what comes in for each row: NaN, but for rows that do not count."""
    torch.manual_seed(0)
    target = torch.randn(3, 7).softmax(1)
    for row_weight, options in itertools.product((torch.tensor([1.0, 0.0, 1.0]), None), ({}, {"label_smoothing": 0.1})):
        hidden, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
        others = [] if loss == "tf_kd" else [torch.randn(3, 7)]
        value = function(loss)(
            Head(hidden, weight), *others, target, ce_weight=1.0, weight=row_weight, reduction="none", **options
        )
        value.backward(torch.tensor([1.0, 1.0, incoming]))
        assert hidden.grad[:2].isfinite().all() and not hidden.grad[2].isfinite().any()
        assert row_weight is None or not hidden.grad[1].any()


@pytest.mark.parametrize("loss", ("nkd", "kd", "dkd", "wsld", "js", "tf_kd", "uskd"))
@pytest.mark.parametrize("incoming", (INF, NAN))
def test_an_impossible_class_of_a_head(fused, loss, incoming):
    """Its gradient is 0 whatever comes in for a row."""
    name, device = fused
    torch.manual_seed(0)
    bias = torch.randn(40, device=device)
    bias[7] = -INF
    logits, target = torch.randn(3, 40, device=device), torch.tensor([1, 2, 3], device=device)
    others = [[]] if loss == "tf_kd" else [[logits]]
    if is_fused(loss, "bucket"):
        others.append([TopK(*logits.log_softmax(1).topk(5), "bucket")])
    for other in others:
        hidden, weight = (torch.randn(rows, 5, device=device, requires_grad=True) for rows in (3, 40))
        head = Head(hidden, weight, bias.clone().requires_grad_())
        value = function(loss)(head, *other, target, ce_weight=1.0, reduction="none", backend=name)
        value.backward(torch.tensor([1.0, incoming, 1.0], device=device))
        assert not weight.grad[7].any() and not head.bias.grad[7].any()
        assert hidden.grad[[0, 2]].isfinite().all() and not hidden.grad[1].isfinite().any()
