"""Sources beside other arguments: their layout, rows that do not count, and values that cannot be meant."""

import pytest
import torch

import fused_kd
from fused_kd import Head, TopK

BACKENDS = ("auto", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_has_the_students_layout_beside_a_source(backend):
    """Of student's logits with class_dim=1, the target has its classes there, too, if it has any."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 7, 5), torch.randn(7, 5)
    student, dense = torch.randn(2, 7, 7), (hidden @ weight.T).movedim(-1, 1)
    for target in (
        torch.eye(7)[torch.randperm(7)].expand(2, 7, 7).contiguous(),  # as probabilities in either layout
        torch.randn(2, 7, 7).softmax(1),
        torch.randint(7, (2, 1, 7)),
        torch.randint(7, (2, 7)),
    ):
        options = {"ce_weight": 1.0, "class_dim": 1, "backend": backend}
        torch.testing.assert_close(
            fused_kd.kd_loss(student, Head(hidden, weight), target, **options),
            fused_kd.kd_loss(student, dense, target, **options),
        )
        torch.testing.assert_close(
            fused_kd.uskd_loss(student, Head(hidden, weight), target, **options),
            fused_kd.uskd_loss(student, dense, target, **options),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("how", ["ignored", "weight"])
def test_nan_of_a_row_that_does_not_count_reaches_no_gradient(how, softcap, backend):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(4, 5), torch.randn(7, 5, requires_grad=True), torch.zeros(7, requires_grad=True)
    hidden[1] = float("nan")
    hidden.requires_grad_()
    target, row_weight = torch.tensor([1, 2, 3, 4]), torch.ones(4)
    if how == "ignored":
        target[1] = -100
    else:
        row_weight[1] = 0.0
    teacher = torch.randn(4, 7)
    student = Head(hidden, weight, bias, softcap=softcap)
    for reduction in ("mean", "none"):
        for other in (teacher, TopK(*teacher.log_softmax(1).topk(3), rest="bucket")):
            loss = fused_kd.nkd_loss(student, other, target, weight=row_weight, reduction=reduction, backend=backend)
            gradients = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
            assert loss.isfinite().all() and not gradients[0][1].any()
            assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rest", ["drop", "bucket", "uniform"])
def test_logits_are_no_log_probabilities(rest, backend):
    torch.manual_seed(0)
    student, logits, target = torch.randn(4, 20), 5 * torch.randn(4, 20), torch.arange(4)
    kept, indices = logits.topk(3)
    with pytest.raises(ValueError, match=r"teacher_logits\.log_probs: expected log-probabilities.*TopK\.from_logits"):
        fused_kd.kd_loss(student, TopK(kept, indices, rest=rest), target, backend=backend)
    # Of rows that do not count nothing is asked, and of "renormalize" the differences alone matter.
    fused_kd.kd_loss(student, TopK(kept, indices, rest=rest), torch.full((4,), -100), backend=backend)
    whole = logits.log_softmax(1).gather(1, indices)
    by_logits, by_probabilities = (
        fused_kd.kd_loss(student, TopK(given, indices, rest="renormalize"), target, backend=backend)
        for given in (kept, whole)
    )
    torch.testing.assert_close(by_logits, by_probabilities)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # all of a flat row, rounded
        flat = torch.zeros(1, 20).log_softmax(1).to(dtype)
        fused_kd.kd_loss(student[:1], TopK(flat, torch.arange(20)[None], rest=rest), target[:1], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["nkd", "kd", "dkd", "wsld", "js"])
def test_pads_alone_cannot_be_renormalised(loss, backend):
    student, target = torch.randn(2, 7), torch.tensor([1, 2])
    kept = TopK(torch.zeros(2, 2), torch.tensor([[0, -1], [-1, -1]]), rest="renormalize")
    function = getattr(fused_kd, f"{loss}_loss")
    with pytest.raises(
        ValueError, match="expected a class in each row with rest='renormalize', got pads alone in row 1"
    ):
        function(student, kept, target, backend=backend)
    function(student, kept, torch.tensor([1, -100]), backend=backend)


@pytest.mark.parametrize("loss", ["nkd", "kd", "dkd", "wsld", "js"])
def test_pads_alone_are_a_nan_row_where_values_cannot_be_read(loss):
    """As Triton's kernels have it: tests/backends/triton/test_triton_topk.py."""
    student, target = torch.randn(3, 7, requires_grad=True), torch.tensor([1, 2, -100])
    kept = torch.zeros(3, 2), torch.tensor([[0, -1], [-1, -1], [-1, -1]])

    def rows(student, log_probs, indices, target):
        teacher = TopK(log_probs, indices, rest="renormalize")
        return getattr(fused_kd, f"{loss}_loss")(student, teacher, target, reduction="none", backend="reference")

    value = torch.compile(rows, fullgraph=True, backend="aot_eager")(student, *kept, target)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(dim=1).tolist() == [False, True, False] and not gradient[[0, 2]].isnan().any()


def test_nothing_to_make_rows_of():
    """PyTorch's own words were of a reshape."""
    student, target, kept = (
        torch.randn(4, 9),
        torch.arange(4),
        TopK(torch.zeros(4, 1), torch.zeros(4, 1).long(), "drop"),
    )
    head, no_classes = Head(torch.randn(4, 5), torch.randn(9, 5)), student[:, :0]
    for call, words in (
        (lambda: fused_kd.nkd_loss(no_classes, kept, target), "student_logits: expected at least 2 classes"),
        (lambda: fused_kd.nkd_loss(no_classes, head, target), "student_logits: expected at least 2 classes"),
        (lambda: fused_kd.nkd_loss(head, no_classes, target), "teacher_logits: expected the shape of student_logits"),
        (lambda: fused_kd.uskd_loss(no_classes, head, target), "weak_logits: expected the shape and device of student"),
        (
            lambda: fused_kd.kd_loss(Head(torch.randn(4, 0), torch.randn(9, 0)), student),
            r"student_logits: expected a Head .* D at least 1, got \(4, 0\) and \(9, 0\)",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_kept_logits_are_checked():
    logits, indices = torch.randn(4, 9).topk(3)
    for wrong, error, words in (
        ((logits.tolist(), indices), TypeError, "logits: expected a Tensor, got list"),
        ((indices, logits), TypeError, "logits: expected float64, .* got torch.int64"),
        ((logits, indices.tolist()), TypeError, "indices: expected a Tensor of integers, got list"),
        ((logits, indices[:, :2]), ValueError, r"indices: expected the shape of logits, \(4, 3\), got \(4, 2\)"),
    ):
        with pytest.raises(error, match=f"^{words}"):
            TopK.from_logits(*wrong)


@pytest.mark.parametrize("given", (None, 1, [1.0], torch.nn.Linear(2, 2)), ids=repr)
def test_explain_says_what_it_cannot_explain(given):
    with pytest.raises(TypeError, match=r"^student_logits: expected a Tensor, a Head, a ClassShard or a device, got "):
        fused_kd.explain(given)
    if given is not None:
        with pytest.raises(
            TypeError, match=r"^teacher_logits: expected a Tensor, a Head, a ClassShard, a TopK or None, got "
        ):
            fused_kd.explain(torch.randn(2, 3), "kd", given)
    with pytest.raises(ValueError, match=r"^loss: expected one of 'nkd', .*, got "):
        fused_kd.explain(torch.randn(2, 3), given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_class_is_none(backend):
    kept = TopK(torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.int64), rest="bucket")
    with pytest.raises(ValueError, match="student_logits: expected at least 2 classes"):
        fused_kd.kd_loss(torch.randn(4, 1), kept, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["nkd", "kd", "dkd", "wsld", "js"])
def test_kept_classes_of_no_probability_make_their_row_nan(loss, backend):
    """Loss and gradient alike, and no other row's."""
    student, target = torch.randn(2, 7, requires_grad=True), torch.tensor([1, 2])
    kept = TopK(torch.tensor([[-0.5, -2.0], [-torch.inf, -torch.inf]]), torch.tensor([[0, 1], [2, 3]]), "renormalize")
    value = getattr(fused_kd, f"{loss}_loss")(student, kept, target, reduction="none", backend=backend)
    value.sum().backward()
    assert value[0].isfinite() and student.grad[0].isfinite().all()
    assert value[1].isnan() and student.grad[1].isnan().all()


def test_kept_classes_that_require_grad():
    log_probs, indices = torch.randn(4, 7).log_softmax(1).topk(3)
    with pytest.raises(ValueError, match=r"expected a source whose tensors do not require grad.*; detach them"):
        fused_kd.kd_loss(torch.randn(4, 7), TopK(log_probs.requires_grad_(), indices, "drop"))
