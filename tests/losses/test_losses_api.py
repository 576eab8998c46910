"""Every loss as a function and a module of PyTorch: shapes, errors, ops, compilation; the catalogue."""

import inspect
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from loss_cases import HERE, function, make
from torch.library import opcheck

import fused_kd
from fused_kd import backends
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES
from fused_kd.core.options import HyperParameters

here = pytest.mark.parametrize("place", HERE, ids="-".join)


@here
def test_shapes_and_errors(place):
    loss, name, device = place
    student, others, target = make(loss, rows=6, device=device)
    if loss != "dist":
        flat = function(loss)(student, *others, target, reduction="none", backend=name)
        folded = [tensor.reshape(2, 3, *tensor.shape[1:]) for tensor in (student, *others, target)]
        assert torch.equal(function(loss)(*folded, reduction="none", backend=name), flat.reshape(2, 3))
    with pytest.raises(ValueError, match="ce_weight: expected a finite number of at least 0, got -1"):
        function(loss)(student, *others, target, ce_weight=-1.0, backend=name)
    with pytest.raises(ValueError, match="label_smoothing: expected a number from 0 to below 1, got 1"):
        function(loss)(student, *others, target, label_smoothing=1.0, backend=name)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        function(loss)(student, *others, target, reduction="batchmean", backend=name)
    with pytest.raises(ValueError, match="target: expected"):
        function(loss)(student, *others, target[:2], backend=name)
    if device == "cpu" and name != "triton":
        with pytest.raises(IndexError, match="target: expected class indices from 0 to 8"):
            function(loss)(student, *others, target + 100, backend=name)
    if others and loss != "zipf_ls":
        with pytest.raises(ValueError, match="teacher_logits: expected logits that do not require grad"):
            function(loss)(student, others[0].requires_grad_(), target, backend=name)


@here
def test_without_targets(place):
    loss, name, device = place
    if loss not in ("kd", "dist"):
        pytest.skip("it needs targets")
    student, others, target = make(loss, device=device)
    torch.testing.assert_close(
        function(loss)(student, *others, backend=name), function(loss)(student, *others, target, backend=name)
    )
    with pytest.raises(ValueError, match=r"target: expected one, since ce_weight is 1\.0; got None"):
        function(loss)(student, *others, ce_weight=1.0, backend=name)


@here
def test_modules(place):
    loss, name, device = place
    student, others, target = make(loss, device=device)
    module = getattr(fused_kd, LOSSES[loss].module)(ce_weight=0.5, reduction="sum", backend=name)
    value, parts = module(student, *others, target, return_parts=True)
    expected = function(loss)(student, *others, target, ce_weight=0.5, reduction="sum", backend=name)
    assert torch.equal(value, expected)
    torch.testing.assert_close(torch.stack(tuple(parts)).sum(), value)
    for option, default in LOSSES[loss].defaults.items():
        assert f"{option}={0.5 if option == 'ce_weight' else default!r}" in repr(module)
    assert module.state_dict() == {}


def test_schedules():
    student, (teacher,), target = make("kd")
    steps = iter((1.0, 2.0))
    module = fused_kd.KDLoss(temperature=lambda: next(steps), ce_weight=0.5)
    for temperature in (1.0, 2.0):
        expected = fused_kd.kd_loss(student, teacher, target, temperature=temperature, ce_weight=0.5)
        assert torch.equal(module(student, teacher, target), expected)
    criterion = fused_kd.USKDLoss(5, 9, beta=lambda: 0.3).double()
    feature = torch.randn(6, 5, dtype=torch.float64)
    expected = fused_kd.uskd_loss(student, criterion.weak_classifier(feature), target, beta=0.3)
    assert torch.equal(criterion(student, feature, target), expected)
    module.temperature = "hot"
    with pytest.raises(TypeError, match="temperature: expected a number, got str"):
        module(student, teacher, target)


