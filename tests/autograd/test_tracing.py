"""What records a loss: torch.compile, torch.export, FakeTensorMode, torch.jit.trace and the exporters to ONNX."""

import importlib.util

import pytest
import torch
import torch._dynamo.compiled_autograd
from derivative_cases import CPU, KINDS, REFUSAL, Head, ids, problem, reference
from loss_cases import function, make, mixed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fused_kd

pytestmark = [pytest.mark.filterwarnings("ignore:.*torch.jit")]  # that they are to go
every_loss = pytest.mark.parametrize("place", CPU, ids=ids(CPU))
every_kind = pytest.mark.parametrize("place", KINDS, ids=ids(KINDS))
DOUBLE = "do not support double backward"


class Loss(torch.nn.Module):
    """A loss with a linear layer before it, of which everything comes in as an input."""

    def __init__(self, loss, backend, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 5, dtype=torch.float64)
        if loss == "uskd":
            self.weak = torch.nn.Linear(4, 5, dtype=torch.float64)
        self.loss, self.options = loss, {"ce_weight": 0.5, "backend": backend, **options}

    def forward(self, feature, others, target, weight=None):
        rest = (self.weak(feature),) if self.loss == "uskd" else others
        result = function(self.loss)(self.layer(feature), *rest, target, weight=weight, **self.options)
        return (result[0], *result[1]) if self.options.get("return_parts") else result


def inputs(loss, rows=3, soft=False, weighted=False):
    _, others, target = make(loss, rows, 5)
    feature = torch.linspace(-1.0, 1.0, 4 * rows, dtype=torch.float64).view(rows, 4).sin()
    weight = torch.arange(1.0, rows + 1) if weighted else None
    return feature, tuple(others), mixed(rows, 5) if soft else target, weight


def gradients(module, arguments, parameters=None):
    parameters = list(module.parameters()) if parameters is None else parameters
    result = module(*arguments)
    loss = result[0] if isinstance(result, tuple) else result
    return loss.detach(), torch.autograd.grad(loss.sum(), parameters, allow_unused=True, retain_graph=True)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("strict", (False, pytest.param(True, marks=pytest.mark.slow)))
@every_loss
def test_export_and_backward(place, strict):
    loss, backend, _ = place
    for how in ({}, {"reduction": "none", "return_parts": True}):
        module = Loss(loss, backend, **how)
        arguments = inputs(loss, weighted=bool(how))
        program = torch.export.export(module, arguments, strict=strict)
        ours = program.module()
        parameters = [ours.get_parameter(name) for name, _ in module.named_parameters()]
        expected = gradients(module, arguments)
        assert expected[1][0].abs().max() > 0
        for _ in range(2):  # the stored gradient is not scaled in place
            same(gradients(ours, arguments, parameters), expected)
        value = ours(*arguments)
        value = value[0] if how else value
        for more in ({}, {"allow_unused": True}):
            with pytest.raises(RuntimeError, match=DOUBLE):
                torch.autograd.grad(value.sum(), parameters[:2], create_graph=True, **more)
        with torch.no_grad():
            same(ours(*arguments), module(*arguments))


@every_kind
def test_a_program_exported_without_gradient_has_one(place):
    """need_gradient stands in the graph; what is asked of the program decides."""
    loss, backend, _ = place
    module, arguments = Loss(loss, backend), inputs(loss)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        ours = torch.export.export(module, arguments).module()
    for each in (module, ours):
        for parameter in each.parameters():
            parameter.requires_grad_()
    parameters = [ours.get_parameter(name) for name, _ in module.named_parameters()]
    same(gradients(ours, arguments, parameters), gradients(module, arguments))


@every_kind
def test_a_program_that_is_compiled_decomposed_and_saved(place, tmp_path):
    loss, backend, _ = place
    module, arguments = Loss(loss, backend), inputs(loss)
    expected = gradients(module, arguments)
    program = torch.export.export(module, arguments)
    torch.export.save(program, tmp_path / "loss.pt2")
    for each in (program, program.run_decompositions(), torch.export.load(tmp_path / "loss.pt2")):
        ours = each.module()
        parameters = [ours.get_parameter(name) for name, _ in module.named_parameters()]
        same(gradients(ours, arguments, parameters), expected)
        torch._dynamo.reset()
        compiled = torch.compile(ours, backend="aot_eager")
        same(gradients(compiled, arguments, parameters), expected)
        with pytest.raises(RuntimeError, match=DOUBLE):
            torch.autograd.grad(compiled(*arguments), parameters[:2], create_graph=True, allow_unused=True)


@every_kind
def test_transforms_of_an_exported_program(place):
    value, logits = problem(place)

    class Alone(torch.nn.Module):
        def forward(self, *leaves):
            return value(*leaves)

    ours = torch.export.export(Alone(), logits).module()
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.func.grad(ours)(*logits)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        ours(*(forward_ad.make_dual(each, torch.ones_like(each)) for each in logits))


