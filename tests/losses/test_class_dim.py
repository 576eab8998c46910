"""Classes in another dimension than the last: every loss on every backend against itself on rows, and against
F.cross_entropy."""

import pytest
import torch
import torch._dynamo.testing
from loss_cases import HERE, function
from torch.nn import functional as F
from uskd_cases import FUSED as USKD_FUSED

import fused_kd
from fused_kd import backends
from fused_kd.core.catalogue import LOSSES

PLACES = [*HERE, *(("uskd", name, "cpu") for name in (*USKD_FUSED, "reference"))]
here = pytest.mark.parametrize("place", PLACES, ids="-".join)
IMAGES, CLASSES, HEIGHT, WIDTH = 2, 5, 3, 4
ROWS = (IMAGES, HEIGHT, WIDTH)


def inputs(loss, device="cpu", seed=0):
    """Logits (N, C, H, W), those with a gradient apart; indices and probabilities as F.cross_entropy takes them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (IMAGES, CLASSES, HEIGHT, WIDTH)
    student, other = 2 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    dense = torch.randn(*ROWS, 6, CLASSES, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, ROWS, generator=generator)
    target[1, 0, :2] = -100
    soft = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(1)
    weight = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    leaves = [student, other] if loss == "uskd" else [student]
    others = {"uskd": [], "tf_kd": [], "zipf_ls": [dense]}.get(loss, [other])
    return tuple([tensor.to(device) for tensor in tensors] for tensors in (leaves, others, [target], [soft], [weight]))


def to_rows(tensor, loss):
    """As (N, C), by hand; the positions' logits have the classes last as they are."""
    if tensor.dim() == 5:
        return tensor.reshape(-1, *tensor.shape[-2:])
    return tensor.permute(0, 2, 3, 1).reshape(-1, CLASSES) if tensor.dim() == 4 else tensor.reshape(-1)


def run(loss, backend, leaves, others, target, **options):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value, parts = function(loss)(*leaves, *others, target, backend=backend, return_parts=True, **options)
    value.sum().backward()
    return value.detach(), tuple(parts), [leaf.grad for leaf in leaves]


@here
@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_is_the_loss_of_the_rows(place, soft, reduction):
    loss, name, device = place
    leaves, others, (target,), (probabilities,), (weight,) = inputs(loss, device)
    target = probabilities if soft else target
    options = {"ce_weight": 0.7, "label_smoothing": 0.1, "reduction": reduction}
    for further in ({}, {"weight": weight}):
        flat = {key: to_rows(value, loss) for key, value in further.items()}
        value, parts, gradients = run(loss, name, leaves, others, target, class_dim=1, **options, **further)
        rows = [[to_rows(tensor, loss) for tensor in group] for group in (leaves, others, [target])]
        expected, expected_parts, expected_gradients = run(loss, name, *rows[:2], rows[2][0], **options, **flat)
        shape = ROWS if reduction == "none" else ()
        assert value.shape == shape and all(part.shape == shape for part in parts)
        torch.testing.assert_close(value, expected.reshape(shape), rtol=1e-12, atol=1e-12)
        for part, wanted in zip(parts, expected_parts, strict=True):
            torch.testing.assert_close(part, wanted.reshape(shape), rtol=1e-12, atol=1e-12)
        for gradient, wanted, leaf in zip(gradients, expected_gradients, leaves, strict=True):
            assert gradient.shape == leaf.shape and gradient.stride() == leaf.stride()
            torch.testing.assert_close(to_rows(gradient, loss), wanted, rtol=1e-12, atol=1e-12)


