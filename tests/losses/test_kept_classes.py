"""A top-k teacher, through the public functions; what its losses are is tested with the
reference and the backends."""

import dataclasses
import warnings

import pytest
import torch
from torch.nn import functional as F

import fused_kd
from fused_kd import ClassShard, Head, TopK
from fused_kd.backends import _warned, topk
from fused_kd.backends.sources import CHUNK_BYTES
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES
from fused_kd.losses._topk import kernel_or_reference

ROWS, CLASSES, KEPT = 6, 211, 9
CASES = [(name, rest) for name, loss in ROW_LOSSES.items() for rest in loss.rests]
#: Without a kernel of kept classes; the teacher is made dense.
DENSE = [("js", "uniform"), ("dist", "renormalize"), ("dist", "uniform")]
OPTIONS = {"temperature": 2.0, "ce_weight": 0.4}


def function(loss):
    return getattr(fused_kd, LOSSES[loss].function)


def options_of(loss):
    return OPTIONS | ({"gamma": 0.0} if loss == "dist" else {})


def make(dtype=torch.float64, rows=(ROWS,), classes=CLASSES):
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(*rows, 8, generator=generator).to(dtype)
    weight = torch.randn(classes, 8, generator=generator).to(dtype)
    teacher = (torch.randn(*rows, classes, generator=generator) * 3).to(dtype)
    log_probs, indices = teacher.log_softmax(-1).topk(KEPT)
    shuffled = torch.randperm(KEPT, generator=generator)
    target = torch.randint(classes, rows, generator=generator)
    target.view(-1)[0] = indices.view(-1, KEPT)[0, 2]
    target.view(-1)[1] = -100
    return hidden, weight, teacher, (log_probs[..., shuffled], indices[..., shuffled]), target


