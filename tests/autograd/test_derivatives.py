"""Every way to ask for a derivative gives the right one, or on a fused backend an error that says where to get it."""

from functools import partial

import pytest
import torch
from derivative_cases import CPU, FUSED, KINDS, REFUSAL, Head, ids, problem, reference
from loss_cases import function, make, mixed
from torch.autograd import forward_ad, functional
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

import fused_kd

every_fused = pytest.mark.parametrize("place", FUSED, ids=ids(FUSED))
every_loss = pytest.mark.parametrize("place", CPU, ids=ids(CPU))
every_kind = pytest.mark.parametrize("place", KINDS, ids=ids(KINDS))


def dual_tangent(value, logits, direction, requires_grad):
    with forward_ad.dual_level():
        first = forward_ad.make_dual(logits[0].clone().requires_grad_(requires_grad), direction)
        return forward_ad.unpack_dual(value(first, *logits[1:])).tangent


def graph_of(value, logits, **options):
    leaves = [each.clone().requires_grad_() for each in logits]
    (gradient,) = torch.autograd.grad(value(*leaves), leaves[:1], create_graph=True, **options)
    return torch.autograd.grad(gradient.square().sum() / 2, leaves[:1], **options)[0]


def graph_of_backward(value, logits):
    leaf = logits[0].clone().requires_grad_()
    value(leaf, *logits[1:]).backward(create_graph=True)
    gradient, leaf.grad = leaf.grad, None
    return torch.autograd.grad(gradient.square().sum() / 2, leaf)[0]


# Each of (value, logits, direction) to a derivative in the first logits: the gradient g, H (every entry), H v, g · v
# or H g.
def first(value, logits):
    return lambda x: value(x, *logits[1:])


WAYS = {
    "hessian": ("H", lambda f, s, v: functional.hessian(first(f, s), s[0])),
    "hessian-vectorized": ("H", lambda f, s, v: functional.hessian(first(f, s), s[0], vectorize=True)),
    "hessian-forward": (
        "H",
        lambda f, s, v: functional.hessian(
            first(f, s), s[0], vectorize=True, outer_jacobian_strategy="forward-mode"
        ).detach(),
    ),
    "hvp": ("Hv", lambda f, s, v: functional.hvp(first(f, s), s[0], v)[1]),
    "vhp": ("Hv", lambda f, s, v: functional.vhp(first(f, s), s[0], v)[1]),
    "jvp": ("gv", lambda f, s, v: functional.jvp(first(f, s), s[0], v)[1]),
    "jacobian-create-graph": ("g", lambda f, s, v: functional.jacobian(first(f, s), s[0], create_graph=True).detach()),
    "vjp-create-graph": ("g", lambda f, s, v: functional.vjp(first(f, s), s[0], create_graph=True)[1].detach()),
    "jacobian-forward": (
        "g",
        lambda f, s, v: functional.jacobian(first(f, s), s[0], vectorize=True, strategy="forward-mode"),
    ),
    "dual": ("gv", lambda f, s, v: dual_tangent(f, s, v, False)),
    "dual-of-leaf": ("gv", lambda f, s, v: dual_tangent(f, s, v, True).detach()),
    "create-graph": ("Hg", lambda f, s, v: graph_of(f, s)),
    "create-graph-unused": ("Hg", lambda f, s, v: graph_of(f, s, allow_unused=True)),
    "create-graph-materialized": ("Hg", lambda f, s, v: graph_of(f, s, allow_unused=True, materialize_grads=True)),
    "backward-create-graph": ("Hg", lambda f, s, v: graph_of_backward(f, s)),
    "func-grad": ("g", lambda f, s, v: grad(f)(*s)),
    "func-grad-grad": ("Hv", lambda f, s, v: grad(lambda x: (grad(f)(x, *s[1:]) * v).sum())(s[0])),
    "func-vjp": ("g", lambda f, s, v: vjp(first(f, s), s[0])[1](s[0].new_ones(()))[0]),
    "func-jvp": ("gv", lambda f, s, v: jvp(first(f, s), (s[0],), (v,))[1]),
    "func-linearize": ("gv", lambda f, s, v: linearize(first(f, s), s[0])[1](v)),
    "func-jacrev": ("g", lambda f, s, v: jacrev(f)(*s)),
    "func-jacfwd": ("g", lambda f, s, v: jacfwd(f)(*s)),
    "func-hessian": ("H", lambda f, s, v: hessian(f)(*s)),
    "func-vmap": ("g", lambda f, s, v: vmap(grad(f), in_dims=(0, *(None for _ in s[1:])))(s[0][None], *s[1:])[0]),
}  # fmt: skip
every_way = pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")


