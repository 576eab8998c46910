"""Values and gradients of the published implementation, in float64 (tests/data/published.json)."""

import golden
import pytest
import torch

import fused_kd

CASES = [case for case in golden.CASES if case["loss"] == "nkd"]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_nkd_matches_the_published_values(case, backend):
    name, device = backend
    inputs = {key: torch.tensor(value, device=device) for key, value in case["inputs"].items()}
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    student_logits = torch.tensor(case["inputs"]["student_logits"], dtype=torch.float64, device=device)
    inputs["teacher_logits"] = torch.tensor(case["inputs"]["teacher_logits"], dtype=torch.float64, device=device)
    student_logits.requires_grad_()
    loss = fused_kd.nkd_loss(student_logits, inputs["teacher_logits"], inputs["target"], backend=name, **case["params"])
    loss.backward()
    expected = torch.tensor(case["grads"]["student_logits"], dtype=torch.float64, device=device)
    torch.testing.assert_close(loss.item(), case["value"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(student_logits.grad, expected, rtol=1e-9, atol=1e-9)