@pytest.mark.parametrize(("loss", "rest"), CASES + DENSE)
def test_logits_and_heads(loss, rest):
    """By the kernels, of logits and of a head in chunks, as by the reference, weights and all."""
    hidden, weight, _, kept, target = make()
    teacher, row_weight = TopK(*kept, rest=rest), torch.rand(ROWS, dtype=torch.float64)
    for reduction, weights in (("mean", None), ("sum", row_weight), ("none", row_weight), ("none", None)):
        incoming = torch.linspace(-1, 2, ROWS, dtype=torch.float64) if reduction == "none" else 2.0
        results = []
        for backend, head in (("reference", False), ("native", False), ("native", True), ("reference", True)):
            of = [each.clone().requires_grad_() for each in (hidden, weight)]
            student = Head(*of, chunk_rows=4) if head else of[0] @ of[1].T
            options = {"reduction": reduction, "weight": weights, "return_parts": True, **options_of(loss)}
            value, parts = function(loss)(student, teacher, target, backend=backend, **options)
            results.append((value.detach(), *parts, *torch.autograd.grad((value * incoming).sum(), of)))
        for found in results[1:]:
            torch.testing.assert_close(found, results[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize(("loss", "rest"), CASES + DENSE)
def test_probability_targets(loss, rest, backend):
    """Mixed labels, one of whose classes may be kept: of logits and of a head in chunks, as by the reference."""
    if backend == "triton":
        pytest.importorskip("triton")
    if backend == "triton" and rest in ("renormalize", "uniform") and loss not in ("js", "dist"):
        backend = "auto"
    hidden, weight, _, kept, target = make()
    labels = 0.7 * F.one_hot(target.clamp(min=0), CLASSES).double() + 0.3 * F.one_hot(kept[1][:, 0], CLASSES)
    teacher, row_weight = TopK(*kept, rest=rest), torch.rand(ROWS, dtype=torch.float64)
    options = options_of(loss)
    for reduction, weights in (("mean", None), ("sum", row_weight), ("none", None)):
        incoming = torch.linspace(-1, 2, ROWS, dtype=torch.float64) if reduction == "none" else 2.0
        results = []
        for by, head in (("reference", False), (backend, False), (backend, True)):
            of = [each.clone().requires_grad_() for each in (hidden, weight)]
            student = Head(*of, chunk_rows=4) if head else of[0] @ of[1].T
            more = {"reduction": reduction, "weight": weights, "return_parts": True, **options}
            with warnings.catch_warnings():
                warnings.simplefilter("error" if by == "native" else "ignore")
                value, parts = function(loss)(student, teacher, labels, backend=by, **more)
            results.append((value.detach(), *parts, *torch.autograd.grad((value * incoming).sum(), of)))
        for found in results[1:]:
            torch.testing.assert_close(found, results[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("loss", "rest"), [("nkd", "bucket"), ("kd", "drop"), ("js", "renormalize")])
def test_half_precision(loss, rest, dtype):
    hidden, weight, _, kept, target = make(dtype)
    student = F.linear(hidden, weight).requires_grad_()
    wide = student.detach().double().requires_grad_()
    found, expected = (
        torch.autograd.grad(function(loss)(each, TopK(*kept, rest=rest), target, **OPTIONS) * 3, each)[0]
        for each in (student, wide)
    )
    assert found.dtype == dtype
    assert (found - expected).norm() <= (2 * torch.finfo(dtype).eps + 1e-5) * expected.norm()


def test_all_classes_are_the_dense_teacher():
    hidden, weight, teacher, _, target = make()
    student = hidden @ weight.T
    log_probs, indices = teacher.log_softmax(-1).topk(CLASSES)
    for loss, rest in CASES:
        expected = function(loss)(student, teacher, target, **OPTIONS)
        torch.testing.assert_close(
            function(loss)(student, TopK(log_probs, indices, rest=rest), target, **OPTIONS), expected
        )


def test_dimensions_pads_and_kept_logits():
    hidden, weight, teacher, (log_probs, indices), target = make(rows=(2, 3))
    student = (hidden @ weight.T).requires_grad_()
    padded = TopK(F.pad(log_probs, (0, 2), value=torch.nan), F.pad(indices, (0, 2), value=-1).int(), rest="bucket")
    plain = TopK(log_probs, indices, "bucket")
    for target_ in (target, target[..., None]):
        torch.testing.assert_close(
            fused_kd.nkd_loss(student, padded, target_, reduction="none"),
            fused_kd.nkd_loss(student, plain, target, reduction="none"),
        )
    kept = teacher.gather(-1, indices)
    of_logits = TopK.from_logits(F.pad(kept, (0, 1)), F.pad(indices, (0, 1), value=-1))
    softmax = TopK(kept.log_softmax(-1), indices, "renormalize")
    torch.testing.assert_close(fused_kd.kd_loss(student, of_logits), fused_kd.kd_loss(student, softmax))
    module = fused_kd.NKDLoss(temperature=2.0)
    torch.testing.assert_close(
        module(student, plain, target, normalizer=10), fused_kd.nkd_loss(student, plain, target, temperature=2.0) * 0.5
    )


def test_padding_of_the_student():
    hidden, weight, _, kept, target = make()
    student = (hidden @ weight.T).requires_grad_()
    expected = fused_kd.kd_loss(student, TopK(*kept, rest="uniform"), target)
    (gradient,) = torch.autograd.grad(expected, student)
    wide = torch.cat([student.detach(), torch.full((ROWS, 5), 7.0)], 1).requires_grad_()
    found = fused_kd.kd_loss(wide, TopK(*kept, rest="uniform"), target, num_classes=CLASSES)
    torch.testing.assert_close(found, expected)
    (of_wide,) = torch.autograd.grad(found, wide)
    torch.testing.assert_close(of_wide[:, :CLASSES], gradient)
    assert not of_wide[:, CLASSES:].any()


@pytest.mark.parametrize(("loss", "rest"), DENSE)
def test_rows_are_made_dense_by_chunks(loss, rest, monkeypatch):
    """The teacher's, where there is no kernel of kept classes: in few rows at a time, and without a warning."""
    hidden, weight, _, kept, target = make()
    student, teacher = (hidden @ weight.T).requires_grad_(), TopK(*kept, rest=rest)
    made, logits = [], topk.DenseRows.logits

    def counted(self, rows):
        made.append(rows.stop - rows.start)
        return logits(self, rows)

    monkeypatch.setattr(topk.DenseRows, "logits", counted)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * CLASSES * 8)  # logits and gradient of two rows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = function(loss)(student, teacher, target, **options_of(loss))
    exact = function(loss)(student, teacher, target, backend="reference", **options_of(loss))
    torch.testing.assert_close(torch.autograd.grad(value, student), torch.autograd.grad(exact, student))
    torch.testing.assert_close(value, exact)
    assert made == [2, 2, 2]


def test_what_has_no_kernel_says_so_once():
    _warned.clear()
    given = ("nkd", "bucket", {}, ("auto", "native"), True)
    words = "NKD with a TopK of rest='bucket' and probability targets of sharded classes with the eager reference"
    with pytest.warns(RuntimeWarning, match=words) as seen:
        assert kernel_or_reference(*given) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_or_reference(*given) == "reference"
        assert kernel_or_reference("nkd", "uniform", {}, ("auto", "native"), True) == "native"
    assert len(seen) == 1 and seen[0].filename == __file__
    with pytest.raises(RuntimeError, match="backend 'native' cannot run NKD with a TopK of rest='bucket'"):
        kernel_or_reference("nkd", "bucket", {}, ("native", "native"), True)


@pytest.mark.parametrize("rest", ["drop", "bucket"])
def test_a_loss_without_a_kernel_of_kept_classes_runs_through_the_reference(rest, monkeypatch):
    hidden, weight, _, kept, target = make(torch.float32)
    student, teacher = hidden @ weight.T, TopK(*kept, rest=rest)
    expected = fused_kd.kd_loss(student, teacher, target, backend="reference")
    monkeypatch.setitem(ROW_LOSSES, "kd", dataclasses.replace(ROW_LOSSES["kd"], rests=("renormalize",)))
    _warned.clear()
    with pytest.warns(RuntimeWarning, match=f"KD with a TopK of rest='{rest}' with the eager reference"):
        assert torch.equal(fused_kd.kd_loss(student, teacher, target), expected)
    with pytest.raises(RuntimeError, match=f"cannot run KD with a TopK of rest='{rest}': no kernel"):
        fused_kd.kd_loss(student, teacher, target, backend="native")


def test_compiled_in_one_graph():
    hidden, weight, _, kept, target = make(torch.float32)
    of = [each.requires_grad_() for each in (hidden, weight)]
    for head in (False, True):

        def step(hidden, weight, log_probs, indices, head=head):
            student = Head(hidden, weight) if head else hidden @ weight.T
            return fused_kd.nkd_loss(student, TopK(log_probs, indices, rest="bucket"), target) * 2

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*of, *kept), of)
        torch.testing.assert_close(found, torch.autograd.grad(step(*of, *kept), of))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_messages(backend):
    hidden, weight, _, (log_probs, indices), target = make()
    student = hidden @ weight.T

    def wrong(log_probs, indices, words, error=ValueError, rest="drop", target=target, loss="nkd", **options):
        with pytest.raises(error, match=words):
            function(loss)(student, TopK(log_probs, indices, rest=rest), target, backend=backend, **options)

    twice, far, low = (indices.clone() for _ in range(3))
    twice[2, 1], far[3, 0], low[4, 0] = twice[2, 0], CLASSES, -2
    wrong(log_probs, twice, "indices: expected each class once in a row, got .* twice in row 2")
    wrong(log_probs, twice, "indices: .* twice in row 2", loss="js", rest="uniform")
    wrong(log_probs, far, "indices: expected .*211", IndexError)
    wrong(log_probs, low, "indices: expected .*-2", IndexError)
    for broken, words in ((twice, "twice in row 2"), (low, "got -2 in row 4")):
        with pytest.raises((IndexError, ValueError), match=words):  # a row of the whole input, not of its chunk
            fused_kd.nkd_loss(
                Head(hidden, weight, chunk_rows=1), TopK(log_probs, broken, "drop"), target, backend=backend
            )
    wrong(log_probs, indices, "teacher_logits.rest: expected one of .* got 'all'", rest="all")
    wrong(log_probs, indices.double(), "teacher_logits.indices: expected a Tensor of integers", TypeError)
    wrong(log_probs.long(), indices, "teacher_logits.log_probs: expected float64", TypeError)
    wrong(log_probs[:, :3], indices, r"teacher_logits.indices: expected the shape and device of log_probs, \(6, 3\)")
    wrong(log_probs[:3], indices[:3], r"teacher_logits.log_probs: expected shape \(6, k\)")
    wrong(log_probs.requires_grad_(), indices, "teacher_logits: expected a source whose tensors do not require grad")
    log_probs.requires_grad_(False)
    wrong(log_probs, indices, "logit_standardization: expected False with a TopK", logit_standardization=True)
    wrong(log_probs, indices, "target: expected class probabilities that sum to 1", target=student.softmax(1) * 2)
    wrong(log_probs, indices, "gamma: expected 0 for DIST", loss="dist")
    wrong(log_probs, indices, "rest: 'drop' is not defined for js_loss", NotImplementedError, loss="js")
    with pytest.raises(TypeError, match="student_logits: expected a Tensor"):
        fused_kd.kd_loss(TopK(log_probs, indices, rest="drop"), student, backend=backend)
    target[0] = CLASSES
    wrong(log_probs, indices, "target: expected class indices from 0 to 210", IndexError)
    # A row that does not count may hold what it likes.
    target[0] = -100
    twice[2, 1] = indices[2, 1]
    twice[0, 1] = twice[0, 0]
    fused_kd.nkd_loss(student, TopK(log_probs, twice, rest="drop"), target, backend=backend)


