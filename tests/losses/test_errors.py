"""Every refusal names the argument, what was expected and what came."""

import re

import pytest
import torch

import fused_kd
from fused_kd import Head, TopK, nkd_loss
from fused_kd.core.catalogue import LOSSES

S, T, Y = torch.randn(4, 10), torch.randn(4, 10), torch.tensor([0, 1, 2, 9])

REFUSALS = [
    ((S, T[:, :9], Y), {}, ValueError, r"teacher_logits: .* got \(4, 9\); if the last .* a slice or num_classes$"),
    (
        (S, Head(S, torch.ones(12, 10)), Y),
        {},
        ValueError,
        r"teacher_logits: .* got a source of \(4, 12\); if the last .* a slice or num_classes$",
    ),
    ((S, T[:3], Y), {}, ValueError, r"teacher_logits: expected the shape of student_logits, \(4, 10\), got \(3, 10\)$"),
    ((S, T, Y[:3]), {}, ValueError, r"target: expected class indices of shape \(4,\).* got \(3,\)"),
    ((S, T, Y.float()), {}, ValueError, r"target: expected class probabilities of shape \(4, 10\), got torch.float32"),
    ((S, T, Y.bool()), {}, TypeError, "target: expected integer class indices or floating-point .* got torch.bool"),
    ((S, T, T > 0), {}, TypeError, r"target: expected .* got torch.bool; .* must be floating point: target.float\(\)$"),
    ((S.long(), T, Y), {}, TypeError, "student_logits: expected float64, float32, float16 or bfloat16 .* torch.int64"),
    ((S, T.long(), Y), {}, TypeError, "teacher_logits: expected float64, float32, float16 or bfloat16 .* torch.int64"),
    ((S.tolist(), T, Y), {}, TypeError, "student_logits: expected a Tensor, got list"),
    ((S, T, [0, 1, 2, 3]), {}, TypeError, "target: expected a Tensor, got list"),
    ((torch.tensor(1.0), T, Y), {}, ValueError, r"student_logits: expected logits of shape \(..., C\), got a scalar"),
    ((S[:, :1], T[:, :1], Y * 0), {}, ValueError, r"student_logits: expected at least 2 classes .* got shape \(4, 1\)"),
    ((S, T.clone().requires_grad_(), Y), {}, ValueError, "teacher_logits: .* are the two swapped[?] Run the .*detach"),
    (
        (S.clone().requires_grad_(), T.clone().requires_grad_(), Y),
        {},
        ValueError,
        "teacher_logits: .* do not require grad.* got some that do[.] Run the teacher .*detach",
    ),
    (
        (S, T / torch.tensor(2.0, requires_grad=True), Y),
        {},
        ValueError,
        "teacher_logits: expected logits that do not require grad, since no backend .* such as a temperature that is a "
        "parameter, do not detach, .*: write that loss in PyTorch$",
    ),
    (
        (S, T, Y),
        {"temperature": torch.nn.Parameter(torch.tensor(2.0))},
        TypeError,
        "temperature: expected a Python number, got a Tensor.* no gradient flows to it",
    ),
    ((S, T, T.softmax(1).requires_grad_()), {}, ValueError, "target: expected probabilities that do not require grad"),
    ((S, T.to("meta"), Y), {}, ValueError, "teacher_logits: expected the device of student_logits, cpu, got meta"),
    ((S, T, Y), {"weight": torch.ones(len(Y), device="meta")}, ValueError, "weight: expected the device of student"),
    ((S, T, Y.to("meta")), {}, ValueError, "target: expected the device of student_logits, cpu, got meta"),
    ((S, T, Y), {"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, got 0.0"),
    ((S, T, Y), {"temperature": float("nan")}, ValueError, "temperature: expected a finite number above 0, got nan"),
    ((S, T, Y), {"gamma": -1.0}, ValueError, "gamma: expected a finite number of at least 0, got -1.0"),
    ((S, T, Y), {"ce_weight": float("inf")}, ValueError, "ce_weight: expected a finite number of at least 0, got inf"),
    ((S, T, Y), {"gamma": "1.5"}, TypeError, "gamma: expected a number, got str"),
    ((S, T, Y), {"gamma": torch.tensor(1.5)}, TypeError, "gamma: expected a Python number, got a Tensor; .*item"),
    ((S, T, Y), {"gamma": torch.ones(4)}, TypeError, r"gamma: expected a Python number, got a Tensor of shape \(4,\)$"),
    (
        (S, T, Y),
        {"reduction": "batchmean"},
        ValueError,
        "reduction: expected one of 'mean', 'sum', 'none', got 'batchm",
    ),
    ((S, T, Y), {"ignore_index": 1.5}, TypeError, "ignore_index: expected an int, got float"),
    ((S, T, Y), {"backend": "cuda"}, ValueError, "backend: expected 'auto' or one of 'native', .* got 'cuda'"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), REFUSALS, ids=[r[3][:40] for r in REFUSALS])
def test_refusals(arguments, options, error, message):
    with pytest.raises(error, match=message):
        nkd_loss(*arguments, **options)


def test_arguments_in_the_wrong_place():
    frozen, learning = Head(S, torch.eye(10)), Head(S, torch.eye(10, requires_grad=True))
    with pytest.raises(ValueError, match=r"detach them[.] The tensors of student_logits .* the two swapped[?]$"):
        nkd_loss(frozen, learning, Y)
    with pytest.raises(ValueError, match=r"detach them$"):
        nkd_loss(learning, learning, Y)
    with pytest.raises(TypeError, match=r"gamma: expected a Python number, got a Tensor of shape \(4, 10\)$"):
        fused_kd.NKDLoss(S, T, Y)
    with pytest.raises(ValueError, match=r"loss: expected one of 'nkd', .*, got Tensor$"):
        fused_kd.explain(S, T)


KINDS = {
    "sparse": (torch.Tensor.to_sparse, "of layout torch.strided, got torch.sparse_coo; pass its to_dense()"),
    "csr": (torch.Tensor.to_sparse_csr, "of layout torch.strided, got torch.sparse_csr; pass its to_dense()"),
    "mkldnn": (torch.Tensor.to_mkldnn, "of layout torch.strided, got torch._mkldnn; pass its to_dense()"),
    "nested": (lambda x: torch.nested.nested_tensor([*x]), "got a nested one; pad it"),
    "jagged": (lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged), "got a nested one; pad it"),
}