@here
def test_wherever_the_classes_are(place):
    """Any dimension, from either end, in three dimensions as well, and in the layout of channels_last."""
    loss, name, device = place
    leaves, others, (target,), _, _ = inputs(loss, device)
    expected = run(loss, name, leaves, others, target, class_dim=1)
    moved = [leaf.to(memory_format=torch.channels_last) for leaf in leaves]
    again = run(loss, name, moved, others, target, class_dim=-3)
    torch.testing.assert_close([again[0], *again[2]], [expected[0], *expected[2]], rtol=0, atol=0)
    for dim in (0, 2, 3, -1):
        there = [leaf.movedim(1, dim) for leaf in leaves]
        teacher = [other if loss == "zipf_ls" else other.movedim(1, dim) for other in others]
        value, _, gradients = run(loss, name, there, teacher, target, class_dim=dim)
        torch.testing.assert_close(value, expected[0])
        torch.testing.assert_close([gradient.movedim(dim, 1) for gradient in gradients], expected[2])
    lines = [leaf[:, :, 0] for leaf in leaves]
    teacher = [other[:, 0] if loss == "zipf_ls" else other[:, :, 0] for other in others]
    value, _, gradients = run(loss, name, lines, teacher, target[:, 0], class_dim=1)
    teacher = teacher if loss == "zipf_ls" else [other.movedim(1, 2) for other in teacher]
    wanted, _, wanted_gradients = run(loss, name, [line.movedim(1, 2) for line in lines], teacher, target[:, 0])
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close([gradient.movedim(1, 2) for gradient in gradients], wanted_gradients)


@here
def test_cross_entropy_is_pytorchs(place):
    loss, name, device = place
    leaves, others, (target,), (soft,), _ = inputs(loss, device)
    for labels in (target, soft):
        for reduction in ("mean", "sum", "none"):
            options = {"label_smoothing": 0.1, "reduction": reduction}
            given = (loss, name, leaves, others, labels)
            (loss_1, parts, with_ce), (loss_0, _, without) = (
                run(*given, class_dim=1, ce_weight=weight, **options) for weight in (1.0, 0.0)
            )
            leaf = leaves[0].clone().requires_grad_()
            theirs = F.cross_entropy(leaf, labels, **options)
            theirs.sum().backward()
            torch.testing.assert_close(parts[-1], theirs.detach())
            torch.testing.assert_close(loss_1 - loss_0, theirs.detach())
            torch.testing.assert_close(with_ce[0] - without[0], leaf.grad)


@pytest.mark.parametrize("loss", LOSSES)
def test_four_dimensions_must_say_it(loss):
    """In silence they were rows of W classes: without labels, with probabilities, and where C = H = W."""
    leaves, others, (target,), (soft,), _ = inputs(loss)
    square = [leaf[..., :3, :3].repeat(1, 1, 1, 1)[:, :3] for leaf in leaves]
    square_others = [other[:, :3, :3, :, :3] if loss == "zipf_ls" else other[:, :3, :3, :3] for other in others]
    calls = [(leaves, others, target), (leaves, others, soft), (square, square_others, target[:, :, :3].clamp(0, 2))]
    if loss in ("kd", "js", "dist"):
        calls.append((leaves, others, None))
    for logits, further, labels in calls:
        with pytest.raises(ValueError, match=r"class_dim: expected the dimension of the classes.* got None for studen"):
            function(loss)(*logits, *further, labels)
    with pytest.raises(ValueError, match=r"the target's shape \(2, 3, 4\) fits class_dim=1$"):
        function(loss)(*leaves, *others, target)


def test_messages_say_which_dimension_fits():
    (student,), (teacher,), (target,), (soft,), (weight,) = inputs("nkd")

    def fails(error, match, *tensors, **options):
        with pytest.raises(error, match=match):
            fused_kd.nkd_loss(*tensors, **options)

    indices = r"target: expected class indices of shape \(2, 5\) for logits of shape \(2, 5, 4\) with the classes in "
    fails(
        ValueError,
        indices + r"dimension 2, got \(2, 4\); the target's shape \(2, 4\) fits class_dim=1$",
        *(student[:, :, 0], teacher[:, :, 0], target[:, 0]),
    )
    fails(ValueError, r"got \(2, 1, 3, 4\); .* fits class_dim=1$", student, teacher, target[:, None], class_dim=-1)
    fails(ValueError, r"got \(7,\)$", student, teacher, target.new_zeros(7), class_dim=1)
    fails(
        ValueError,
        r"its classes seem to be in dimension 3, and the logits have them in dimension 1: pass target.movedim\(3, 1\)",
        *(student, teacher, soft.movedim(1, 3)),
        class_dim=1,
    )
    with pytest.raises(ValueError, match=r"weight: .* got \(2, 4\); the weight's shape \(2, 4\) fits class_dim=1$"):
        fused_kd.kd_loss(student[:, :, 0], teacher[:, :, 0], weight=weight[:, 0])
    fails(ValueError, "class_dim: expected from -4 to 3 for .*, got 4", student, teacher, target, class_dim=4)
    fails(ValueError, "class_dim: expected from -4 to 3 for .*, got -5", student, teacher, target, class_dim=-5)
    fails(TypeError, "class_dim: expected an int or None, got str", student, teacher, target, class_dim="1")
    fails(TypeError, "class_dim: expected an int or None, got bool", student, teacher, target, class_dim=True)
    one = torch.zeros(3, 1, 4)
    fails(ValueError, r"expected at least 2 classes in dimension 1, got shape", one, one, target[0], class_dim=1)
    masks = fused_kd.nkd_loss(student, teacher, target[:, None], class_dim=1)  # masks that kept a channel
    torch.testing.assert_close(masks, fused_kd.nkd_loss(student, teacher, target, class_dim=1))