#: And some that no float can hold.
NO_NUMBERS = (10**400, -(10**400), Fraction(10**400), 1j, Decimal(1), np.ones(2), np.bool_(True), torch.ones(2))
WRONG = {
    **dict.fromkeys(
        ("alpha", "beta", "gamma", "mu", "power", "ce_weight"), (-1, "1", float("inf"), torch.ones(()), *NO_NUMBERS)
    ),
    **dict.fromkeys(("correct", "label_smoothing"), (1.0, -0.1, True, *NO_NUMBERS)),
    **dict.fromkeys(("logit_standardization", "square"), (1, None)),
    "temperature": (0, -1.0, "hot", Fraction(1, 10**400), *NO_NUMBERS),
    "rank": ("p", 3, np.array(["weak", "final"])),
    "reduction": ("batchmean", None, np.array(["mean", "sum"])),
    "ignore_index": (1.5, None, 2**63, -(10**400)),
    "process_group": ("WORLD",),
    "class_dim": ("1", 1.0, True, 2**63),
    "num_classes": (1, "9", 9.0, 2**63),
    "backend": ("cuda", None, ["native"]),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_modules_are_checked_when_they_are_made(loss):
    """Every hyper-parameter of every loss, with the words of the function."""
    module, signature = getattr(fused_kd, LOSSES[loss].module), inspect.signature(function(loss))
    student, others, target = make(loss)
    sizes = {"in_features": 5, "num_classes": 9} if loss == "uskd" else {}
    module(**sizes)
    for name in inspect.signature(module).parameters:
        if name in sizes:
            continue
        assert name in signature.parameters
        for wrong in (*WRONG[name], *((1.5,) if (loss, name) == ("js", "beta") else ())):
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected ") as by_function:
                function(loss)(student, *others, target, **{name: wrong})
            with pytest.raises(by_function.type) as by_module:
                module(**sizes, **{name: wrong})
            assert str(by_module.value) == str(by_function.value)
        criterion = module(**sizes, **{name: lambda value=WRONG[name][0]: value})
        tensors = (student, torch.randn(6, 5)) if loss == "uskd" else (student, *others)
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected "):
            criterion.double()(*(tensor.double() for tensor in tensors), target)


@pytest.mark.parametrize("given", (np.float32(0.5), np.float64(0.5), np.longdouble(0.5), Fraction(1, 2)), ids=repr)
@pytest.mark.parametrize("loss", LOSSES)
def test_numbers_of_other_types(loss, given):
    student, others, target = make(loss)
    others = others or [torch.randn(6, 9, dtype=torch.float64)] * (loss == "uskd")
    for name, default in LOSSES[loss].defaults.items():
        if type(default) is float:
            expected = function(loss)(student, *others, target, **{name: 0.5})
            assert torch.equal(function(loss)(student, *others, target, **{name: given}), expected)


def test_a_number_that_no_float_can_hold_may_come_later():
    module = fused_kd.KDLoss()
    module.temperature = 10**400
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0, got one that no float"):
        module(torch.randn(2, 3), torch.randn(2, 3))
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0, got one that no float"):
        torch.compile(module, backend="eager")(torch.randn(2, 3), torch.randn(2, 3))


@pytest.mark.parametrize("wrong", (1, None, "yes", np.bool_(True)), ids=repr)
@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("loss", LOSSES)
def test_return_parts_is_a_flag(loss, backend, wrong):
    """It was taken for False in one way of a call, and for True in another."""
    student, others, target = make(loss)
    with pytest.raises(TypeError, match="return_parts: expected True or False, got "):
        function(loss)(student, *others, target, backend=backend, return_parts=wrong)


def test_a_module_says_its_name_where_an_argument_is_missing():
    student, (teacher,), target = make("nkd")
    of_images = type("OfImages", (fused_kd.NKDLoss,), {})
    for module in (of_images(), *(getattr(fused_kd, loss.module)() for loss in LOSSES.values() if loss.name != "uskd")):
        with pytest.raises(TypeError, match=rf"^{type(module).__name__}\.forward\(\) missing "):
            module()
        with pytest.raises(TypeError, match=rf"^{type(module).__name__}\.forward\(\) got an unexpected .* 'gamma'"):
            module(student, teacher, target, gamma=2.0)
    forward = fused_kd.NKDLoss.forward
    assert inspect.signature(forward) == inspect.signature(fused_kd.DKDLoss.forward)
    assert forward.__doc__.startswith("The loss, or with")
    assert torch.equal(of_images()(student, teacher, target, weight=None), fused_kd.nkd_loss(student, teacher, target))


@pytest.mark.parametrize("place", [place for place in HERE if place[0] not in ("tf_kd", "zipf_ls")], ids="-".join)
def test_a_teacher_is_not_left_out(place):
    """None was taken for a loss without one: the divergence from the student itself, which is 0."""
    loss, name, device = place
    student, _, target = make(loss, device=device)
    with pytest.raises(TypeError, match="teacher_logits: expected a Tensor, got NoneType"):
        function(loss)(student, None, target, backend=name)


def test_sizes_of_uskd():
    for sizes, error in (((0, 9), ValueError), ((5, 1), ValueError), (("5", 9), TypeError), ((5, 9.0), TypeError)):
        with pytest.raises(error, match=r"^(in_features|num_classes): expected "):
            fused_kd.USKDLoss(*sizes)


@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("standardize", (False, True))
def test_opcheck(loss, standardize, native):
    student, others, target = make(loss, dtype=torch.float32)
    own = dict(zip(ROW_LOSSES[loss].own, (1.0, 0.5), strict=False))
    hyper = list(HyperParameters(**own, temperature=2.0, ce_weight=0.7, label_smoothing=0.1))
    teacher = others[0] if others else None
    scores = standardize and bool(others)
    after = (scores, None, -100, "mean", True, "native")
    for row_weight in (None, torch.arange(6.0)):
        opcheck(torch.ops.fused_kd.row_loss.default, (student, teacher, target, row_weight, loss, hyper, *after))
    narrow, classes = None if teacher is None else teacher[:, :8], target.clamp(max=7)
    padded = (student, narrow, classes, None, loss, hyper, scores, 8, *after[2:])
    opcheck(torch.ops.fused_kd.row_loss.default, padded)
    hyper = torch.tensor(hyper, dtype=torch.float64)
    opcheck(torch.ops.fused_kd.row_loss_scheduled.default, (student, teacher, target, row_weight, loss, hyper, *after))


def test_opcheck_of_votes(native):
    student, (dense,), target = make("zipf_ls", dtype=torch.float32)
    for reduction in ("mean", "none"):
        hyper = HyperParameters(beta=0.1, power=1.0, ce_weight=0.7, label_smoothing=0.1)
        after = (list(hyper), -100, reduction, True, "native")
        for row_weight in (None, torch.arange(6.0)):
            opcheck(torch.ops.fused_kd.zipf_ls.default, (student, dense, target, row_weight, *after))


NUMBERS = [(loss, name) for loss in LOSSES for name, value in LOSSES[loss].defaults.items() if type(value) is float]


def schedule(loss, name):
    """Values that cross 1 where they may, reach the ends of their range, and come with no end in sight."""
    if name in ("label_smoothing", "correct") or (loss, name) == ("js", "beta"):
        return (0.5, 0.25, 0.0, 0.9, 0.75, 1.0 if name == "beta" else 0.1)
    return (0.5, 2.0, 4.0 if name == "temperature" else 0.0, 1.0, 1.5, 3.0)


@pytest.mark.parametrize(("loss", "name"), NUMBERS, ids=map("-".join, NUMBERS))
def test_compiles_whole_and_only_once_more_when_a_hyper_parameter_changes(loss, name):
    """A float is taken for a constant until it changes once; from then on it is an input of the graph."""
    student, others, target = make(loss, dtype=torch.float32)
    if backends.choose("auto", "cpu", loss) == "reference":
        pytest.skip("the reference is ordinary PyTorch")
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    further = {"ce_weight": 0.7} if name == "label_smoothing" else {}

    @torch.compile(backend=counter, fullgraph=True)
    def step(s, value):
        return function(loss)(s, *others, target, **further, **{name: value})

    for value in schedule(loss, name):
        compiled = step(student.requires_grad_(), value)
        torch.testing.assert_close(compiled, function(loss)(student, *others, target, **further, **{name: value}))
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_a_number_of_numpy_in_a_compiled_call():
    """There it is an array, which the error says."""
    student, teacher = torch.randn(2, 2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(fused_kd.kd_loss, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"temperature: expected a number, got ndarray; .*: pass a float"):
        compiled(student, teacher, temperature=np.float64(2.0))


@pytest.mark.parametrize("loss", LOSSES)
def test_modules_compile_only_once_more_when_hyper_parameters_change(loss):
    """Floats and whole numbers, set by hand, and what a callable returns."""
    student, others, target = make(loss, dtype=torch.float32)
    if backends.choose("auto", "cpu", loss) == "reference":
        pytest.skip("the reference is ordinary PyTorch")
    if loss == "uskd":
        others = [torch.randn(6, 5)]
    names = [name for each, name in NUMBERS if each == loss]
    whole = [name for name in names if max(schedule(loss, name)) > 1]
    epoch = SimpleNamespace(now=0.0)
    module = getattr(fused_kd, LOSSES[loss].module)(*([5, 9] if loss == "uskd" else ()))
    scheduled = getattr(fused_kd, LOSSES[loss].module)(
        *([5, 9] if loss == "uskd" else ()), label_smoothing=lambda: 0.1 * epoch.now, ce_weight=lambda: epoch.now
    )
    for changing, values in (
        (module, [2.0, 3, np.float64(4.0), 5.5, np.float32(6.0)]),
        (scheduled, [2.0, 3.0, 4.0, 5.5, 6.0]),
    ):
        counter = torch._dynamo.testing.CompileCounter()
        torch._dynamo.reset()
        compiled = torch.compile(changing, backend=counter, fullgraph=True)
        for value in values:
            epoch.now = value
            for name in whole if changing is module else ():
                setattr(module, name, value)
                assert type(getattr(module, name)) is float
            value = compiled(student, *others, target)
            torch.testing.assert_close(value, changing(student, *others, target))
        assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("loss", LOSSES)
def test_modules_compile_only_once_more_for_all_numbers_of_rows(loss):
    """A size that a message mentions becomes a constant of the graph, if the text is made before there is an error."""
    if backends.choose("auto", "cpu", loss) == "reference":
        pytest.skip("the reference is ordinary PyTorch")
    module = getattr(fused_kd, LOSSES[loss].module)(*([5, 9] if loss == "uskd" else ()))
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for rows in (3, 4, 6, 7):
        student, others, target = make(loss, rows, dtype=torch.float32)
        if loss == "uskd":
            others = [torch.randn(rows, 5, 2, 2)]
        torch.testing.assert_close(compiled(student, *others, target), module(student, *others, target))
    assert counter.frame_count == 2
    torch._dynamo.reset()


@here
def test_ends_of_jensen_shannon(place):
    loss, name, device = place
    if loss != "js":
        pytest.skip("it has no beta from 0 to 1")
    student, others, target = make(loss, device=device)
    target[2] = -100
    forward = fused_kd.kd_loss(student, *others, target, temperature=2.0, backend=name)
    torch.testing.assert_close(
        function(loss)(student, *others, target, beta=0.0, temperature=2.0, backend=name), forward
    )
    leaf = student.clone().requires_grad_()
    value = function(loss)(leaf, *others, target, beta=1.0, temperature=2.0, backend=name)
    value.backward()
    p, q = (student / 2).log_softmax(1), (others[0] / 2).log_softmax(1)
    counted = target != -100
    torch.testing.assert_close(value.detach(), 4 * (p.exp() * (p - q)).sum(1)[counted].mean())
    assert not leaf.grad[2].any()
    with pytest.raises(ValueError, match=r"beta: expected a number from 0 to 1, got 1\.5"):
        function(loss)(student, *others, beta=1.5, backend=name)


def test_catalogue():
    for loss in fused_kd.catalogue():
        assert LOSSES[loss.name] is loss
        assert loss.defaults["ce_weight"] == 0.0
        assert callable(getattr(fused_kd, loss.module))
        assert loss.function in fused_kd.__all__ and loss.module in fused_kd.__all__
        for device, names in loss.backends.items():
            assert device in ("cpu", "cuda") and names[-1] == "reference"
    assert set(ROW_LOSSES) < set(LOSSES)


def test_decompose():
    student, (teacher,), target = make("nkd")
    target[1] = -100
    student.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        parts = fused_kd.decompose(student, teacher, target, temperature=2.0, reduction=reduction)
        options = {"temperature": 2.0, "reduction": reduction}
        torch.testing.assert_close(
            parts.nkd_target + 1.5 * parts.nkd_non_target, fused_kd.nkd_loss(student, teacher, target, **options)
        )
        torch.testing.assert_close(
            parts.dkd_binary + 8.0 * parts.dkd_non_target, fused_kd.dkd_loss(student, teacher, target, **options)
        )
    folded = fused_kd.decompose(
        student.reshape(2, 3, 9), teacher.reshape(2, 3, 9), target.reshape(2, 3), temperature=2.0, reduction="none"
    )
    assert folded.kd_target.shape == (2, 3)
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        fused_kd.decompose(student, teacher, target, temperature=0.0)
