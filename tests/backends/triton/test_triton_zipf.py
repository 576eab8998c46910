"""Zipf's label smoothing in Triton, under its interpreter: votes in every layout, ranks in tiles.

tests/losses/test_losses.py also runs these kernels, with the other losses.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fused_kd import check, zipf_ls_loss
from fused_kd.backends import triton as backend
from fused_kd.backends.triton import layout
from fused_kd.backends.triton.plans import common, zipf_ls
from fused_kd.core.options import HyperParameters, Options

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(backend.unavailable("cpu") is not None, reason="Triton does not run here"),
]

INF, NAN = math.inf, math.nan
KINDS = ("index", "mixed", "smoothed")


@pytest.fixture(params=["as dispatched", "small tiles"])
def regime(request, monkeypatch):
    """As dispatched, and with tiles so small that a row, its positions and its votes each need several."""
    if request.param == "small tiles":
        monkeypatch.setattr(layout, "STREAMED", dict.fromkeys(layout.STREAMED, (16, 1, 255)))
        small = {"VOTES": 16, "VOTE_TILE": 64, "VOTE_POSITIONS": 16, "VOTE_FEW_POSITIONS": 2}
        for name, value in small.items():
            monkeypatch.setattr(layout, name, value)
    caches = layout.streamed_config, layout.zipf_config, layout.vote_config
    for cached in caches:
        cached.cache_clear()
    yield request.param
    for cached in caches:
        cached.cache_clear()


def make(rows=5, classes=45, positions=7, kind="index", dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    dense = torch.randn(rows, positions, classes, generator=generator, dtype=torch.float64).to(dtype)
    first, second = torch.randint(classes, (2, rows), generator=generator)
    if kind == "index":
        return student, dense, first
    target = 0.7 * F.one_hot(first, classes).double() + 0.3 * F.one_hot(second, classes).double()
    return student, dense, target if kind == "mixed" else 0.9 * target + 0.1 / classes


def run(student, dense, target, backend="triton", **options):
    """Return loss, parts and gradient."""
    student = student.detach().requires_grad_()
    loss, parts = zipf_ls_loss(student, dense, target, backend=backend, return_parts=True, **options)
    loss.sum().backward()
    return loss.detach(), torch.stack(parts), student.grad


def compare(student, dense, target, tolerance=1e-11, **options):
    ours = run(student, dense, target, **options)
    exact_target = target.double() if target.is_floating_point() else target
    exact = run(student.double(), dense, exact_target, backend="reference", **options)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, equal_nan=True)
    return ours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", (1, pytest.param(7, marks=pytest.mark.slow), 70))
def test_matches_the_reference(regime, kind, positions):
    student, dense, target = make(positions=positions, kind=kind)
    student[1, 3] = -INF
    if kind == "index":
        target[0] = -100
        target[2] = dense[2, 0].argmax()  # a target that has a vote
    compare(student, dense, target, beta=1.0, reduction="none")
    compare(student, dense, target, beta=0.5, power=0.5, ce_weight=0.7, reduction="sum")
    compare(student, dense, target, beta=1.0, power=3.0, ce_weight=0.7, label_smoothing=0.2, reduction="none")
    compare(student, dense, target, beta=1.0, power=0.0)


LAYOUTS = {
    "positions are neighbours": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "feature map": lambda x: x.transpose(1, 2).reshape(x.shape[0], -1, 7, 7).flatten(2).transpose(1, 2),
    "sliced": lambda x: torch.full((x.shape[0], 60, 64), NAN, dtype=x.dtype)[:, 4:53, 8:53].copy_(x),
    "every second": lambda x: torch.full((x.shape[0], 99, 92), NAN, dtype=x.dtype)[:, 1::2, 2::2].copy_(x),
    "rows last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "one for all rows": lambda x: x[:1].expand(x.shape[0], -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16))
def test_layouts_of_dense_logits(regime, layout, dtype):
    """NaN surrounds the copies, so that a kernel that ignores a stride fails."""
    student, dense, target = make(3, positions=49)
    view = LAYOUTS[layout](dense.to(dtype))
    compare(student, view, target, beta=1.0)
    if "neighbours" in layout:  # whole vectors of them
        compare(student, LAYOUTS[layout](dense.to(dtype)[:, :48]), target, beta=1.0)


@pytest.mark.parametrize("classes", (2, pytest.param(3, marks=pytest.mark.slow), 10))
@pytest.mark.parametrize("kind", ("index", "mixed"))
def test_few_classes(regime, classes, kind):
    """Every class has votes and ranks are shared; with two classes, one or no non-target class remains."""
    for positions in (1, 30):
        student, dense, target = make(9, classes, positions, kind)
        compare(student, dense, target, beta=1.0, ce_weight=0.5, reduction="none")
        if classes == 2:
            assert not any(result.any() for result in run(student, dense, target, beta=1.0))


def test_ties(regime):
    """Of equal logits the lowest class gets the vote, also if all are -inf; equal votes share a rank."""
    student, dense, target = make(6, 45, 20)
    dense = dense.round()
    dense[1] = 0.0
    dense[2] = -INF
    dense[3, :, ::2] = -INF
    dense[4] = torch.where(dense[4] > 0, 0.0, -0.0)
    dense[5, :10], dense[5, 10:] = dense[5, :1], dense[5, 11:12]
    for dtype in (torch.float64, torch.float16):
        compare(student, dense.to(dtype), target, beta=1.0, reduction="none")
    near = torch.zeros(6, 3, 45, dtype=torch.float64)  # ties in float32 only
    near[:, :, 30] = 1.0 + 2.0**-40
    near[:, :, 20] = 1.0
    compare(student.float(), near, target, tolerance=1e-5, beta=1.0, reduction="none")


def test_impossible_classes(regime):
    student, dense, target = make(7, 12)
    target[:] = 3
    dense[:, :, 5] = 9.0
    student[0, 5] = -INF  # a class with votes leaves the non-target set
    student[1, 3] = -INF  # the target itself
    student[2, :3] = student[2, 4:] = -INF  # every other class
    student[3, :3] = student[3, 5:] = -INF  # all but one of them
    student[4, 6:] = -INF
    student[5] = -INF  # no distribution
    student[6, 3] = INF  # the target for sure, of which the divergence knows nothing
    compare(student, dense, target, beta=1.0, reduction="none")
    loss = compare(student[:5], dense[:5], target[:5], beta=1.0, ce_weight=0.5, reduction="none")[0]
    assert loss.isinf().tolist() == [False, True, False, False, False]
    compare(student[:5], dense[:5], target[:5], beta=1.0, ce_weight=0.5, label_smoothing=0.1, reduction="none")
    # Weights that underflow are none, and a row of them says nothing.
    compare(student[:5], dense[:5], torch.full_like(target[:5], 5), beta=1.0, power=1e4, reduction="none")


@pytest.mark.parametrize("where", ("dense", "student", "target logit", "infinite", "label", "target"))
def test_no_value_in_one_row(regime, where):
    student, dense, target = make(4, 45, 20, "mixed" if where == "label" else "index", torch.float32)
    if where == "dense":
        dense[2, 13, 44] = NAN
    elif where == "label":
        target[2, 8] = NAN
    elif where == "target":
        target[2] = 2**40
    else:
        student[2, target[2] if where == "target logit" else (target[2] + 1) % 45] = INF if where == "infinite" else NAN
    for beta, ce_weight, smoothing in ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1.0, 0.5, 0.1)):
        hyper = HyperParameters(beta=beta, power=1.0, ce_weight=ce_weight, label_smoothing=smoothing)
        options = Options(hyper, -100, "none", (True,), (1.0,))
        loss, parts, gradient, _ = backend.zipf_ls(student, dense, target, None, options)
        for result in (loss, *parts, gradient.sum(1)):
            assert result.isnan().tolist() == [False, False, True, False]
        assert gradient[2].isnan().all()


def test_ignored_rows_count_nowhere(regime):
    student, dense, target = make(6, 45, 20)
    target[[1, 4]] = -100
    student[1], dense[4] = NAN, NAN
    for reduction in ("mean", "none"):
        loss, parts, gradient = run(student, dense, target, beta=1.0, ce_weight=1.0, reduction=reduction)
        kept = target != -100
        rest = run(student[kept], dense[kept], target[kept], "reference", beta=1.0, ce_weight=1.0, reduction=reduction)
        torch.testing.assert_close(loss[kept] if reduction == "none" else loss, rest[0])
        torch.testing.assert_close(gradient[kept], rest[2])
        assert not gradient[~kept].any() and loss.isfinite().all() and parts.isfinite().all()
    for result in run(student, dense, torch.full_like(target, -100), ce_weight=1.0):
        assert not result.any()


@pytest.mark.parametrize("dtype", check.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kind", ("index", pytest.param("smoothed", marks=pytest.mark.slow)))
def test_dtypes_stay_within_eagers_error(regime, dtype, kind):
    classes = 101 if regime == "small tiles" else 301
    student, dense, target = make(6, classes, 49, kind, dtype)
    target = target.float() if kind == "smoothed" else target
    dense = LAYOUTS["positions are neighbours"](dense)
    for options in ({"beta": 1.0}, {"beta": 1.0, "power": 0.7, "ce_weight": 1.0, "label_smoothing": 0.1}):
        outcome = check.compare_inputs("triton", student, dense, target, options, loss="zipf_ls")
        assert outcome.passed, (options, outcome)


def test_scaled_float16_gradients_do_not_underflow(regime):
    student, dense, target = make(12, 200, 5, dtype=torch.float16)
    student /= 30
    for options in ({}, {"ignore_index": int(target[0])}):
        leaf = student.clone().requires_grad_()
        ours = torch.autograd.grad(
            zipf_ls_loss(leaf, dense, target, backend="triton", **options), leaf, torch.tensor(65536.0)
        )[0]
        exact = 65536 * run(student.double(), dense, target, "reference", **options)[2]
        torch.testing.assert_close(ours.double(), exact, rtol=4e-3, atol=1e-3)
        assert (ours == 0).sum() <= (exact == 0).sum()


def test_counts_and_sums_in_chunks(monkeypatch):
    monkeypatch.setattr(common, "COUNT_ROWS", 16)
    monkeypatch.setattr(common, "CHUNK", 64)
    student, dense, target = make(70, 5, 3)
    target[::3] = -100
    for reduction in ("mean", "sum"):
        compare(student, dense, target, beta=1.0, reduction=reduction)


def test_without_gradient():
    student, dense, target = make()
    loss = zipf_ls_loss(student, dense, target, backend="triton")
    assert not loss.requires_grad
    assert torch.equal(loss, run(student, dense, target)[0])


def test_same_input_same_bits(regime):
    arguments = make(positions=20, dtype=torch.float32)
    for first, second in zip(run(*arguments), run(*arguments), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("rows", "reduction", "expected"),
    [
        (256, "none", ["find_votes", "rank_votes", "zipf_rows"]),
        (256, "mean", ["find_votes", "rank_votes", "zipf_rows", "reduce_parts"]),
        (8192, "mean", ["count_chunks", "find_votes", "rank_votes", "zipf_rows", "reduce_parts"]),
    ],
)
def test_launches(rows, reduction, expected):
    student = torch.empty(rows, 1000, dtype=torch.bfloat16, device="meta")
    dense = torch.empty(rows, 1000, 49, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    loss = torch.empty((rows,) if reduction == "none" else (), device="meta")
    parts = torch.empty((2, *loss.shape), device="meta")
    hyper = HyperParameters(beta=0.1, power=1.0, ce_weight=1.0)
    options = Options(hyper, -100, reduction, (True,), (1.0,))
    plan = zipf_ls.plan_zipf_ls(student, dense, target, None, (loss, parts, student, loss), options)
    assert [launch.kernel for launch in plan] == expected
    votes = next(launch for launch in plan if launch.kernel == "find_votes")
    assert votes.options["POSITION_UNIT"] and not votes.options["CLASS_UNIT"]
    assert votes.options["POSITIONS"] * votes.options["CLASSES"] == 16 * 32 * votes.options["num_warps"]