def test_explain_says_what_runs_for_a_source():
    hidden, weight, _, kept, _ = make()
    text = str(fused_kd.explain(Head(hidden, weight), "nkd", TopK(*kept, rest="bucket")))
    assert "auto takes 'native'" in text and "student: logits by products, a chunk of rows at a time" in text
    assert "teacher: only the kept classes are read" in text
    explanation = fused_kd.explain(hidden, "js", TopK(*kept, rest="uniform"))
    assert explanation.chosen == "native"
    assert explanation.how == ("teacher: made dense, a chunk of rows at a time",)
    eager = ("the reference computes the logits of all rows at once",)
    assert fused_kd.explain(Head(hidden.to("meta"), weight.to("meta")), "nkd").how == eager
    for loss, *sources in (
        ("zipf_ls", Head(hidden, weight)),
        ("uskd", ClassShard(hidden, 0, 16)),
        ("uskd", Head(hidden, weight), TopK(*kept, rest="bucket")),
    ):
        with pytest.raises(ValueError, match=f"loss: .* does not take a {type(sources[-1]).__name__}"):
            fused_kd.explain(sources[0], loss, *sources[1:])
    with pytest.raises(NotImplementedError, match="is not defined for js_loss"):
        fused_kd.explain(hidden, "js", TopK(*kept, rest="drop"))
    beside = fused_kd.explain(ClassShard(hidden, 0, 16), "nkd", TopK(*kept, rest="bucket"))
    assert beside.chosen == "native" and len(beside.how) == 2
