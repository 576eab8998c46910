"""The CUDA library as nvcc compiles it, with CUB and host code, on the PTX interpreter (tools/ptx).

This is a selection. ``-p tools.ptx.cuda.plugin`` runs all of tests/backends/cuda in this way, in forty
minutes on one core.
"""

import pytest
import torch

from fused_kd import reference
from fused_kd.backends.native import cuda
from fused_kd.core.options import HyperParameters, Options
from tools.ptx import Fault
from tools.ptx.cuda.build import ROOT, BuildError, build, find_nvcc
from tools.ptx.cuda.driver import Library

WEIGHTS = {"alpha": 1.0, "beta": 0.1, "mu": 0.05, "ce_weight": 1.0, "label_smoothing": 0.1}
#: Units in the last place, for what the loss and the gradients add up.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
IGNORED = -100


@pytest.fixture(scope="module")
def library():
    try:
        find_nvcc()
    except BuildError as reason:
        pytest.skip(str(reason))
    library = Library(build(ROOT / "build" / "ptx-cuda"))
    with library.patched(cuda):
        yield library


@pytest.fixture(autouse=True)
def healthy(library):
    yield
    library.reset()
    library.core.limit_shared(227 * 1024)


def inputs(rows, classes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, weak = ((3 * torch.randn(rows, classes, generator=generator)).to(dtype) for _ in range(2))
    target = torch.randint(classes, (rows,), generator=generator)
    target[0] = IGNORED if rows > 1 else target[0]
    return student, weak, target


def run(library, student, weak, target, factors=None, reduction="mean", rank="normalized"):
    sums = cuda.uskd_batch_sums(library.core, student, target, True, IGNORED)
    options = Options(HyperParameters(**WEIGHTS), IGNORED, reduction, (True, True), (1.0, 1.0), rank=rank)
    return sums, *cuda.uskd(library.core, student, weak, target, sums, factors, options)


def check(library, student, weak, target, rank="normalized"):
    """Compare batch sums, loss, parts, and gradients after the backward pass with the reference."""
    sums, loss, parts, *gradients, student_norm, weak_norm = run(library, student, weak, target, rank=rank)
    for gradient, norm in zip(gradients, (student_norm, weak_norm), strict=True):
        cuda.scale_gradient(library.core, gradient, torch.ones((), dtype=loss.dtype), norm, gradient)
    exact = [x.double().requires_grad_() for x in (student, weak)]
    options = dict(WEIGHTS)
    wanted_loss, wanted_parts = reference.uskd_loss(*exact, target, rank=rank, **options)
    wanted_loss.backward()
    wanted = (wanted_loss, torch.stack(list(wanted_parts)), *(x.grad for x in exact))
    for name, ours, theirs in zip(("loss", "parts", "student", "weak"), (loss, parts, *gradients), wanted, strict=True):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)
        assert error <= TOLERANCE[ours.dtype], (name, float(error))
    wanted_sums = reference.uskd_batch_sums(exact[0], target)
    assert (sums - wanted_sums).abs().max() <= TOLERANCE[loss.dtype] * wanted_sums.abs().max()


@pytest.mark.parametrize(
    "classes, dtype",
    (
        (100, torch.float32),
        (333, torch.bfloat16),
        (5001, torch.bfloat16),
        (12301, torch.float16),
        (40, torch.float64),
    ),
    ids=("in a warp", "in a block", "long", "long, in 32 warps", "sorted in double precision"),
)
def test_losses_and_gradients(library, classes, dtype):
    check(library, *inputs(4 if classes < 5000 else 2, classes, dtype))


def test_sorted_in_passes(library):
    """Rows beyond the shared memory of a block, two of them at once."""
    library.core.limit_shared(48 * 1024)
    check(library, *inputs(3, 8200, torch.float32))


@pytest.mark.parametrize(
    "classes, dtype, ranks",
    (
        (60, torch.float32, reference.RANKS),
        (60, torch.float64, ("normalized",)),
        (4500, torch.float32, ("normalized",)),
    ),
    ids=("float32", "float64", "long"),
)
def test_ties_go_to_the_lower_class(library, classes, dtype, ranks):
    """Equal logits have equal keys to the bit, however nvcc contracts; the target's ties too."""
    student = torch.randint(3, (4, classes), generator=torch.Generator().manual_seed(0)).to(dtype)
    weak = torch.zeros_like(student)
    student[0] = weak[0] = 1.5
    target = torch.tensor([classes // 2, 0, classes - 1, 5])
    for rank in ranks:
        check(library, student, weak, target, rank=rank)


def test_row_weights(library):
    student, weak, target = inputs(3, 70, torch.float32)
    factors = torch.tensor([[1, 0.5, 0], [1, 0.25, 0], [1, 2, 0]], dtype=torch.float64)
    plain, weighted = (run(library, student, weak, target, x, "none") for x in (None, factors))
    for result in (weighted[1], weighted[2].t(), *weighted[3:5]):
        assert not result[2].any(), "a row of weight 0"
    for which, factor in ((1, 0.5), (3, 0.25), (4, 2.0)):
        torch.testing.assert_close(weighted[which][1], factor * plain[which][1])


def test_gradients_scaled_row_by_row(library):
    gradient = torch.randn(3, 21)[:, :20].contiguous()
    each, norm = torch.tensor([2.0, -1.0, 0.5]), torch.tensor(0.25)
    out = torch.empty_like(gradient)
    cuda.scale_gradient(library.core, gradient, each, norm, out)
    assert torch.equal(out, gradient * (each * norm)[:, None])


def test_refusals_and_faults(library):
    """A refused launch leaves no error behind. One that faults ruins the context, and every later call raises."""
    student, weak, target = inputs(1, 20, torch.float64)
    one = torch.ones(())
    at = one.data_ptr()
    with pytest.raises(RuntimeError, match="CUDA says: invalid configuration argument"):
        library.core.cuda_scale_gradient((0, 0), 0, at, 0, (at, 0, (1,)), at, 0, (-1, 1))
    run(library, student, weak, target)
    with pytest.raises(RuntimeError, match="illegal memory access"):  # of memory that no call was given
        library.core.cuda_scale_gradient((0, 0), 0, at, 0, (at, 0, (1,)), at, 0, (1, 1))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            library.core.cuda_uskd_workspace(0, 1, 20, 1)
    assert "illegal memory access" in library.core.cuda_problem()
    library.reset()
    assert library.core.cuda_problem() == ""


def test_one_element_out_of_bounds_is_a_fault(library):
    student, _, target = inputs(2, 20, torch.float32)
    with pytest.raises(Fault, match="global memory out of bounds"):
        cuda.uskd_batch_sums(library.core, student, target[:1], True, IGNORED)
