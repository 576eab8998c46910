"""A last layer that is not applied yet, in place of logits, of every row loss."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fused_kd
from fused_kd import Head, sources
from fused_kd.backends import heads, native
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES
from fused_kd.core.options import HyperParameters, Options

ROWS, CLASSES, WIDTH, OTHER = 7, 301, 12, 5
#: DIST's term of the batch's columns needs all rows.
OPTIONS = {"dist": {"gamma": 0.0}, "js": {"beta": 0.3}}
pytestmark = pytest.mark.usefixtures("exact_products")  # test_rounded_heads.py has the others


def function(loss):
    return getattr(fused_kd, LOSSES[loss].function)


def tensors(dtype=torch.float64, rows=(ROWS,), seed=0):
    """Hidden states, weight and bias of a student and a teacher, and a target."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for width in (WIDTH, OTHER):
        made += [torch.randn(*rows, width, generator=generator, dtype=torch.float64)]
        made += [torch.randn(CLASSES, width, generator=generator, dtype=torch.float64) / width**0.5 * 2]
        made += [torch.randn(CLASSES, generator=generator, dtype=torch.float64)]
    target = torch.randint(CLASSES, rows, generator=generator)
    target.view(-1)[1:2] = -100
    return [each.to(dtype) for each in made], target


def logits(hidden, weight, bias, softcap=None, logit_scale=1.0):
    """The specification: in float64 unless autograd is to be that of a half type."""
    z = (hidden @ weight.T + (0 if bias is None else bias)) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def compare(loss, dtype, backend, head=None, teacher=None, biased=True, incoming=1.0, **options):
    """The gradients of a head's tensors, and those of float64 logits with autograd's own products."""
    (hidden, weight, bias, *of_teacher), target = tensors(dtype)
    options = OPTIONS.get(loss, {}) | options
    head, teacher = head or {}, teacher or {}
    results = []
    for wide in (False, True):
        of = [each.double() if wide else each.clone() for each in (hidden, weight, bias)[: 2 + biased]]
        of = [each.requires_grad_() for each in of]
        others = [each.double() if wide else each for each in of_teacher]
        if wide:
            given = logits(*of, *(() if biased else (None,)), **{k: v for k, v in head.items() if k != "chunk_rows"})
            other = logits(*others, **teacher)
        else:
            given, other = Head(*of, **head), Head(*others, **teacher)
        both = (given,) if loss == "tf_kd" else (given, other)
        value = function(loss)(*both, target, backend="reference" if wide else backend, ce_weight=0.3, **options)
        gradients = torch.autograd.grad((value * incoming).sum(), of)
        results.append((value.detach().double(), *(each.double() for each in gradients)))
    return results


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_values_and_gradients(loss, reduction, backend):
    """In float64, row by row too, of chunks of which the last is short, with scale and softcap."""
    head = {"chunk_rows": 3, "softcap": 4.0, "logit_scale": 1.2}
    incoming = torch.linspace(-1, 2, ROWS, dtype=torch.float64) if reduction == "none" else 2.5
    found, expected = compare(
        loss, torch.float64, backend, head, {"softcap": 9.0}, incoming=incoming, reduction=reduction
    )
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_half_precision(loss, dtype):
    """Products accumulate in float32, and logits are not rounded: what is left is the rounding of the gradients."""
    found, expected = compare(loss, dtype, "native", {"chunk_rows": 2}, incoming=2.0, temperature=2.0)
    rounding = torch.finfo(dtype).eps
    assert abs(found[0] - expected[0]) <= 2e-5 * abs(expected[0])
    for each, wanted in zip(found[1:], expected[1:], strict=True):
        assert (each - wanted).norm() <= (rounding + 1e-4) * wanted.norm()


@pytest.mark.parametrize("chunk_rows", [1, 2, 7, 100, None])
def test_chunks_change_nothing(chunk_rows):
    found, expected = compare("nkd", torch.float64, "native", {"chunk_rows": chunk_rows}, biased=False)
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, wanted, rtol=1e-10, atol=1e-12)