@every_way
@pytest.mark.parametrize("way", WAYS)
@every_fused
def test_refused_where_there_is_nothing_to_compute_it_from(place, way):
    for options in ({}, {"return_parts": True}):
        value, logits = problem(place, **options)
        with pytest.raises(RuntimeError, match=REFUSAL):
            WAYS[way][1](value, logits, torch.ones_like(logits[0]))


@every_way
@pytest.mark.parametrize("way", WAYS)
@every_loss
def test_reference_has_it(place, way):
    value, logits = reference(place)
    direction = torch.linspace(-1.0, 2.0, logits[0].numel(), dtype=torch.float64).view_as(logits[0])
    leaf = logits[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf, *logits[1:]), leaf, create_graph=True)
    rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0] for entry in gradient.flatten()]
    second = torch.stack(rows).view(*leaf.shape, *leaf.shape)
    gradient = gradient.detach()
    assert second.abs().max() > 1e-3
    expected = {
        "g": gradient,
        "gv": (gradient * direction).sum(),
        "H": second,
        "Hv": torch.tensordot(second, direction),
        "Hg": torch.tensordot(second, gradient),
    }
    kind, ask = WAYS[way]
    torch.testing.assert_close(ask(value, logits, direction), expected[kind], rtol=1e-9, atol=1e-12)


# WSLD's and USKD's labels are constants to every derivative, but not to a difference.
@pytest.mark.parametrize("loss", ("nkd", "kd", "dkd", "js", "dist", "tf_kd", "zipf_ls"))
def test_gradgradcheck_of_the_reference(loss):
    value, (student,) = problem((loss, "reference", "cpu"))
    assert torch.autograd.gradgradcheck(value, student.requires_grad_())
    assert torch.autograd.gradcheck(value, student, check_forward_ad=True, check_batched_grad=True)


@every_fused
def test_gradgradcheck_is_refused(place):
    value, logits = problem(place)
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.autograd.gradgradcheck(value, tuple(each.requires_grad_() for each in logits))


@pytest.mark.parametrize(
    "options",
    ({}, {"reduction": "none"}, {"weight": torch.arange(3.0)}, {"return_parts": True}),
    ids=("mean", "none", "weighted", "parts"),
)
@every_fused
def test_first_derivatives_by_every_way(place, options):
    """A Jacobian with vectorize=True, and grad with is_grads_batched, run the backward under vmap."""
    options = {key: each.to(place[2]) if key == "weight" else each for key, each in options.items()}
    value, logits = problem(place, **options)
    exact, _ = reference(place, **options)
    expected = functional.jacobian(exact, logits)
    close = partial(torch.testing.assert_close, expected=expected, rtol=1e-9, atol=1e-12)
    close(functional.jacobian(value, logits))
    close(functional.jacobian(value, logits, vectorize=True))
    leaves = [each.clone().requires_grad_() for each in logits]
    loss = value(*leaves)
    every = torch.eye(max(loss.numel(), 1), dtype=loss.dtype, device=loss.device).view(-1, *loss.shape)
    batched = torch.autograd.grad(loss, leaves, every, is_grads_batched=True, retain_graph=True)
    close(tuple(each.view(*loss.shape, *leaf.shape) for each, leaf in zip(batched, leaves, strict=True)))
    by_func = vmap(lambda incoming: torch.autograd.grad(loss, leaves, incoming, retain_graph=True))(every)
    close(tuple(each.view(*loss.shape, *leaf.shape) for each, leaf in zip(by_func, leaves, strict=True)))
    incoming = torch.ones_like(loss)
    ours, theirs = (functional.vjp(each, logits, incoming)[1] for each in (value, exact))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@every_kind