def test_the_votes_keep_their_layout():
    (student,), (dense,), (target,), _, _ = inputs("zipf_ls")
    with pytest.raises(ValueError, match=r"dense_logits: expected shape \(2, 3, 4, P, 5\) with P at least 1, got "):
        fused_kd.zipf_ls_loss(student, dense.movedim(-1, 1), target, class_dim=1)
    with pytest.raises(ValueError, match="dense_logits: expected the device of student_logits, cpu, got meta"):
        fused_kd.zipf_ls_loss(student, dense.to("meta"), target, class_dim=1)


@here
def test_modules(place):
    loss, name, device = place
    leaves, others, (target,), _, _ = inputs(loss, device)
    expected = run(loss, name, leaves, others, target, class_dim=1)[0]
    if loss == "uskd":
        module = fused_kd.USKDLoss(CLASSES, CLASSES, class_dim=1, backend=name).double()
        torch.nn.init.eye_(module.weak_classifier.weight)
        torch.nn.init.zeros_(module.weak_classifier.bias)
    else:
        module = getattr(fused_kd, LOSSES[loss].module)(class_dim=1, backend=name)
    assert "class_dim=1" in repr(module)
    torch.testing.assert_close(module(*leaves, *others, target), expected)


def test_uskd_features_of_every_position():
    module = fused_kd.USKDLoss(7, CLASSES, class_dim=1).double()
    (student, _), _, (target,), _, _ = inputs("uskd")
    feature = torch.randn(IMAGES, 7, HEIGHT, WIDTH, dtype=torch.float64)
    weak = F.conv2d(feature, module.weak_classifier.weight[:, :, None, None], module.weak_classifier.bias)
    torch.testing.assert_close(module(student, feature, target), fused_kd.uskd_loss(student, weak, target, class_dim=1))
    with pytest.raises(ValueError, match=r"feature: expected shape \(2, 7, 3, 4\), of in_features=7"):
        module(student, feature[:, :, :2], target)
    module.class_dim = None
    with pytest.raises(ValueError, match="class_dim: expected the dimension of the classes"):
        module(student, feature, target)


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_whole(loss):
    leaves, others, (target,), _, (weight,) = inputs(loss)
    if backends.choose("auto", "cpu", loss) == "reference":
        pytest.skip("the reference is ordinary PyTorch")
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(*leaves):
        return function(loss)(*leaves, *others, target, weight=weight, class_dim=1)

    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    value = step(*ours)
    value.backward()
    expected = run(loss, "auto", leaves, others, target, weight=weight, class_dim=1)
    torch.testing.assert_close(value.detach(), expected[0])
    torch.testing.assert_close([leaf.grad for leaf in ours], expected[2])
    torch._dynamo.reset()


def test_labels_and_parts_for_study():
    (student, weak), _, (target,), _, _ = inputs("uskd")
    labels = fused_kd.uskd_soft_labels(student, weak, target, class_dim=1)
    rows = fused_kd.uskd_soft_labels(*(to_rows(x, "uskd") for x in (student, weak, target)))
    assert labels.shape == student.shape
    torch.testing.assert_close(to_rows(labels, "uskd"), rows)
    parts = fused_kd.decompose(student, weak, target, reduction="none", class_dim=1)
    rows = fused_kd.decompose(*(to_rows(x, "uskd") for x in (student, weak, target)), reduction="none")
    for part, wanted in zip(parts, rows, strict=True):
        torch.testing.assert_close(part, wanted.reshape(ROWS))