def test_a_budget_makes_chunks(monkeypatch):
    monkeypatch.setitem(sources.CHUNK_BYTES, "cpu", 8 * 2 * CLASSES * 2)
    seen = []
    inner = native.row_loss
    monkeypatch.setattr(native, "row_loss", lambda student, *rest: seen.append(len(student)) or inner(student, *rest))
    compare("kd", torch.float64, "native")
    assert seen == [2, 2, 2, 1]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_alone(wanted, reduction):
    """Frozen and not: what does not require a gradient gets none, and the others the same."""
    (*of, a, b, c), target = tensors()
    results = []
    for frozen in (False, True):
        given = [each.clone().requires_grad_(not frozen or at in wanted) for at, each in enumerate(of)]
        fused_kd.nkd_loss(Head(*given), Head(a, b, c), target, reduction=reduction).sum().backward()
        results.append([each.grad for each in given])
    for at, (every, alone) in enumerate(zip(*results, strict=True)):
        assert alone is None if at not in wanted else torch.allclose(alone, every, rtol=1e-12)


def test_one_head_and_one_matrix():
    (hidden, weight, bias, *of_teacher), target = tensors()
    head, matrix = Head(hidden.requires_grad_(), weight, bias), logits(*of_teacher)
    expected = fused_kd.kd_loss(logits(hidden, weight, bias), matrix, target)
    torch.testing.assert_close(fused_kd.kd_loss(head, matrix, target), expected)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(fused_kd.kd_loss(x, matrix, target), hidden)[0]
            for x in (head, logits(hidden, weight, bias))
        )
    )
    student = logits(hidden, weight, bias).detach()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = student.to(dtype).requires_grad_()
        teacher = Head(*(each.to(torch.float32 if dtype != torch.float64 else dtype) for each in of_teacher))
        found, wanted = (
            torch.autograd.grad(fused_kd.kd_loss(x, other, target) * 3, x)[0]
            for other in (teacher, logits(*of_teacher).to(torch.float32 if dtype != torch.float64 else dtype))
        )
        torch.testing.assert_close(found, wanted)


def test_dimensions_and_probabilities():
    (hidden, weight, bias, *of_teacher), target = tensors(rows=(3, 2))
    given = (Head(hidden, weight, bias, chunk_rows=4), Head(*of_teacher))
    dense = (logits(hidden, weight, bias), logits(*of_teacher))
    mixed = torch.rand(3, 2, CLASSES, dtype=torch.float64).softmax(-1)
    weights = torch.rand(3, 2, dtype=torch.float64)
    for labels in (target, target[..., None], mixed):
        for options in ({}, {"weight": weights}, {"reduction": "none"}, {"normalizer": 9}):
            found, parts = fused_kd.nkd_loss(*given, labels, ce_weight=1.0, return_parts=True, **options)
            wanted, expected = fused_kd.nkd_loss(*dense, labels, ce_weight=1.0, return_parts=True, **options)
            torch.testing.assert_close((found, *parts), (wanted, *expected))
            assert type(parts) is type(expected)


def test_rows_that_do_not_count_and_none_at_all():
    (hidden, weight, bias, *of_teacher), target = tensors()
    hidden[2] = torch.nan
    given = [each.requires_grad_() for each in (hidden, weight, bias)]
    row_weight = torch.ones(ROWS, dtype=torch.float64)
    row_weight[2] = 0
    for options in ({"reduction": "mean"}, {"reduction": "none"}):
        loss = fused_kd.nkd_loss(Head(*given), Head(*of_teacher), target, weight=row_weight, **options)
        of_hidden, of_weight, _ = torch.autograd.grad(loss.sum(), given)
        assert loss.isfinite().all() and not of_hidden[1:3].any() and of_hidden[0].any()
        assert of_weight.isfinite().all()
    none = [hidden[:0].detach().requires_grad_(), weight, bias]
    loss = fused_kd.nkd_loss(Head(*none), Head(of_teacher[0][:0], *of_teacher[1:]), target[:0])
    loss.backward()
    assert loss == 0 and none[0].grad.shape == (0, WIDTH) and not weight.grad.any()


