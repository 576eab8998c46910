"""USKD's ranks where keys are hard to tell apart: targets that tie or stand alone, and the smallest probabilities."""

import pytest
import torch
from uskd_cases import FUSED, zipf_labels

INF = float("inf")


@pytest.fixture(params=[*FUSED, "reference"])
def backend(request):
    return request.param


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("rank", ("normalized", "cls_kd", "weak", "sum"))
@pytest.mark.parametrize("logit", (-2.0, 0.0, 2.0))
def test_the_only_class_of_the_weak_logits_is_a_target(backend, logit, rank, dtype):
    """It has all of their probability, and so the first rank, whatever its logit is."""
    student = torch.tensor([[1.0, 2.0, 0.5, -1.0, 1.5]], dtype=dtype)
    weak = torch.full((1, 5), -INF, dtype=dtype)
    weak[0, 3] = logit
    found = zipf_labels(backend, student, weak, torch.tensor([3]), rank)[0]
    ranks = [2, 3, 4, 5] if rank == "weak" else [4, 2, 5, 3]  # of classes 0, 1, 2 and 4; the lower first among equals
    zipf = torch.tensor([1.0 / r for r in ranks], dtype=dtype)
    torch.testing.assert_close(found[[0, 1, 2, 4]], zipf / zipf.sum())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("rank", ("weak", "final"))
def test_a_target_ties_in_what_ranks_whatever_it_is_in_the_other(backend, rank, dtype):
    generator = torch.Generator().manual_seed(0)
    ranking = (1.37 * torch.randint(-3, 3, (40, 30), generator=generator)).to(dtype)
    other, target = torch.randn(40, 30, generator=generator).to(dtype), torch.randint(30, (40,), generator=generator)
    other[torch.arange(40), target] = torch.linspace(3, 200, 40, dtype=dtype)
    student, weak = (ranking, other) if rank == "final" else (other, ranking)
    order = ranking.sort(dim=1, descending=True, stable=True).indices
    zipf = torch.zeros(40, 30).scatter(1, order, (1 / torch.arange(1, 31)).expand(40, -1))
    zipf = zipf.scatter(1, target[:, None], 0.0).to(dtype)
    found = zipf_labels(backend, student, weak, target, rank)
    torch.testing.assert_close(found, zipf / zipf.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, lowest", ((torch.float32, -94.0), (torch.float64, -730.0)), ids=str)
@pytest.mark.parametrize("rank", ("normalized", "final", "weak", "sum"))
def test_the_smallest_probabilities_keep_their_order(backend, rank, dtype, lowest):
    """Subnormal as they are, as in an eager softmax."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.stack([torch.randperm(100, generator=generator) for _ in range(8)])
    student = (lowest + 0.1 * steps).to(dtype)
    weak = student.clone()
    student[:, 50] = weak[:, 60] = 0.0
    target = torch.arange(8)
    if rank == "final":
        weak = torch.randn(8, 100, generator=generator).to(dtype)
    elif rank == "weak":
        student = torch.randn(8, 100, generator=generator).to(dtype)
    found = zipf_labels(backend, student, weak, target, rank)
    expected = zipf_labels("reference", student.double(), weak.double(), target, rank)
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-5, atol=1e-6)
