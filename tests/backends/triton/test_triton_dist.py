"""DIST in Triton, under its interpreter: columns in blocks and chunks, moments, both regimes.

tests/losses/test_losses.py also runs these kernels, with the other losses.
"""

from __future__ import annotations

import math

import pytest
import torch

from fused_kd import check, dist_loss
from fused_kd.backends import triton as backend
from fused_kd.backends.triton import layout
from fused_kd.backends.triton.plans.rows import plan_row_loss
from fused_kd.core.options import HyperParameters, Options

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(backend.unavailable("cpu") is not None, reason="Triton does not run here"),
]

INF, NAN = math.inf, math.nan


@pytest.fixture(params=["as dispatched", "small tiles", "small tiles, rows walked"])
def regime(request, monkeypatch):
    """As dispatched; with tiles so small that some rows are several chunks, some classes several blocks, and few
    classes a long row; and in addition with no row held on chip."""
    if "small" in request.param:
        small = {"COLUMN_BLOCK": 16, "COLUMN_ELEMENTS": 2, "COLUMN_CHUNK": 8, "FINISH_TILE": (2, 16)}
        # Of single loads 38 rows of 45 classes have the second kind of tile, 41 the first.
        monkeypatch.setattr(layout, "COLUMN_SINGLES", ((22, 1, 8, 64), (8, 2, 16, 80)))
        for name, value in {**small, "NORMALIZE_LONG": 40, "NORMALIZE_LONG_WARPS": 1}.items():
            monkeypatch.setattr(layout, name, value)
    if "walked" in request.param:
        for name in ("ON_CHIP", "ON_CHIP_MORE", "ON_CHIP_WIDE"):
            monkeypatch.setattr(layout, name, ())
        monkeypatch.setattr(layout, "LOOPED_WARPS", 1)
    caches = layout.row_config, layout.column_config, layout.normalize_config
    for cached in caches:
        cached.cache_clear()
    yield request.param
    for cached in caches:
        cached.cache_clear()


def make(rows=38, classes=45, dtype=torch.float64, spread=2.0):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (spread * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


def run(student, teacher, target, backend="triton", **options):
    """Return loss, parts and gradient."""
    student = student.detach().requires_grad_()
    loss, parts = dist_loss(student, teacher, target, backend=backend, return_parts=True, **options)
    loss.sum().backward()
    return loss.detach(), torch.stack(parts), student.grad


def compare(student, teacher, target, tolerance=1e-11, **options):
    ours = run(student, teacher, target, **options)
    exact_target = target.double() if target is not None and target.is_floating_point() else target
    exact = run(student.double(), teacher.double(), exact_target, backend="reference", **options)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, equal_nan=True)
    return ours


@pytest.mark.parametrize("classes", (45, pytest.param(64, marks=pytest.mark.slow)))
def test_matches_the_reference(regime, classes):
    """Includes chunks in which no row counts, and columns and rows that do not fill their tiles."""
    student, teacher, target = make(46, classes)
    student[3, 5] = teacher[3, 5] = teacher[9, 7] = -INF
    student[40, int(target[40])] = 500.0  # a saturated target
    target[[0, 1, 13]], target[15:36] = -100, -100
    mixed = torch.randn(46, classes, dtype=torch.float64).softmax(1)
    options = {"ce_weight": 0.7, "label_smoothing": 0.1, "temperature": 3.0}
    compare(student, teacher, target, reduction="sum", **options)
    compare(student, teacher, target, **options, logit_standardization=True)
    compare(student, teacher, mixed, **options)
    compare(student, teacher, None, beta=0.0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("classes", (300, pytest.param(304, marks=pytest.mark.slow)))
def test_dtypes_stay_within_eagers_error(regime, dtype, classes):
    student, teacher, target = make(12, classes, dtype)
    target[::5] = -100
    for options in ({"beta": 0.0, "temperature": 4.0}, {"logit_standardization": True, "ce_weight": 1.0}):
        outcome = check.compare_inputs("triton", student, teacher, target, options, loss="dist")
        assert outcome.passed, (options, outcome)


def test_what_ignored_rows_hold_is_in_no_column(regime):
    """The kernels read the logits of ignored rows."""
    student, teacher, target = make(dtype=torch.float32)
    target[[3, 7, 37]] = -100
    student[3], teacher[3], student[7, 2], teacher[37] = NAN, INF, INF, -INF
    for options in ({}, {"logit_standardization": True}):
        compare(student, teacher, target, tolerance=1e-5, **options)


def test_columns_that_hardly_vary(regime):
    """Deviations of a thousandth of the mean: sums of squares minus the squared sum would have no digit left."""
    student, teacher, target = make(38, 45, torch.float32, spread=1.0)
    student, teacher = student[:1] + 1e-3 * student, teacher[:1] + 1e-3 * teacher
    ours = run(student, teacher, target, beta=0.0)
    exact = run(student.double(), teacher.double(), target, backend="reference", beta=0.0)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=2e-3, atol=1e-6)
    assert (ours[2] - exact[2]).abs().max() < 5e-3 * exact[2].abs().max()