def test_batched_gradients_are_the_kernels(place, dtype):
    value, logits = problem(place, dtype=dtype, reduction="none")
    leaves = [each.clone().requires_grad_() for each in logits]
    loss = value(*leaves)
    incoming = torch.tensor([[1.0, 2.0, 3.0], [0.5, float("inf"), 0.0]], dtype=loss.dtype)
    batched = torch.autograd.grad(loss, leaves, incoming, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        single = torch.autograd.grad(loss, leaves, incoming[i], retain_graph=True)
        for ours, theirs in zip(batched, single, strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=torch.finfo(dtype).eps, atol=0.0, equal_nan=True)


def test_a_gradient_stored_as_0_stays_0_in_a_batch(native):
    student, teacher = torch.randn(2, 3, 5)
    loss = fused_kd.nkd_loss(
        student.requires_grad_(), teacher, torch.tensor([1, -100, 2]), reduction="none", backend="native"
    )
    incoming = torch.full((2, 3), float("inf"))
    (gradient,) = torch.autograd.grad(loss, student, incoming, is_grads_batched=True)
    assert (gradient[:, 1] == 0).all()


@every_fused
def test_an_incoming_tangent_goes_through(place):
    """A gradient is linear in what comes in, so its tangent is right where the logits have none."""
    value, logits = problem(place, reduction="none")
    leaves = [each.clone().requires_grad_() for each in logits]
    loss = value(*leaves)
    incoming, tangent = torch.arange(1.0, 4.0).to(loss), torch.tensor([2.0, -1.0, 0.5]).to(loss)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(incoming, tangent)
        (gradient,) = torch.autograd.grad(loss, leaves[:1], dual, retain_graph=True)
        primal, of_tangent = forward_ad.unpack_dual(gradient)
    torch.testing.assert_close(primal, torch.autograd.grad(loss, leaves[:1], incoming, retain_graph=True)[0])
    torch.testing.assert_close(of_tangent, torch.autograd.grad(loss, leaves[:1], tangent)[0])


@pytest.mark.parametrize("options", ({}, {"allow_unused": True}, {"allow_unused": True, "materialize_grads": True}))
@every_loss
def test_a_gradient_penalty_over_parameters(place, options):
    def penalty(value, logits, wanted):
        head = Head(value, logits)
        parameters = [p for i, layer in enumerate(head.layers) if i in wanted for p in layer.parameters()]
        gradients = torch.autograd.grad(head(head.feature), parameters, create_graph=True, **options)
        return torch.autograd.grad(sum(each.square().sum() for each in gradients), parameters, **options)

    _, logits = problem(place)
    for wanted in ([0], [1], [0, 1]) if len(logits) == 2 else ([0],):
        with pytest.raises(RuntimeError, match="do not support double backward"):
            penalty(*problem(place), wanted)
        assert all(each.abs().max() > 0 for each in penalty(*reference(place), wanted))


def test_a_tangent_of_the_weak_logits_alone(native):
    (student, weak), target = torch.randn(2, 3, 5), torch.tensor([1, 2, 3])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weak, torch.ones_like(weak))
        with pytest.raises(RuntimeError, match="forward-mode"):
            fused_kd.uskd_loss(student, dual, target, backend="native")
        # One that nobody is to be told of, and a level in which there is none.
        fused_kd.uskd_loss(student, dual.detach(), target, backend="native")
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="forward-mode"):
        fused_kd.uskd_loss(forward_ad.make_dual(student, weak), weak, target, backend="native")


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_a_tangent_where_no_gradient_flows(native, backend):
    """As for tensors that require grad: the teacher, probability targets and weights have no derivative."""
    student, teacher, ones = *torch.randn(2, 3, 5), torch.ones(3)
    target = student.softmax(1)
    with forward_ad.dual_level():
        for name, tensor in (("teacher_logits", teacher), ("target", target), ("weight", ones)):
            arguments = {"teacher_logits": teacher, "target": target, "weight": ones}
            arguments[name] = forward_ad.make_dual(tensor, torch.ones_like(tensor))
            with pytest.raises(ValueError, match=f"{name}: expected"):
                fused_kd.nkd_loss(student, **arguments, backend=backend)