@pytest.mark.filterwarnings("ignore:.*(beta state|prototype stage):UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", (*(loss.function for loss in LOSSES.values()), "decompose", "uskd_soft_labels"))
def test_tensors_without_strides(name, kind):
    """PyTorch has its own words for them, which name no argument."""
    made, words = KINDS[kind]
    function = getattr(fused_kd, name)
    options = {"gamma": 0.0} if name == "dist_loss" else {}
    tensors = {"student_logits": S, "target": T.softmax(1)}
    if name != "tf_kd_loss":
        other = {"uskd": "weak_logits", "zipf": "dense_logits"}.get(name.split("_")[0], "teacher_logits")
        tensors[other] = torch.stack([T, T], 1) if other == "dense_logits" else T
    if name not in ("decompose", "uskd_soft_labels"):
        tensors["weight"] = torch.ones(4)
    for argument, given in tensors.items():
        if given.dim() != 2 and kind in ("csr", "nested", "jagged", "mkldnn"):
            continue
        with pytest.raises(TypeError, match=rf"^{argument}: expected a Tensor.*{re.escape(words)}"):
            function(**tensors | {argument: made(given)}, **options)


def test_sources_without_strides():
    kept, indices = T.log_softmax(1).topk(3)
    for source, words in (
        (TopK(kept.to_sparse(), indices, "bucket"), "teacher_logits.log_probs: expected a Tensor of layout"),
        (TopK(kept, indices.to_sparse(), "bucket"), "teacher_logits.indices: expected a Tensor of integers of layout"),
        (Head(S.to_sparse(), torch.randn(10, 10)), "teacher_logits.hidden: expected a Tensor of layout"),
        (Head(S, torch.eye(10).to_sparse()), "teacher_logits.weight: expected a Tensor of layout"),
    ):
        with pytest.raises(TypeError, match=words):
            nkd_loss(S, source, Y)
    with pytest.raises(TypeError, match="feature: expected a Tensor of layout"):
        fused_kd.USKDLoss(3, 10)(S, torch.randn(4, 3).to_sparse(), Y)


@pytest.mark.parametrize("bad", (-1, 10, 2**40, -(2**40)))
def test_target_out_of_range(backend, bad):
    name, device = backend
    target = Y.clone()
    target[2] = bad
    student = S.to(device).requires_grad_()
    if device == "cpu" and name != "triton":
        message = f"target: expected class indices from 0 to 9, or ignore_index -100, got {bad}"
        with pytest.raises(IndexError, match=message):
            nkd_loss(student, T, target, backend=name)
        return
    loss = nkd_loss(student, T.to(device), target.to(device), backend=name, reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, False, True, False]
    assert student.grad[2].isnan().all()
    assert student.grad[[0, 1, 3]].isfinite().all()


def test_backend_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    from fused_kd import backends

    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_warned", {"slow"})  # test_reference_warning.py has that
    monkeypatch.setattr(backends.native, "_core", None)
    monkeypatch.setattr(fused_kd.direct, "_loss", None)
    monkeypatch.setattr(backends.native, "_failure", "the C++ core was not built: no compiler")
    with pytest.raises(
        RuntimeError, match="backend 'native' cannot run cpu tensors here: the C\\+\\+ core was not built"
    ):
        nkd_loss(S, T, Y, backend="native")
    explanation = fused_kd.explain(S)
    assert explanation.chosen == "reference"
    assert explanation.reasons["native"] == "the C++ core was not built: no compiler"
    assert nkd_loss(S, T, Y).isfinite()


def test_explain_says_what_was_chosen_and_why_not_the_rest(native):
    text = str(fused_kd.explain(S))
    assert "cpu tensors: auto takes 'native'" in text
    assert "triton" in text
    assert "interpreter" in text
