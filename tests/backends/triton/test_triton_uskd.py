"""USKD in Triton, under its interpreter: two regimes, exact ranks, passes, and launches.

tests/losses/test_uskd.py also runs these kernels, with the other backends.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from uskd_cases import make, run, zipf_labels

from fused_kd import uskd_loss
from fused_kd.backends import triton as backend
from fused_kd.backends.triton import layout, replay
from fused_kd.backends.triton.plans import uskd
from fused_kd.core.options import HyperParameters, Options

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(backend.unavailable("cpu") is not None, reason="Triton does not run here"),
]

INF, NAN = math.inf, math.nan
RANKS = ("normalized", "cls_kd", "weak", "final", "sum")


@pytest.fixture(params=["on_chip", "streamed", "streamed in tiles and passes"])
def regime(request, monkeypatch):
    """As dispatched; with no row small enough to be sorted on chip; and then in addition with tiles narrower than a row
    and passes of a few rows."""
    if request.param != "on_chip":
        monkeypatch.setattr(layout, "RANKED", ())
    if "tiles" in request.param:
        tiles = dict.fromkeys(layout.STREAMED, (32, 1, 255))
        monkeypatch.setattr(layout, "STREAMED", tiles)
        monkeypatch.setattr(uskd, "SORTED_AT_ONCE", 170)
        monkeypatch.setattr(uskd, "ZIPF_BLOCK", 16)
    caches = layout.uskd_config, layout.streamed_config
    for cached in caches:
        cached.cache_clear()
    yield request.param
    for cached in caches:
        cached.cache_clear()


def check(student, weak, target, tolerance=2e-6, **options):
    """Against the reference in float64 on the same numbers; with exact zeros, infinities and NaN where it has them."""
    exact_target = target.double() if target.is_floating_point() else target
    exact = run("reference", student.double(), weak.double(), exact_target, **options)
    ours = run("triton", student, weak, target, **options)
    for a, b in zip(ours, exact, strict=True):
        a = a.double()
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())
        finite = b.isfinite()
        torch.testing.assert_close(a[finite], b[finite], rtol=8 * tolerance, atol=tolerance)
    return ours


@pytest.mark.parametrize("wide", (False, True))
def test_regimes(wide):
    for classes in (2, 3, 16, 17, 100, 1000, 1024, 1025, 4096, 4097, 21841, 128256):
        config = layout.uskd_config(classes, wide=wide, probabilities=True, neighbours=True)
        on_chip = not wide and classes <= 4096
        assert isinstance(config, layout.OnChip if on_chip else layout.Streamed)
        assert config.registers * 32 * config.warps <= 65536
        assert config.block >= min(classes, 512)
        assert config.rows * config.block <= 4096
        # A word of 64 bits per class passes through shared memory.
        assert not on_chip or 8 * config.rows * config.block < 99 * 1024


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("kind", ("index", pytest.param("mixed", marks=pytest.mark.slow), "smoothed"))
def test_matches_the_reference(regime, rank, kind):
    student, weak, target = make(5, 45, kind, torch.float32)
    student[1, 3] = -INF
    if kind == "index":
        target[0], target[1] = -100, 5
    options = {"beta": 0.5, "mu": 0.3, "ce_weight": 0.7, "rank": rank}
    check(student, weak, target, reduction="none", **options)
    check(student, weak, target, reduction="none", label_smoothing=0.2, **options)
    check(student, weak, target, square=False, **options)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("keys", ("ties", "constant", "zeros"))
def test_ranks_of_ties_are_exact(regime, rank, keys):
    """The weak logits equal the student's, so equal logits give equal keys, ranked by class. In steps of a quarter
    there are no near ties that rounding could swap, as in a sum of two softmaxes of independent logits."""
    generator = torch.Generator().manual_seed(len(keys))
    student = (4 * torch.randn(4, 50, generator=generator)).round() / 4
    if keys == "constant":
        student = torch.ones(4, 50)
    elif keys == "zeros":
        student = torch.where(student > 0, 0.0, -0.0)
    student = student.bfloat16().float()  # float32, so that the weights can be read off the gradient
    target = torch.tensor([0, 7, 30, 49])
    ours = zipf_labels("triton", student, student, target, rank)
    exact = zipf_labels("reference", student.double(), student.double(), target, rank)
    is_target = F.one_hot(target, 50).bool()
    assert (ours - exact).masked_fill(is_target, 0.0).abs().max() < 5e-7
    # Neighbours in rank differ by more than that.
    if keys == "constant":
        expected = 1 / torch.arange(1, 51)
        expected = expected.expand(4, -1).masked_fill(is_target, 0.0)
        torch.testing.assert_close(ours.masked_fill(is_target, 0.0), expected / expected.sum(1, keepdim=True))


def test_a_target_ties_with_the_rest_in_one_of_the_logits(regime):
    """By the weak logits alone, the target ties with other classes, however far the student puts it above them."""
    for rank, raised in (("weak", 0), ("final", 1)):
        pair = [torch.linspace(-3, 3, 7).repeat(6)[None].repeat(3, 1) for _ in range(2)]
        target = torch.tensor([6, 13, 41])  # of the classes with the largest logit
        pair[raised][torch.arange(3), target] += 5.0
        ours = zipf_labels("triton", *pair, target, rank)
        exact = zipf_labels("reference", *(x.double() for x in pair), target, rank)
        rest = ~F.one_hot(target, 42).bool()
        assert (ours - exact)[rest].abs().max() < 5e-7


def test_near_equal_halves(regime):
    """bfloat16 with many ties: only the loss is certain, because near-equal keys may swap neighbouring ranks."""
    student, weak, target = make(4, 50, dtype=torch.bfloat16, spread=0.02)
    ours = run("triton", student, weak, target, beta=2.0)
    exact = run("reference", student.double(), weak.double(), target, beta=2.0)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours[3].double(), exact[3], rtol=2**-7, atol=1e-7)


def test_impossible_classes(regime):
    student, weak, target = make(8, 40, dtype=torch.float32)
    target[:] = 3
    student[0, 5] = -INF  # leaves the non-target set
    weak[1, 5] = -INF  # the weak term is +inf
    student[2, 3] = -INF  # the target itself
    student[3, :3] = student[3, 4:] = -INF  # every other class
    student[4, :3] = student[4, 5:] = -INF  # all but one of them
    weak[5, 3] = -INF
    student[6] = -INF  # no distribution
    student[7, 9] = weak[7, 9] = -INF
    for rank in ("normalized", "cls_kd"):
        loss = check(student[:6], weak[:6], target[:6], reduction="none", rank=rank, ce_weight=0.3)[0]
        assert loss[[0, 3, 4]].isfinite().all()
    one_hot = F.one_hot(target, 40).float()
    check(student[:6], weak[:6], 0.9 * one_hot[:6] + 0.1 / 40, reduction="none", ce_weight=0.3)
    smoothed = check(student[:6], weak[:6], target[:6], reduction="none", ce_weight=0.3, label_smoothing=0.1)[0]
    assert smoothed.isinf().all()  # every class has a share of each smoothed label
    loss, _, gradient, _ = run("triton", student[6:], weak[6:], target[6:], reduction="none")
    assert loss[0].isnan()
    assert not gradient[0].any()  # of classes that cannot occur


@pytest.mark.parametrize("where", ("student", "weak", "infinite", "target", "label"))
def test_no_value_in_one_row(regime, where):
    student, weak, target = make(4, 50, dtype=torch.float32)
    sums = torch.tensor([0.4, 0.0, 4.0], dtype=torch.float64)
    if where == "label":
        target = F.one_hot(target, 50).float()
        target[2, 8] = NAN
    elif where == "target":
        target[2] = 2**40
    else:
        (weak if where == "weak" else student)[2, 17] = INF if where == "infinite" else NAN
    options = (
        list(HyperParameters(1.0, 0.1, mu=0.005, ce_weight=1.0)),
        "normalized",
        True,
        -100,
        "none",
        True,
        True,
        "triton",
    )
    loss, parts, *gradients = torch.ops.fused_kd.uskd(student, weak, target, sums, None, *options)[:4]
    for result in (loss, parts.sum(0), *(gradient.sum(1) for gradient in gradients)):
        assert result.isnan().tolist() == [False, False, True, False]
    for gradient in gradients:
        assert gradient[2].isnan().all()
    # The batch mean passes the row's own on, but for the weak logits, of which it knows nothing.
    batch = torch.ops.fused_kd.uskd_batch_sums(student, target, True, -100, "triton")
    assert batch.isnan().tolist() == [where != "weak", where == "label", False]


def test_constant_and_three_way_labels(regime):
    """Without an entry above the smallest there is no target; of three equal ones, the lower two are targets."""
    student, weak, _ = make(3, 40, dtype=torch.float32)
    target = torch.full((3, 40), 1 / 40)
    target[1] = 0.0
    target[1, [39, 2, 20]] = 1 / 3
    target[2, 39] = 0.5
    target[2, :39] = 0.5 / 39
    sums = torch.ops.fused_kd.uskd_batch_sums(student, target, True, -100, "triton")
    assert sums[2] == 3
    check(student, weak, target, reduction="none", ce_weight=1.0)
    check(student, weak, target.bfloat16(), reduction="none", ce_weight=1.0)


@pytest.mark.parametrize("at_most", (0, 1024))
def test_sums_of_its_own_rows(regime, monkeypatch, at_most):
    """Summed by a separate kernel, or by every program that ranks."""
    monkeypatch.setattr(uskd, "BATCH_ROWS", at_most)
    monkeypatch.setattr(replay, "_kept", {})
    student, weak, target = make(7, 40, "mixed", dtype=torch.float32)
    hyper = list(HyperParameters(1.0, 0.1, mu=0.005, ce_weight=1.0))
    options = (None, hyper, "normalized", True, -100, "none", True, True, "triton")
    sums = torch.ops.fused_kd.uskd_batch_sums(student, target, True, -100, "triton")
    wanted = torch.ops.fused_kd.uskd(student, weak, target, sums, *options)
    torch.testing.assert_close(torch.ops.fused_kd.uskd(student, weak, target, None, *options), wanted)
    twice = torch.ops.fused_kd.uskd(student, weak, target, sums * torch.tensor([2.0, 1.0, 1.0]), *options)
    assert not torch.allclose(twice[0], wanted[0])  # it is the sums that it goes by


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_strides(regime, dtype):
    student, weak, target = make(2, 40, "mixed", dtype)
    padded = torch.full((2, 200), NAN, dtype=dtype)
    views = (
        lambda x: x.t().contiguous().t(),
        lambda x: padded.clone()[:, 5:45].copy_(x),
        lambda x: padded.clone()[:, 7:87:2].copy_(x),
    )
    expected = run("triton", student, weak, target, ce_weight=1.0)
    for view in views:
        for pair in ((view(student), weak, target), (student, view(weak), target.t().contiguous().t())):
            leaves = [x.detach().requires_grad_() for x in pair[:2]]
            loss = uskd_loss(*leaves, pair[2], ce_weight=1.0, backend="triton")
            loss.backward()
            # Another stride may let another kernel take the row: the same to a few roundings.
            torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-6, atol=0.0)
            for leaf, gradient in zip(leaves, expected[2:], strict=True):
                torch.testing.assert_close(
                    leaf.grad, gradient, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7
                )


def test_scaled_float16_gradients_do_not_underflow(regime):
    student, weak, target = make(8, 50, dtype=torch.float16, spread=0.1)
    leaves = [x.requires_grad_() for x in (student, weak)]
    for options in ({}, {"ignore_index": int(target[0])}):
        loss = uskd_loss(*leaves, target, mu=1e-3, backend="triton", **options)
        ours = torch.autograd.grad(loss, leaves, torch.tensor(65536.0))
        doubles = [x.detach().double().requires_grad_() for x in leaves]
        exact = torch.autograd.grad(uskd_loss(*doubles, target, mu=1e-3, backend="reference", **options), doubles)
        # Keys this close may swap, so of the student's gradient the targets only.
        torch.testing.assert_close(ours[1].double(), 65536 * exact[1], rtol=4e-3, atol=1e-4)
        picked = [x.double().gather(1, target[:, None]) for x in (ours[0], 65536 * exact[0])]
        torch.testing.assert_close(*picked, rtol=4e-3, atol=1e-3)


@pytest.mark.parametrize("need", ((True, False), (False, True), (False, False)))
def test_only_what_is_wanted_is_made(regime, need):
    student, weak, target = make(4, 50, dtype=torch.float32)
    both = run("triton", student, weak, target)
    leaves = student.requires_grad_(need[0]), weak.requires_grad_(need[1])
    loss = uskd_loss(*leaves, target, backend="triton")
    assert torch.equal(loss.detach(), both[0])
    if any(need):
        loss.backward()
    for leaf, wanted, gradient in zip(leaves, need, both[2:], strict=True):
        assert torch.equal(leaf.grad, gradient) if wanted else leaf.grad is None


def test_same_input_same_bits(regime):
    arguments = make(7, 50, "smoothed", torch.float32)
    for first, second in zip(run("triton", *arguments), run("triton", *arguments), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("rows", "classes", "reduction", "expected"),
    [
        (1024, 1000, "none", ["ranked_on_chip"]),
        (1024, 4096, "mean", ["ranked_on_chip", "reduce_parts"]),
        (8192, 1000, "mean", ["count_chunks", "ranked_on_chip", "reduce_parts"]),
        (40000, 1000, "sum", ["ranked_on_chip", "reduce_parts", "reduce_parts"]),
        (256, 21841, "mean", ["write_keys", "sort_rows", "write_zipf", "combine_ranked", "reduce_parts"]),
        (256, 128256, "none", ["write_keys", "sort_rows", "write_zipf", "combine_ranked"] * 2),
    ],
)
def test_launches(rows, classes, reduction, expected):
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device="meta")
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    loss = torch.empty((rows,) if reduction == "none" else (), device="meta")
    parts, norm = torch.empty((4, *loss.shape), device="meta"), torch.empty((), device="meta")
    sums = torch.empty(3, dtype=torch.float64, device="meta")
    options = Options(HyperParameters(1.0, 0.1, mu=0.005), -100, reduction, (True, True), (1.0, 1.0))
    made = (loss, parts, logits, logits, norm, norm)
    plan = uskd.plan_uskd(logits, logits, target, sums, None, made, options)
    assert [launch.kernel for launch in plan] == expected
    before = uskd.plan_batch_sums(logits, target, sums, True, -100)
    names = [launch.kernel for launch in before]
    assert names == ["target_probabilities"] + ["reduce_parts"] * (1 + (rows > 16384))
    own = [launch.kernel for launch in uskd.plan_uskd(logits, logits, target, None, None, made, options)]
    by_row = rows <= 1024 and classes <= 4096
    assert own == (names[:1] if by_row else names) + expected