@pytest.mark.parametrize("reentrant", (False, True))
@every_fused
def test_checkpointing(place, reentrant):
    value, logits = problem(place)
    leaves = [each.clone().requires_grad_() for each in logits]
    checkpoint(lambda *s: value(*(2.0 * each for each in s)), *leaves, use_reentrant=reentrant).backward()
    theirs = [each.clone().requires_grad_() for each in logits]
    value(*(2.0 * each for each in theirs)).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, theirs, strict=True))


@pytest.mark.parametrize("compiled", (False, True))
def test_a_gradient_taken_inside_the_forward_of_a_function(native, compiled):
    """As losses that are cut into chunks do it, which is no second derivative."""
    value, (student,) = problem(("nkd", "native", "cpu"))
    expected = functional.vjp(value, student)[1]
    torch._dynamo.reset()
    asked = torch.compile(value, backend="aot_eager") if compiled else value

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_()
                loss = asked(leaf)
            if not compiled:
                torch.autograd.grad(loss, leaf, retain_graph=True)
            ctx.save_for_backward(*torch.autograd.grad(loss, leaf))
            return loss.detach()

        @staticmethod
        def backward(ctx, grad_output):
            return ctx.saved_tensors[0] * grad_output

    leaf = student.clone().requires_grad_()
    Chunked.apply(leaf).backward()
    torch.testing.assert_close(leaf.grad, expected)


@every_loss
def test_per_sample_gradients_of_the_reference(place):
    """vmap(grad(...)), where the README sends whoever needs it, over rows with indices, probabilities and weights."""
    ask = function(place[0])
    student, others, target = make(place[0], 4, 5)
    for labels in (target, mixed(4, 5)):
        for weight in (None, torch.arange(4.0)):

            def one(student, others, label, weight=None):
                row_weight = None if weight is None else weight[None]
                rest = (each[None] for each in others)
                return ask(student[None], *rest, label[None], weight=row_weight, reduction="sum", backend="reference")

            arguments = (student, tuple(others), labels) if weight is None else (student, tuple(others), labels, weight)
            ours = vmap(grad(one))(*arguments)
            for i in range(4):
                row = [each[i] for each in others]
                theirs = grad(one)(student[i], row, labels[i], None if weight is None else weight[i])
                torch.testing.assert_close(ours[i], theirs, rtol=1e-9, atol=1e-12)


def test_the_reference_checks_what_it_can_read():
    student, teacher = torch.randn(2, 3, 5)
    ask = lambda s, y, w: fused_kd.nkd_loss(s, teacher, y, weight=w, backend="reference")  # noqa: E731
    bad, ones = torch.tensor([1, 5, 2]), torch.ones(3)
    for transform in (grad, jacrev, jacfwd):
        with pytest.raises(IndexError, match="got 5"):
            transform(ask)(student, bad, ones)
        with pytest.raises(ValueError, match=r"weight: .* got -1"):
            transform(ask)(student, bad, -ones)
    with pytest.raises(IndexError, match="got 5"):
        vmap(ask, in_dims=(0, None, None))(student[None], bad, ones)
    # As on a GPU, where reading would stall.
    assert vmap(ask)(student[None], bad[None], ones[None]).isnan().all()
