"""Zipf's label smoothing where its ranks are hard to have: votes that float32 takes for ties, and large exponents."""

import pytest
import torch
from loss_cases import HERE

from fused_kd import zipf_ls_loss

BACKENDS = [*dict.fromkeys(name for loss, name, device in HERE if loss == "zipf_ls" and device == "cpu")]


def run(backend, student, dense, target, **options):
    leaf = student.clone().requires_grad_()
    loss = zipf_ls_loss(leaf, dense, target, backend=backend, beta=1.0, reduction="none", **options)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_position", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_votes_are_of_the_logits_as_they_are(backend, dtype, by_position):
    """Whatever the student's dtype."""
    generator = torch.Generator().manual_seed(0)
    dense = 1 + 1e-12 * torch.randn(4, 9, 21, generator=generator, dtype=torch.float64)
    dense = dense.transpose(1, 2).contiguous().transpose(1, 2) if by_position else dense
    votes = torch.nn.functional.one_hot(dense.argmax(2), 21).double()
    student, target = torch.randn(4, 21, generator=generator).to(dtype), torch.randint(21, (4,), generator=generator)
    found, expected = (run(backend, student, each, target) for each in (dense, votes))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("power", (0.0, 30.0, 200.0, 1e4, 1e30))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_any_power(backend, dtype, power):
    """The weights are relative to the best rank that is left when the targets are gone: the others vanish beside it."""
    counts = torch.tensor([[5, 2, 2, 0, 0, 1], [0, 0, 3, 3, 4, 0], [10, 0, 0, 0, 0, 0]])
    dense = torch.stack([torch.eye(6)[torch.arange(6).repeat_interleave(row)] for row in counts]).to(dtype)
    student = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    student[1, 2] = float("-inf")
    target = torch.tensor([0, 4, 0])
    kept = [[1, 2, 3, 4, 5], [0, 1, 3, 5], [1, 2, 3, 4, 5]]
    best = [[1, 2], [3], [1, 2, 3, 4, 5]]
    loss, gradient = run(backend, student, dense, target, power=power)
    for row in range(3):
        z = torch.zeros(6, dtype=torch.float64)
        z[best[row] if power else kept[row]] = 1.0
        z = z[kept[row]] / z.sum()
        log_p = student[row, kept[row]].double().log_softmax(0)
        wanted = (torch.special.xlogy(z, z) - z * log_p).sum()
        torch.testing.assert_close(loss[row].double(), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient[row, kept[row]].double(), log_p.exp() - z, rtol=1e-5, atol=1e-6)
        assert gradient[row].isfinite().all()