def test_constant_columns(regime):
    """The student is the same in every row: the correlation is 0, and only the teacher's slope remains."""
    student, teacher, target = make(dtype=torch.float32)
    target[:20] = -100
    for rows in (torch.zeros_like(student), student[:1].expand(38, -1)):
        _, parts, gradient = run(rows, teacher, target, beta=0.0)
        assert parts[1] == 1.0
        assert gradient.isfinite().all()
    ours = compare(student, teacher[:1].expand(38, -1), target, tolerance=1e-6, beta=0.0)
    assert not ours[2].any()


@pytest.mark.parametrize("rows", (1, 2, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (3, 8)), 41))
def test_equal_rows_have_no_gradient(regime, rows):
    """p and q must equal their columns' means to the bit, or a slope of 1e8 multiplies the difference. Also for 41
    rows: 41 times its reciprocal is not 1 in float32."""
    student, teacher, target = make(rows, 45, torch.float32)
    for rows_of_s, rows_of_t in ((student[:1], teacher[:1]), (torch.zeros(1, 45), teacher[:1])):
        pair = (x.expand(rows, -1).contiguous() for x in (rows_of_s, rows_of_t))
        _, parts, gradient = run(*pair, target, beta=0.0, temperature=4.0)
        assert parts[1] == 16.0
        assert not gradient.any()


@pytest.mark.parametrize("rows", (3, pytest.param(8, marks=pytest.mark.slow)))
@pytest.mark.parametrize("vary", ("both", "student", "teacher"))
def test_few_rows_stay_within_eagers_error(regime, rows, vary):
    student, teacher, target = make(rows, 300, torch.float32)
    if vary == "student":
        teacher = teacher[:1].expand(rows, -1).contiguous()
    elif vary == "teacher":
        student = student[:1].expand(rows, -1).contiguous()
    outcome = check.compare_inputs("triton", student, teacher, target, {"beta": 0.0, "temperature": 4.0}, loss="dist")
    assert outcome.passed, outcome


@pytest.mark.parametrize("rows", (2, 3))
def test_few_rows_that_nearly_agree(regime, rows):
    """Sums of squares near the rounding error, not negative: no NaN, and half of the available digits."""
    student, teacher, target = make(rows, 300, torch.float32)
    student, teacher = student[:1] + 1e-3 * student, teacher[:1] + 1e-3 * teacher
    ours = run(student, teacher, target, beta=0.0, temperature=4.0)
    exact = run(student.double(), teacher.double(), target, backend="reference", beta=0.0, temperature=4.0)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-6, atol=0.0)
    assert (ours[2] - exact[2]).abs().max() < 5e-3 * exact[2].abs().max()


