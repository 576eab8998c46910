"""backend="auto" says it, once, where it takes the reference for a loss that has kernels for that device."""

import warnings

import pytest
import torch

import fused_kd
from fused_kd import NKDLoss, backends, direct, kd_loss, nkd_loss, uskd_loss

STUDENT, TEACHER, TARGET = torch.randn(4, 10), torch.randn(4, 10), torch.arange(4)


@pytest.fixture
def without_core(monkeypatch):
    """As in a process that has just imported a fused_kd whose installation found no compiler."""
    monkeypatch.setattr(backends.native, "_core", None)
    monkeypatch.setattr(direct, "_loss", None)
    monkeypatch.setattr(backends.native, "_failure", "the C++ core was not built: no compiler")
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_warned", set())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def caught(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [one for one in found if "fused_kd" in str(one.message)]


def test_one_warning_with_the_reason_and_how_to_silence_it(without_core):
    (warning,) = caught(lambda: nkd_loss(STUDENT, TEACHER, TARGET))
    text = str(warning.message)
    assert warning.category is RuntimeWarning
    assert "runs NKD of cpu tensors with the eager reference" in text
    assert "native: the C++ core was not built: no compiler" in text
    assert "Pass backend='reference' to silence this warning" in text
    assert warning.filename == __file__
    assert not caught(lambda: nkd_loss(STUDENT, TEACHER, TARGET))
    assert not caught(lambda: kd_loss(STUDENT, TEACHER, TARGET)), "one in a process, not one for each loss"


@pytest.mark.parametrize("backend", ("reference", "native"))
def test_no_warning_where_the_backend_is_named(without_core, backend):
    def call():
        try:
            nkd_loss(STUDENT, TEACHER, TARGET, backend=backend)
        except RuntimeError:
            assert backend == "native"

    assert not caught(call)


def test_asking_is_no_use_and_spends_no_warning(without_core):
    assert not caught(lambda: fused_kd.explain(STUDENT))
    assert len(caught(lambda: nkd_loss(STUDENT, TEACHER, TARGET))) == 1


def test_no_warning_where_there_is_no_kernel_to_be_had(without_core):
    meta = [tensor.to("meta") for tensor in (STUDENT, TEACHER, TARGET)]
    assert not caught(lambda: nkd_loss(*meta))


def test_no_warning_with_the_core():
    assert not caught(lambda: uskd_loss(STUDENT, TEACHER, TARGET))


@pytest.mark.parametrize("loss", ("js", "dist"))
def test_no_warning_where_a_top_k_teacher_is_made_dense(loss):
    """Nor a break of the graph."""
    torch._dynamo.reset()
    function, options = getattr(fused_kd, f"{loss}_loss"), {"gamma": 0.0} if loss == "dist" else {}
    kept, indices = TEACHER.log_softmax(1).topk(3)
    leaf = STUDENT.clone().requires_grad_()

    def run(call, backend):
        value = call(leaf, fused_kd.TopK(kept, indices, "uniform"), TARGET, backend=backend, **options)
        return value.detach(), *torch.autograd.grad(value, leaf)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert not caught(lambda: run(compiled, "auto")) and not caught(lambda: run(function, "auto"))
    for found, expected in zip(run(compiled, "auto"), run(function, "reference"), strict=True):
        torch.testing.assert_close(found, expected)


def test_in_one_graph_of_torch_compile(without_core):
    criterion = torch.compile(NKDLoss(), backend="eager", fullgraph=True)
    warned = caught(lambda: criterion(STUDENT, TEACHER, TARGET))
    assert len(warned) == 1
    torch.testing.assert_close(criterion(STUDENT, TEACHER, TARGET), nkd_loss(STUDENT, TEACHER, TARGET))