def test_padding_of_the_weights():
    """Student and teacher with different amounts of it: it gets no gradient, whatever it holds."""
    (hidden, weight, bias, a, b, c), target = tensors()
    target = target.clamp(max=CLASSES - 30)
    given = [each.requires_grad_() for each in (hidden, weight, bias)]
    loss = fused_kd.nkd_loss(Head(*given), Head(a, b[:-5], c[:-5]), target, num_classes=CLASSES - 20)
    found = torch.autograd.grad(loss, given)
    narrow = (hidden, weight[:-20], bias[:-20])
    expected = torch.autograd.grad(fused_kd.nkd_loss(logits(*narrow), logits(a, b[:-20], c[:-20]), target), given)
    torch.testing.assert_close(found, expected)
    assert not found[1][-20:].any()


def test_tied_weights_and_accumulation():
    """An embedding that is the last layer too, in two micro-batches."""
    (_, weight, _, *of_teacher), target = tensors()
    weight.requires_grad_()
    tokens = torch.arange(ROWS)
    for _ in range(2):
        fused_kd.kd_loss(Head(F.embedding(tokens, weight), weight), Head(*of_teacher), target, normalizer=12).backward()
    found, weight.grad = weight.grad, None
    dense = F.embedding(tokens, weight) @ weight.T
    (fused_kd.kd_loss(dense, logits(*of_teacher), target, reduction="sum") / 6).backward()
    torch.testing.assert_close(found, weight.grad)


def test_checkpointing():
    (hidden, weight, bias, *of_teacher), target = tensors()
    given = [each.requires_grad_() for each in (hidden, weight, bias)]

    def step(hidden):
        return fused_kd.nkd_loss(Head(hidden.tanh(), weight, bias), Head(*of_teacher), target)

    found = torch.autograd.grad(checkpoint(step, hidden, use_reentrant=False), given)
    torch.testing.assert_close(found, torch.autograd.grad(step(hidden), given))


def test_autocast():
    """As a linear layer under autocast, whose weights stay in float32: so do their gradients."""
    (hidden, weight, bias, *of_teacher), target = tensors(torch.float32)
    given = [each.requires_grad_() for each in (hidden, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_kd.nkd_loss(Head(*given), Head(*of_teacher), target)
    found = torch.autograd.grad(loss, given)
    expected = torch.autograd.grad(fused_kd.nkd_loss(Head(*given), Head(*of_teacher), target), given)
    for each, wanted in zip((loss, *found), (loss, *expected), strict=True):
        assert each.dtype == torch.float32
        assert (each - wanted).norm() <= 2**-7 * wanted.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction):
    """One graph, forward and backward, and a schedule of hyper-parameters compiles nothing anew."""
    (hidden, weight, bias, *of_teacher), target = tensors(torch.float32)
    given = [each.requires_grad_() for each in (hidden, weight, bias)]
    counter = CompileCounter()

    def step(hidden, weight, bias, gamma):
        head = Head(hidden * 2, weight, bias, softcap=5.0)
        return fused_kd.nkd_loss(head, Head(*of_teacher), target, gamma=gamma, reduction=reduction).sum() * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*given, 1.5), given)
    torch.testing.assert_close(found, torch.autograd.grad(step(*given, 1.5), given))
    if reduction == "none":
        return
    counted = torch.compile(step, fullgraph=True, backend=counter)
    for gamma in (1.0, 1.25, 1.5, 1.75):
        torch.testing.assert_close(counted(*given, gamma), step(*given, gamma))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_halves(dtype, monkeypatch):
    """As a GPU has them, in float32, here by a stand-in: gradients divided by many rows do not underflow."""
    inner = torch.mm

    def mm(a, b, out_dtype=None, **options):
        if out_dtype is None:
            return inner(a, b, **options)
        assert a.dtype == b.dtype == dtype and out_dtype == torch.float32
        return inner(a.float(), b.float())

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(heads, "_mixes", lambda weight, compute: True)
    for scale in (1.0, 2.0**-20):
        found, expected = compare("nkd", dtype, "native", {"chunk_rows": 3}, incoming=1.0, normalizer=7 / scale)
        for each, wanted in zip(found[1:], expected[1:], strict=True):
            of_each = torch.finfo(dtype)
            assert (each - wanted).norm() <= 4 * of_each.eps * wanted.norm() + of_each.smallest_normal
    # Beside a float64 teacher the logits are float64, which no product of halves gives; float32 states are no halves.
    (hidden, weight, bias, *of_teacher), target = tensors(dtype)
    for states, teacher in ((hidden, logits(*of_teacher).double()), (tensors(torch.float32)[0][0], Head(*of_teacher))):
        ours, exact = (
            fused_kd.nkd_loss(Head(states, weight, bias), teacher, target, backend=backend)
            for backend in ("native", "reference")
        )
        torch.testing.assert_close(ours, exact)
    weights = [each.float() for each in tensors(dtype)[0]]
    results = []
    for compute in (dtype, None):
        given = [each.clone().requires_grad_() for each in weights[:3]]
        monkeypatch.setattr(heads, "_mixes", lambda weight, of, compute=compute: compute is not None)
        with torch.autocast("cpu", dtype):
            loss = fused_kd.nkd_loss(Head(*given), Head(*weights[3:]), tensors(dtype)[1])
        results.append((loss, *torch.autograd.grad(loss, given)))
    for each, wanted in zip(*results, strict=True):
        assert each.dtype == torch.float32
        assert (each - wanted).norm() <= 4 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    (hidden, weight, bias, *_), _ = tensors()
    few = [each[..., :3].clone().requires_grad_() for each in (hidden[:4], weight[:6])]
    few.append(bias[:6].clone().requires_grad_())
    target, teacher = torch.tensor([0, 5, -100, 2]), torch.randn(4, 6, dtype=torch.float64)

    def loss(*given):
        head = Head(*given, softcap=3.0, logit_scale=0.7, chunk_rows=3)
        return fused_kd.nkd_loss(head, teacher, target, temperature=2.0, ce_weight=0.5, reduction=reduction)

    assert torch.autograd.gradcheck(loss, few)