def test_nan_in_one_row_is_in_every_row(regime):
    student, teacher, target = make(dtype=torch.float32)
    target[[5, 30]] = -100
    student[5], teacher[30] = NAN, INF
    loss, parts, gradient = run(student, teacher, target)
    assert loss.isfinite() and parts.isfinite().all() and gradient.isfinite().all()
    for tensor in (student, teacher):
        kept = tensor[21, 44].clone()
        tensor[21, 44] = NAN
        loss, parts, gradient = run(student, teacher, target, reduction="sum")
        assert loss.isnan() and parts[1].isnan()
        assert gradient.isnan().all(1).tolist() == (target != -100).tolist()
        tensor[21, 44] = kept


def test_target_out_of_range_is_a_row_of_nan(regime):
    student, teacher, target = make(20, 45, torch.float32)
    target[7] = 2**40
    options = Options(HyperParameters(beta=1.0, gamma=1.0), -100, "none", (False,), (1.0,), "dist")
    loss, parts, gradient, _ = backend.row_loss(student, teacher, target, None, None, options)
    assert loss.isnan().tolist() == parts[1].isnan().tolist() == [row == 7 for row in range(20)]
    options = options._replace(reduction="sum", wanted=(True,))
    gradient = backend.row_loss(student, teacher, target, None, None, options)[2]
    assert gradient.isnan().any(1).tolist() == [row == 7 for row in range(20)]


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.full((x.shape[0], 100), NAN, dtype=x.dtype)[:, 3:48].copy_(x),
    "column stride 2": lambda x: torch.full((x.shape[0], 100), NAN, dtype=x.dtype)[:, 1:91:2].copy_(x),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view):
    student, teacher, target = make(20, 45)
    compare(VIEWS[view](student), teacher, target)
    compare(student, VIEWS[view](teacher), target, logit_standardization=True)


def test_without_gradient():
    student, teacher, target = make(20, 45)
    target[3] = -100
    for reduction in ("mean", "sum", "none"):
        loss = dist_loss(student, teacher, target, reduction=reduction, backend="triton")
        exact = dist_loss(student, teacher, target, reduction=reduction, backend="reference")
        torch.testing.assert_close(loss, exact)
    every = torch.full_like(target, -100)
    for result in run(student, teacher, every):
        assert not result.any()


def test_same_input_same_bits(regime):
    arguments = make(20, dtype=torch.float32)
    for first, second in zip(run(*arguments), run(*arguments), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("rows", "classes", "gamma", "expected"),
    [
        (1024, 1000, 0.0, ["rows_on_chip", "reduce_parts"]),
        (1024, 1000, 1.0, ["normalize_rows", "column_moments", "finish_columns", "rows_on_chip", "reduce_parts"]),
        (256, 21841, 1.0, ["normalize_rows", "column_moments", "finish_columns", "rows_looped", "reduce_parts"]),
    ],
)
def test_launches(rows, classes, gamma, expected):
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device="meta")
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    loss, parts = torch.empty((), device="meta"), torch.empty(3, device="meta")
    options = Options(HyperParameters(beta=1.0, gamma=gamma), -100, "mean", (True,), (1.0,), "dist")
    plan = plan_row_loss(logits, logits, target, None, None, (loss, parts, logits, loss), options)
    assert [launch.kernel for launch in plan] == expected


@pytest.mark.parametrize("wide", (False, True))
def test_column_layouts(wide):
    """Chunks contain every row and blocks every class; the chunks write little compared with what they read."""
    for rows in (1, 63, 64, 256, 8192, 1 << 20):
        for classes in (2, 17, 1000, 21841, 128256):
            for neighbours, vectors in ((False, False), (True, False), (True, True)):
                config = layout.column_config(rows, classes, wide=wide, neighbours=neighbours, vectors=vectors)
                assert config.chunk % config.rows == 0
                chunks, blocks = -(-rows // config.chunk), -(-classes // config.block)
                most = 2048 if neighbours and not vectors else 1024
                assert chunks == 1 or (config.chunk >= 64 and chunks * blocks <= most + blocks)
                assert config.rows * config.block <= 32 * config.warps * 8
            narrow = 8 if wide else 2
            normalize = layout.normalize_config(classes, narrow)
            assert normalize.rows * normalize.lanes == 32 * normalize.warps
            assert normalize.rows == 1 or classes <= layout.NORMALIZE_LONG
