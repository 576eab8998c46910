"""Equal logits are equal wherever they stand: in a whole vector, in the last one that is partly filled, beside a target
or at one. A compiler sees several copies of each loop, and must not make something else of one of them.

Sizes lie around the vectors' widths. Every instruction set that runs here is tested; tools/compilers.py runs this file
on builds by other compilers.
"""

import pytest
import torch
import torch.nn.functional as F

from fused_kd import check, uskd_loss
from fused_kd.core.catalogue import LOSSES

SIZES = [*range(3, 20), 23, 24, 25, *range(31, 36), 47, 63, 64, 65, 66, 127, 129]
RANKS = ("normalized", "cls_kd", "weak", "final", "sum")
ROWS = 12
OPTIONS = ({}, {"temperature": 3.0}, {"ce_weight": 0.5, "label_smoothing": 0.1, "temperature": 2.0})


def uskd_rows(size, dtype, labels):
    """Rows of equal logits but for one class, which leads in both; the targets are others."""
    generator = torch.Generator().manual_seed(size)
    draw = torch.rand(2, ROWS, 1, generator=generator, dtype=torch.float64)
    student, weak = ((6 * draw - 3).expand(2, ROWS, size).clone()).to(dtype)
    leader = torch.randint(size, (ROWS,), generator=generator)
    target = (leader + 1 + torch.arange(ROWS) % (size - 1)) % size  # the next of it, the one after and so on
    rows = torch.arange(ROWS)
    student[rows, leader] += 3.7
    weak[rows, leader] += 2.3
    if labels == "probabilities":
        second = torch.where((target + 1) % size == leader, (target + 2) % size, (target + 1) % size)
        target = (0.7 * F.one_hot(target, size) + 0.3 * F.one_hot(second, size)).to(dtype)
    return student, weak, leader, target


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("labels", ("indices", "probabilities"))
@pytest.mark.parametrize("rank", RANKS)
def test_uskd_ranks_equal_logits_by_their_index(native, rank, labels, dtype):
    for size in SIZES:
        student, weak, leader, target = uskd_rows(size, dtype, labels)
        # The leader first, then the others as they come, the targets among them.
        order = torch.arange(size).expand(ROWS, size) + 2 - (torch.arange(size) > leader[:, None]).long()
        order[torch.arange(ROWS), leader] = 1
        is_target = F.one_hot(target, size).bool() if target.dim() == 1 else target > 0
        zipf = (1 / order.double()).masked_fill(is_target, 0.0)
        zipf /= zipf.sum(1, keepdim=True).clamp(min=1e-9)
        soft = student.double().masked_fill(is_target, float("-inf")).softmax(1)
        expected = torch.where((~is_target).sum(1, keepdim=True) > 1, soft - zipf, 0.0)
        for name in native.instruction_sets():
            native.instruction_set = name
            leaf = student.clone().requires_grad_()
            options = {"alpha": 0.0, "beta": 1.0, "mu": 0.0, "rank": rank, "reduction": "sum"}
            uskd_loss(leaf, weak, target, backend="native", **options).backward()
            error = float((leaf.grad.double() - expected).abs().max())
            assert error < 2e-6, (name, size, error)  # two neighbouring ranks of 129 are 1e-5 apart


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss not in ("uskd", "zipf_ls")])
def test_equal_logits_have_equal_gradients(native, loss, options, dtype):
    """To the bit, of the classes that are no target, in a row that is one block."""
    if loss == "dist":
        options = {**options, "gamma": 0.0}  # columns tell classes apart
    for size in SIZES:
        generator = torch.Generator().manual_seed(size)
        # Each of three values of a row's student has one of the teacher.
        values = 3 * torch.randn(2, ROWS, 3, generator=generator, dtype=torch.float64).to(dtype)
        of = torch.randint(3, (ROWS, size), generator=generator)
        student, teacher = (values[k].gather(1, of) for k in range(2))
        target = torch.arange(ROWS) * 5 % size
        for name in native.instruction_sets():
            native.instruction_set = name
            gradient = check.evaluate("native", student, teacher, target, options, loss=loss)[1]
            for row in range(ROWS):
                others = torch.arange(size) != target[row]
                for value in range(3):
                    alike = gradient[row, others & (of[row] == value)]
                    assert (alike == alike[:1]).all(), (name, size, row, alike.tolist())


def test_float16_subnormals_while_pytorch_flushes_those(native):
    """The processor's conversion of whole vectors keeps them, whatever is said of float32's."""
    for size in (*range(3, 36), 65):
        student = torch.full((ROWS, size), -6e-5, dtype=torch.float16)
        student[:, 2] = 1.0  # leads
        target = torch.tensor([0, 1] * (ROWS // 2))
        expected = 1 / torch.arange(1.0, size + 1).expand(ROWS, size).clone()
        expected[:, :3] = torch.tensor([1 / 2, 1 / 3, 1.0])
        expected.scatter_(1, target[:, None], 0.0)
        expected /= expected.sum(1, keepdim=True)
        soft = student.float().scatter(1, target[:, None], float("-inf")).softmax(1)
        for name in native.instruction_sets():
            native.instruction_set = name
            leaf = student.clone().requires_grad_()
            assert torch.set_flush_denormal(True)
            try:
                uskd_loss(leaf, student, target, backend="native", alpha=0.0, beta=1.0, mu=0.0).backward()
            finally:
                torch.set_flush_denormal(False)
            torch.testing.assert_close(leaf.grad.float() * ROWS, soft - expected, rtol=1e-3, atol=2e-4)