def test_the_op_is_in_order():
    (hidden, weight, bias, *of_teacher), target = tensors(torch.float32)
    given = [each.requires_grad_(False) for each in (hidden, weight, bias)]
    op = torch.ops.fused_kd.source_loss.default
    hyper = [*[0.0] * 2, 1.5, *[0.0] * 3, 1.0, 1.0, 0.0, *[1.0, 0.0] * 2]
    arguments = (*given, None, *of_teacher, None, target, None, "nkd", hyper)
    for wanted, reduction in (([True] * 3, "mean"), ([False, True, False], "sum"), ([False] * 3, "none")):
        further = (False, -100, "", [0, CLASSES], "", 3, None, reduction, wanted, "native")
        torch.library.opcheck(op, (*arguments, *further), test_utils=("test_schema", "test_faketensor"))


def test_second_derivatives():
    (hidden, weight, bias, *of_teacher), target = tensors()
    given = [each.requires_grad_() for each in (hidden, weight, bias)]
    for reduction in ("mean", "none"):
        loss = fused_kd.kd_loss(Head(*given), Head(*of_teacher), target, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(loss, given, create_graph=True)
    small = [each[:3].detach().requires_grad_() for each in (hidden[:, :3], weight[:, :3])]
    few = logits(*of_teacher)[:3, :3]
    assert torch.autograd.gradgradcheck(
        lambda h, w: fused_kd.nkd_loss(Head(h, w), few, torch.tensor([0, 2, 1]), backend="reference"), small
    )


WRONG = [
    ({"weight": torch.randn(CLASSES, 3)}, ValueError, "student_logits: expected a Head of hidden states"),
    ({"weight": torch.randn(CLASSES)}, ValueError, "student_logits: expected a Head of hidden states"),
    ({"weight": "w"}, TypeError, "student_logits.weight: expected a Tensor, got str"),
    ({"hidden": torch.zeros(ROWS, WIDTH, dtype=torch.int64)}, TypeError, "student_logits.hidden: expected float64"),
    ({"weight": torch.randn(CLASSES, WIDTH)}, TypeError, "both float64 or neither"),
    ({"bias": torch.randn(3)}, ValueError, r"student_logits.bias: expected shape \(301,\), got \(3,\)"),
    ({"softcap": 0.0}, ValueError, "student_logits.softcap: expected a finite number above 0"),
    ({"logit_scale": -1.0}, ValueError, "student_logits.logit_scale: expected a finite number above 0"),
    ({"weight": torch.empty(CLASSES, WIDTH, device="meta")}, ValueError, "a Head on one device, got cpu and meta"),
    ({"chunk_rows": 0}, ValueError, "student_logits.chunk_rows: expected at least 1"),
    ({"chunk_rows": 1.0}, TypeError, "student_logits.chunk_rows: expected an int"),
]


@pytest.mark.parametrize(("wrong", "error", "words"), WRONG)
def test_messages(wrong, error, words):
    (hidden, weight, bias, *of_teacher), target = tensors()
    given = {"hidden": hidden, "weight": weight, "bias": bias} | wrong
    with pytest.raises(error, match=words):
        fused_kd.nkd_loss(Head(**given), Head(*of_teacher), target)


def test_messages_of_the_call():
    (hidden, weight, bias, *of_teacher), target = tensors()
    head, teacher = Head(hidden, weight, bias), Head(*of_teacher)
    with pytest.raises(ValueError, match="teacher_logits: expected a source whose tensors do not require grad"):
        fused_kd.nkd_loss(head, Head(of_teacher[0], of_teacher[1].requires_grad_()), target)
    of_teacher[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"teacher_logits: expected the shape of student_logits, \(7, 301\)"):
        fused_kd.nkd_loss(head, Head(of_teacher[0], of_teacher[1][:-1]), target)
    with pytest.raises(ValueError, match="teacher_logits: expected the device of student_logits, cpu, got meta"):
        fused_kd.nkd_loss(head, Head(*(each.to("meta") for each in of_teacher)), target)
    with pytest.raises(ValueError, match="gamma: expected 0 for DIST of a Head"):
        fused_kd.dist_loss(head, teacher, target)
    with pytest.raises(ValueError, match="class_dim: expected None with a Head"):
        fused_kd.kd_loss(head, teacher, target, class_dim=1)
    with pytest.raises(IndexError, match="target: expected class indices from 0 to 300"):
        fused_kd.kd_loss(head, teacher, target + CLASSES)
    with pytest.raises(ValueError, match=r"target: expected class indices of shape \(7,\)"):
        fused_kd.kd_loss(head, teacher, target[:3])
    with pytest.raises(TypeError, match="student_logits: expected a Tensor"):
        fused_kd.zipf_ls_loss(head, teacher, target)


@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_a_gradient_over_its_logits(loss):
    """To the bit what it is elsewhere: of rows that fit the caches, of a large matrix, and of those with -inf."""
    generator = torch.Generator().manual_seed(1)
    named = {"alpha": 0.5, "beta": 0.4, "gamma": 0.0 if loss == "dist" else 1.2, "correct": 0.9}
    hyper = HyperParameters(**named, temperature=2.0, ce_weight=0.3, label_smoothing=0.1)
    for shape in ((3, 1001), (33, 70001)):
        student, other = (torch.randn(shape, generator=generator) for _ in range(2))
        student[0, 5], student[2] = -torch.inf, 2.0
        teacher, target = None if loss == "tf_kd" else other, torch.randint(shape[1], shape[:1], generator=generator)
        factors = torch.rand(2, len(student), dtype=torch.float64, generator=generator)
        for standardize in (False, True)[: 1 + (teacher is not None)]:
            asked = Options(hyper, -100, "none", (True,), (1.0,), loss, standardize)
            expected = native.row_loss(student, teacher, target, factors, None, asked)
            over = student.clone()
            found = native.row_loss(over, teacher, target, factors, None, asked._replace(in_place=True))
            assert found[2] is over
            for each, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(each, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("loss", ["nkd", "js"])
def test_triton(loss):
    """The same loop around its kernels, on its interpreter or as compiled code."""
    found, expected = compare(loss, torch.float32, "triton", {"chunk_rows": 4}, incoming=2.0)
    for each, wanted in zip(found, expected, strict=True):
        assert (each - wanted).norm() <= 2e-5 * wanted.norm()


def test_explain_says_that_dists_columns_need_all_rows():
    (hidden, weight, bias, *_), _ = tensors()
    assert "only with gamma=0" in str(fused_kd.explain(Head(hidden, weight, bias), "dist"))
