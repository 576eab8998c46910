"""Sources under autograd's tools: checkpointing, inference mode, export, and compilation of odd layouts."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fused_kd
from fused_kd import Head, TopK


def make():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    return hidden, weight, torch.randn(4, 7), torch.arange(4)


def losses(teacher, target):
    kept = TopK(*teacher.log_softmax(1).topk(3), rest="bucket")
    weak = Head(teacher[:, :5].clone(), torch.arange(35.0).sin().reshape(7, 5))
    return {
        "head": lambda h, w: fused_kd.kd_loss(Head(h, w), teacher, reduction="none").sum(),
        "kept": lambda h, w: fused_kd.nkd_loss(Head(h, w), kept, target, reduction="none").sum(),
        "uskd": lambda h, w: fused_kd.uskd_loss(Head(h, w), weak, target, reduction="none").sum(),
        "dist": lambda h, w: fused_kd.dist_loss(h @ w.T, teacher, reduction="none").sum(),
    }


@pytest.mark.parametrize("name", ["head", "kept", "uskd", "dist"])
def test_checkpointing(name):
    hidden, weight, teacher, target = make()
    function = losses(teacher, target)[name]
    plain = torch.autograd.grad(function(hidden, weight), (hidden, weight))
    for reentrant in (False, True):
        again = checkpoint(function, hidden, weight, use_reentrant=reentrant)
        hidden.grad = weight.grad = None
        again.backward()
        torch.testing.assert_close((hidden.grad, weight.grad), plain)


def test_checkpointing_of_an_exported_loss():
    class Module(torch.nn.Module):
        def forward(self, student, teacher):
            return fused_kd.kd_loss(student, teacher)

    student, teacher = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7)
    exported = torch.export.export(Module(), (student, teacher)).module()
    (plain,) = torch.autograd.grad(fused_kd.kd_loss(student, teacher), student)
    (found,) = torch.autograd.grad(checkpoint(exported, student, teacher, use_reentrant=False), student)
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("name", ["head", "kept", "uskd", "dist"])
def test_double_backward_of_what_is_compiled(name):
    """The backward pass computes the gradients, so only its op can tell."""
    hidden, weight, teacher, target = make()
    torch.compiler.reset()
    loss = torch.compile(losses(teacher, target)[name], fullgraph=True, backend="aot_eager")(hidden, weight)
    with pytest.raises(RuntimeError, match="do not support double backward"):
        torch.autograd.grad(loss, (hidden, weight), create_graph=True)
    torch.autograd.grad(loss, (hidden, weight), retain_graph=True)


@pytest.mark.parametrize("name", ["head", "kept", "uskd"])
def test_the_tangent_of_an_incoming_gradient_is_not_lost(name):
    hidden, weight, teacher, target = make()
    loss = losses(teacher, target)[name](hidden, weight)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        torch.autograd.grad(loss, (hidden, weight), forward_ad.make_dual(torch.ones(()), torch.ones(())))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [True, False])
def test_two_heads_share_a_weight(reduction, trained):
    """As the last layer of a language model, applied to an earlier layer too. The compiler needs each tensor once."""
    hidden, weight, _, target = make()
    leaves = (hidden, weight.requires_grad_(trained))[: 1 + trained]

    def loss(hidden, weight):
        weak = Head(hidden.tanh(), weight)
        return fused_kd.uskd_loss(Head(hidden, weight), weak, target, mu=1.0, reduction=reduction).sum()

    def dense(hidden, weight):
        student, weak = hidden @ weight.T, hidden.tanh() @ weight.T
        return fused_kd.uskd_loss(student, weak, target, mu=1.0, reduction=reduction).sum()

    expected = torch.autograd.grad(dense(hidden, weight), leaves)
    torch.compiler.reset()
    for each in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(torch.autograd.grad(each(hidden, weight), leaves), expected)


def test_the_same_logits_twice():
    student, target = torch.randn(4, 7, requires_grad=True), torch.arange(4)
    expected = torch.autograd.grad(fused_kd.uskd_loss(student, student, target), student)
    torch.compiler.reset()
    compiled = torch.compile(fused_kd.uskd_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(student, student, target), student), expected)


@pytest.mark.parametrize("name", ["head", "kept", "uskd", "dist"])
def test_a_teacher_of_inference_mode(name):
    hidden, weight, teacher, target = make()
    plain = torch.autograd.grad(losses(teacher, target)[name](hidden, weight), weight)
    with torch.inference_mode():
        function = losses(teacher.clone(), target.clone())[name]
    torch.testing.assert_close(torch.autograd.grad(function(hidden, weight), weight), plain)


def test_one_row_of_dist_as_a_vector():
    student, teacher = torch.randn(5, requires_grad=True), torch.randn(5)
    for target in (None, torch.tensor(1), torch.randn(5).softmax(0)):
        found = [
            torch.autograd.grad(
                fused_kd.dist_loss(student, teacher, target, reduction="none", backend=backend), student
            )
            for backend in ("auto", "reference")
        ]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("strict", [True, False])
def test_a_gradient_that_an_export_would_lose_is_an_error(strict):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(5, 7)

        def forward(self, hidden, teacher):
            return fused_kd.kd_loss(Head(hidden, self.head.weight, self.head.bias), teacher)

    module, given = Module(), (torch.randn(4, 5), torch.randn(4, 7))
    with pytest.raises(Exception, match=r"torch\.export cannot record the gradient"):
        torch.export.export(module, given, strict=strict)
    with torch.no_grad():
        exported = torch.export.export(module, given, strict=strict).module()
        torch.testing.assert_close(exported(*given), module(*given))


def test_compiled_heads_of_any_layout():
    hidden, weight, teacher, _ = make()
    across = weight.detach().T.contiguous().requires_grad_()  # (D, C), as some models keep it
    wide = hidden.detach().T.contiguous().requires_grad_()

    def loss(hidden, across):
        return fused_kd.kd_loss(Head(hidden.T, across.T), teacher)

    plain = torch.autograd.grad(loss(wide, across), (wide, across))
    torch.compiler.reset()
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(wide, across), (wide, across))
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("loss", ["nkd", "uskd"])
def test_a_schedule_of_a_heads_numbers_compiles_nothing_anew(loss):
    """A clamped logit_scale is another number in each step."""
    hidden, weight, teacher, target = make()
    function = getattr(fused_kd, f"{loss}_loss")

    def step(value):
        other = Head(teacher[:, :5], weight.detach(), logit_scale=3 * value)
        return function(Head(hidden, weight, logit_scale=value, softcap=2 * value), other, target)

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for value in (1.5, 2.5, 3.5, 4.5):
        found = torch.autograd.grad(compiled(value), (hidden, weight))
        torch.testing.assert_close(found, torch.autograd.grad(step(value), (hidden, weight)))
    assert counter.frame_count <= 2