@pytest.mark.parametrize(
    "options",
    (
        pytest.param({}, marks=pytest.mark.slow),
        {"allow_unused": True},
        pytest.param({"allow_unused": True, "materialize_grads": True}, marks=pytest.mark.slow),
    ),
)
@every_loss
def test_compile_and_create_graph(place, options):
    torch._dynamo.reset()
    value, logits = problem(place)
    head = Head(value, logits)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    for layer in head.layers:  # of USKD's two gradients one is wanted
        with pytest.raises(RuntimeError, match=DOUBLE):
            torch.autograd.grad(compiled(head.feature), list(layer.parameters()), create_graph=True, **options)
    with pytest.raises(RuntimeError, match=DOUBLE):
        compiled(head.feature).backward(create_graph=True)
    ours, theirs = (
        torch.autograd.grad(each(head.feature), list(head.parameters()), retain_graph=True) for each in (compiled, head)
    )
    same(ours, theirs)


def test_inductor_and_create_graph(native):
    torch._dynamo.reset()
    value, logits = problem(("nkd", "native", "cpu"))
    compiled = torch.compile(value, fullgraph=True)
    leaf = logits[0].requires_grad_()
    with pytest.raises(RuntimeError, match=DOUBLE):
        torch.autograd.grad(compiled(leaf), leaf, create_graph=True)


@every_loss
def test_compiled_autograd(place):
    """It compiles the backward of what ran eagerly: right, or with create_graph an error, not a gradient without a
    graph."""
    for how in ({}, {"reduction": "none"}):
        torch._dynamo.reset()
        value, logits = problem(place, **how)
        leaves = [each.clone().requires_grad_() for each in logits]
        loss = value(*(2.0 * leaf for leaf in leaves)).sum()
        expected = torch.autograd.grad(3.0 * loss, leaves, retain_graph=True)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            same(torch.autograd.grad(3.0 * loss, leaves, retain_graph=True), expected)
            with pytest.raises(RuntimeError, match=DOUBLE):
                torch.autograd.grad(3.0 * loss, leaves, create_graph=True)


TRANSFORMS = {
    "grad": torch.func.grad,
    "jacrev": torch.func.jacrev,
    "jvp": lambda f: lambda *s: torch.func.jvp(f, s, tuple(map(torch.ones_like, s)))[1],
    "vmap": lambda f: lambda *s: torch.func.vmap(f)(*(each[None] for each in s)),
    "hessian": torch.func.hessian,
}


def tangent_of(value):
    def ask(*logits):
        with forward_ad.dual_level():
            dual = (forward_ad.make_dual(each, torch.ones_like(each)) for each in logits)
            return forward_ad.unpack_dual(value(*dual)).tangent

    return ask


@pytest.mark.parametrize("fullgraph", (pytest.param(False, marks=pytest.mark.slow), True))
@pytest.mark.parametrize("name", (*TRANSFORMS, "dual", "dual-outside"))
@every_kind
def test_compiled_transforms(place, name, fullgraph):
    torch._dynamo.reset()
    value, logits = problem(place)
    if name == "dual-outside":
        ask = tangent_of(torch.compile(value, backend="aot_eager", fullgraph=fullgraph))
        value(*logits)  # compiled for no tangents first
    else:
        made = {**TRANSFORMS, "dual": tangent_of}[name](value)
        ask = torch.compile(made, backend="aot_eager", fullgraph=fullgraph)
    # PyTorch 2.14 refuses such an input to any compiled function itself; 2.11 on Python 3.10 cannot leave the level of
    # dual numbers by our error, and gives its own of that.
    also = {"dual-outside": "|dual tensor input", "dual": "|Observed exception"}.get(name, "")
    refusal = f"{REFUSAL}{also}"
    with pytest.raises(RuntimeError, match=refusal):
        ask(*logits)


@pytest.mark.parametrize("name", ("grad", pytest.param("vmap", marks=pytest.mark.slow), "dual"))
@every_kind
def test_compiled_transforms_of_the_reference(place, name):
    torch._dynamo.reset()
    value, logits = reference(place)
    ask = {**TRANSFORMS, "dual": tangent_of}[name](value)
    same(torch.compile(ask, backend="aot_eager")(*logits), ask(*logits))


def test_a_transform_of_what_is_compiled(native):
    torch._dynamo.reset()
    value, logits = problem(("nkd", "native", "cpu"))
    compiled = torch.compile(value, backend="aot_eager")
    compiled(*logits)
    with pytest.raises(RuntimeError, match=REFUSAL):
        torch.func.grad(compiled)(*logits)


@every_kind
def test_a_graph_of_make_fx_is_not_differentiated_to_none(place):
    value, logits = problem(place)
    graph = make_fx(value)(*logits)
    same(graph(*logits), value(*logits))
    with pytest.raises(RuntimeError, match="recorded graph"):
        graph(*(each.clone().requires_grad_() for each in logits))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        graph(*(forward_ad.make_dual(each, torch.ones_like(each)) for each in logits))

    def gradient(*leaves):
        leaves = [each.detach().requires_grad_() for each in leaves]
        return torch.autograd.grad(3.0 * value(*leaves), leaves)

    graph, other = make_fx(gradient)(*logits), tuple(each.flip(1) for each in logits)
    same(tuple(graph(*other)), gradient(*other))


@pytest.mark.parametrize("backend", ("native", "reference"))
@every_loss
def test_fake_tensors(place, backend):
    loss = place[0]
    for soft in (False, True):
        for weighted in (False, True):
            for how in ({}, {"reduction": "none", "return_parts": True}):
                real = inputs(loss, soft=soft, weighted=weighted)
                module = Loss(loss, backend, **how)
                expected = gradients(module, real)
                with FakeTensorMode() as mode:
                    fake = Loss(loss, backend, **how)
                    arguments = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, real)
                    ours = gradients(fake, arguments)
                    result = fake(*arguments)
                    (result[0] if how else result).sum().backward()
                shapes = [
                    [(a.shape, a.dtype) for a in (each[0], *each[1]) if a is not None] for each in (ours, expected)
                ]
                assert shapes[0] == shapes[1]


@every_loss
def test_jit_trace_is_refused_or_right(place):
    loss, backend, _ = place
    for how in ({}, {"reduction": "none", "return_parts": True}):
        arguments = inputs(loss, weighted=True)
        with pytest.raises(RuntimeError, match=f"torch.jit.trace.*{REFUSAL}"):
            torch.jit.trace(Loss(loss, backend, **how), arguments)
        with torch.no_grad(), pytest.raises(RuntimeError, match=f"torch.jit.trace.*{REFUSAL}"):
            torch.jit.trace(Loss(loss, backend, **how), arguments)
        module = Loss(loss, "reference", **how)
        traced = torch.jit.trace(module, arguments)
        for rows in (3, 6):
            other = inputs(loss, rows=rows, weighted=True)
            # Sizes are tensors to the tracer, and so 0.1 / C is rounded to float32.
            torch.testing.assert_close(gradients(traced, other), gradients(module, other), rtol=1e-6, atol=1e-9)


ONNX = importlib.util.find_spec("onnxscript") is not None and importlib.util.find_spec("onnx") is not None


@every_kind
def test_onnx_exporter_of_jit(place, tmp_path):
    loss, backend, _ = place
    with pytest.raises(RuntimeError, match=f"dynamo=False.*{REFUSAL}"):
        torch.onnx.export(Loss(loss, backend), inputs(loss), tmp_path / "loss.onnx", dynamo=False)


@pytest.mark.parametrize("strict", (False, True))
@every_kind
def test_onnx_exporter_of_export(place, strict, monkeypatch):
    """Its first step, under the flag that it sets: the packages that its others need may not be here."""
    loss, backend, _ = place
    from torch.onnx._internal.exporter import _flags

    monkeypatch.setattr(_flags, "_is_onnx_exporting", True)
    assert torch.onnx.is_in_onnx_export()
    with pytest.raises(RuntimeError, match=f"torch.onnx.export.*{REFUSAL}"):
        torch.export.export(Loss(loss, backend), inputs(loss), strict=strict)
    torch.export.export(Loss(loss, "reference"), inputs(loss), strict=strict)


@pytest.mark.skipif(not ONNX, reason="onnx and onnxscript are not installed")
@every_kind
def test_onnx_exporters(place, tmp_path):
    loss, backend, _ = place
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        torch.onnx.export(Loss(loss, backend), inputs(loss), dynamo=True)
    causes, error = [], caught.value
    while error is not None:
        causes.append(str(error))
        error = error.__cause__
    assert any(REFUSAL in text for text in causes)
    if loss in ("uskd", "zipf_ls"):  # a stable sort, and searchsorted
        assert any("USKD and Zipf's label smoothing" in text for text in causes)
        with pytest.raises(torch.onnx.OnnxExporterError):
            torch.onnx.export(Loss(loss, "reference"), inputs(loss), dynamo=True)
        return
    module = Loss(loss, "reference").float()
    feature, others, target, _ = inputs(loss)
    arguments = (feature.float(), tuple(each.float() for each in others), target)
    torch.onnx.export(module, arguments, tmp_path / "loss.onnx", dynamo=True)
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(tmp_path / "loss.onnx")
    values = [each.numpy() for each in (arguments[0], *arguments[1], target)]
    (value,) = ReferenceEvaluator(model).run(None, dict(zip((i.name for i in model.graph.input), values, strict=True)))
    torch.testing.assert_close(torch.tensor(value), module(*arguments).detach(), rtol=1e-5, atol=1e-6)


def test_a_schedule_lies_on_the_cpu_whatever_the_default_device():
    """On a GPU reading it would stall; "meta" has nothing to read."""
    student, teacher, target = torch.randn(4, 7), torch.randn(4, 7), torch.arange(4)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(gamma):
        return fused_kd.nkd_loss(student, teacher, target, gamma=gamma)

    with torch.device("meta"):
        found = [float(compiled(gamma)) for gamma in (1.0, 2.5, 3.4)]
    wanted = [float(fused_kd.nkd_loss(student, teacher, target, gamma=gamma)) for gamma in (1.0, 2.5, 3.4)]
    assert found == pytest.approx(wanted)
