"""The Triton kernels under Triton's interpreter, against the reference, in both regimes: on chip and looped."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from fused_kd import nkd_loss
from fused_kd.backends import triton as backend
from fused_kd.backends.triton import layout
from fused_kd.backends.triton.plans import common

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(backend.unavailable("cpu") is not None, reason=str(backend.unavailable("cpu"))),
]

INF, NAN = math.inf, math.nan
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CLASSES = (2, 3, 10, 100, 1000, 1001)


@pytest.fixture(params=["on_chip", "looped"])
def regime(request, monkeypatch):
    """Run every case as dispatched, then with no row small enough for on-chip kernels and one warp per row, so that
    even a hundred classes exceed a tile."""
    if request.param == "looped":
        monkeypatch.setattr(layout, "ON_CHIP", ())
        monkeypatch.setattr(layout, "ON_CHIP_MORE", ())
        monkeypatch.setattr(layout, "ON_CHIP_WIDE", ())
        monkeypatch.setattr(layout, "LOOPED_WARPS", 1)
    layout.row_config.cache_clear()
    yield request.param
    layout.row_config.cache_clear()


def make(rows, classes, dtype, teacher_dtype=None, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    student = (spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    teacher = (spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(teacher_dtype or dtype)
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


def run(student, teacher, target, backend="triton", grad_output=None, **options):
    """Return loss, stacked parts and the student's gradient, all in float64."""
    student = student.detach().requires_grad_()
    loss, parts = nkd_loss(student, teacher, target, backend=backend, return_parts=True, **options)
    loss.backward(torch.ones_like(loss) if grad_output is None else grad_output.to(loss.dtype))
    assert student.grad.dtype == student.dtype
    assert student.grad.shape == student.shape
    return [x.double() for x in (loss.detach(), torch.stack(tuple(parts)), student.grad)]


def check(student, teacher, target, **options):
    """Our error against float64 is at most eager's error in this dtype plus a few roundings.

    Sums in another order differ by some units of the accumulating dtype: 16 units of the largest value. The gradient is
    rounded when it is stored, and in float16 again when it is unscaled: half a unit each.
    """
    probabilities = target.double() if target.is_floating_point() else target
    exact = run(student.double(), teacher.double(), probabilities, backend="reference", **options)
    eager = run(student, teacher, target, backend="reference", **options)
    ours = run(student, teacher, target, **options)
    acc = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    for name, x, e, o in zip(("loss", "parts", "gradient"), exact, eager, ours, strict=True):
        unit = 16 * torch.finfo(acc).eps + (torch.finfo(student.dtype).eps if name == "gradient" else 0.0)
        allowed = error(e, x) + unit * max(1.0 if name != "gradient" else 0.0, finite_max(x))
        assert error(o, x) <= allowed, f"{name}: error {error(o, x):.3g}, allowed {allowed:.3g}"
    return ours


def error(x, exact):
    assert torch.equal(x.isnan(), exact.isnan())
    assert torch.equal(x.isinf(), exact.isinf())
    return finite_max(x - exact)


def finite_max(x):
    return x[x.isfinite()].abs().max().item() if x.isfinite().any() else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_matches_reference(regime, dtype, classes):
    student, teacher, target = make(7 if classes < 1000 else 3, classes, dtype)
    target[2] = -100
    calls = ((1.0, 0.0, "mean"), (3.0, 1.0, "none"), (3.0, 0.0, "sum"))
    for temperature, ce_weight, reduction in calls[: 3 if classes < 1000 else 2]:
        check(student, teacher, target, temperature=temperature, ce_weight=ce_weight, reduction=reduction, gamma=1 / 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 3, 10, 601])
def test_probability_targets(regime, dtype, classes):
    student, teacher, _ = make(3, classes, dtype)
    target = (2 * torch.randn(3, classes)).softmax(1)
    target[0] = 0.0
    target[0, [classes - 1, classes // 2]] = 0.5 if classes > 2 else 1.0  # a tie: the lower index is the target
    target[1] = 0.0
    target[1, classes - 1] = 1.0
    for options in ({}, {"temperature": 3.0, "ce_weight": 0.5, "reduction": "none"}):
        check(student, teacher, target, **options)
    if classes == 10:
        check(student, teacher, target.to(torch.bfloat16), ce_weight=1.0)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float64)]
)
def test_mixed_dtypes(regime, dtypes):
    student, teacher, target = make(5, 300, *dtypes)
    check(student, teacher, target, temperature=2.0, ce_weight=1.0)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_few_rows(regime, rows, reduction):
    check(*make(rows, 10, torch.float32), reduction=reduction)


VIEWS = {
    "transposed": lambda x, wide: x.t().contiguous().t(),
    "sliced": lambda x, wide: wide[:, 5:136].copy_(x),
    "column stride 2": lambda x, wide: wide[:, 7:269:2].copy_(x),
    "row stride alike modulo 8": lambda x, wide: wide[:, :139].contiguous()[:, 8:].copy_(x),
    "one row for all": lambda x, wide: x[:1].expand(3, -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(regime, dtype, view):
    student, teacher, target = make(3, 131, dtype)
    # Copies, so that a kernel that ignores a stride reads NaN.
    other_student, other_teacher = (VIEWS[view](x, torch.full((3, 400), NAN, dtype=dtype)) for x in (student, teacher))
    every_second = torch.stack([target, target + 1], 1)[:, 0]
    check(other_student, teacher, every_second, temperature=2.0)
    check(student, other_teacher, every_second)
    probabilities = torch.randn(131, 3).softmax(0).t()
    check(other_student, other_teacher, probabilities, ce_weight=1.0)


def test_ignored_rows_count_nowhere(regime):
    student, teacher, target = make(7, 77, torch.float32)
    target[[1, 4]] = 9
    student[1], teacher[4] = NAN, INF
    for reduction in ("mean", "none"):
        loss, parts, gradient = run(student, teacher, target, ignore_index=9, reduction=reduction)
        kept = target != 9
        rest = run(student[kept], teacher[kept], target[kept], backend="reference", reduction=reduction)
        assert torch.allclose(loss[kept] if reduction == "none" else loss, rest[0], rtol=1e-6)
        assert torch.allclose(gradient[kept], rest[2], rtol=1e-4, atol=1e-7)
        assert not gradient[~kept].any()
        assert loss.isfinite().all()
        assert parts.isfinite().all()
    for reduction in ("mean", "none"):
        results = run(student, teacher, torch.full_like(target, -100), reduction=reduction)
        assert all(not x.any() for x in results)


def test_impossible_classes(regime):
    """-inf logits: each row of one batch is another case, against the reference in float64."""
    student, teacher, target = make(9, 40, torch.float64)
    target[:] = 3
    student[0, 5] = teacher[0, 5] = -INF  # impossible for both
    teacher[1, 5:20] = -INF  # for the teacher
    student[2, 5] = -INF  # for the student, where the teacher has mass: +inf
    student[3, 3] = -INF  # the target itself: +inf
    student[4, :3] = student[4, 4:] = -INF  # every other class
    teacher[5, :3] = teacher[5, 4:] = -INF  # every other class, for the teacher
    student[6, :3] = student[6, 4:] = teacher[6, :3] = teacher[6, 4:] = -INF
    teacher[7, 3] = student[7, 3] = -INF  # the target, without mass
    student[8] = -INF
    for temperature, ce_weight in ((1.0, 0.0), (3.0, 1.0)):
        loss, _, gradient = check(
            student, teacher, target, temperature=temperature, ce_weight=ce_weight, reduction="none"
        )
        assert loss[2:5].eq(INF).all()
        assert gradient.isfinite().all()
    one_hot = torch.nn.functional.one_hot(target, 40).double()
    check(student, teacher, one_hot * 0.9 + 0.1 / 40, ce_weight=1.0, reduction="none")


def test_impossible_class_met_before_the_teacher_s_maximum(regime):
    """Mass that later underflows beside the maximum counts as 0, in any order of the classes."""
    student, teacher, target = torch.zeros(2, 3000), torch.full((2, 3000), -2000.0), torch.tensor([7, 7])
    student[:, 0] = -INF
    teacher[:, 0] = -1000.0
    teacher[0, 2999] = 0.0
    loss = run(student, teacher, target, reduction="none")[0]
    assert loss[0].isfinite()
    assert loss[1] == INF


@pytest.mark.parametrize("where", ["student", "teacher", "target_logit", "probabilities", "all_probabilities"])
def test_nan_stays_in_its_row(regime, where):
    student, teacher, target = make(5, 90, torch.float32)
    clean = run(student, teacher, target, reduction="none", ce_weight=1.0)
    if "probabilities" in where:
        target = torch.nn.functional.one_hot(target, 90).float()
        target[2, 4 if where == "probabilities" else slice(None)] = NAN
    elif where == "teacher":
        teacher[2, 88] = NAN
    else:
        student[2, target[2] if where == "target_logit" else 0] = NAN
    loss, _, gradient = run(student, teacher, target, reduction="none", ce_weight=1.0)
    others = [0, 1, 3, 4]
    assert loss[2].isnan()
    assert gradient[2].isnan().all()
    assert torch.allclose(loss[others], clean[0][others], rtol=1e-6)
    assert torch.allclose(gradient[others], clean[2][others], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("index", [-1, 90, 2**40, -(2**62)])
def test_target_out_of_range_is_a_row_of_nan(regime, index):
    student, teacher, target = make(4, 90, torch.float32)
    target[1] = index
    loss, _, gradient = run(student, teacher, target, reduction="none")
    assert loss.isnan().tolist() == gradient.isnan().all(1).tolist() == [False, True, False, False]
    assert not gradient[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("gap", [60.0, 500.0, -500.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_rows(regime, gap, dtype):
    """A target far above the rest must not change the others' softmax, or its own small gradient."""
    student, teacher, target = make(4, 50, dtype)
    student[torch.arange(4), target] += gap
    teacher[torch.arange(4), target] += gap
    check(student, teacher, target, temperature=4.0, ce_weight=1.0)


def test_gradient_of_a_confident_row(regime):
    """1 - p_y = 1e-8 keeps its digits in float32: it is summed over the others, not subtracted from 1."""
    student, teacher, target = make(4, 50, torch.float32)
    student[torch.arange(4), target] = teacher[torch.arange(4), target] = 25.0
    exact, ours = (
        run(student.to(dtype), teacher.to(dtype), target, gamma=0.0, backend=name)[2]
        for name, dtype in (("reference", torch.float64), ("triton", torch.float32))
    )
    assert torch.allclose(ours, exact, rtol=1e-5, atol=0.0)


def test_large_common_offset(regime):
    student, teacher, target = make(4, 200, torch.float32)
    check(student + 1000.0, teacher - 1000.0, target, temperature=2.0)


@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(regime, kind, reduction):
    student, teacher, target = make(2, 67 if regime == "looped" else 6, torch.float64, spread=1.0)
    if kind == "probabilities":
        target = torch.randn(student.shape, dtype=torch.float64).softmax(1)
    for temperature in (1.0, 2.5):

        def loss(s, temperature=temperature):
            return nkd_loss(
                s, teacher, target, temperature=temperature, ce_weight=0.7, reduction=reduction, backend="triton"
            )

        assert torch.autograd.gradcheck(loss, (student.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_incoming_gradients(dtype):
    student, teacher, target = make(6, 33, dtype)
    base = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.0])
    strided = torch.stack([base, base + 9], 1)[:, 0]
    for grad_output in (base, strided, base[:1].expand(6), base[1:2].expand(6)):
        check(student, teacher, target, reduction="none", grad_output=grad_output)
    for value in (1.0, 2.0, -0.25):
        for reduction in ("mean", "sum"):
            check(student, teacher, target, reduction=reduction, grad_output=torch.tensor(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_retained_graph_gives_the_same_gradient_again(dtype):
    student, teacher, target = make(6, 33, dtype)
    student.requires_grad_()
    loss = nkd_loss(student, teacher, target, backend="triton")
    gradients = [torch.autograd.grad(2 * loss, student, retain_graph=True)[0] for _ in range(2)]
    gradients.append(torch.autograd.grad(2 * loss, student)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_scaled_float16_gradients_do_not_underflow(regime):
    """Entries near 1e-6 of a mean over 32 rows, times GradScaler's 65536: without the scale they are 0 in float16."""
    student, teacher, target = make(32, 200, torch.float16, spread=0.1)
    student[torch.arange(32), target] = 9.0
    exact = run(student.double(), teacher.double(), target, backend="reference")[2] * 65536
    ours = run(student, teacher, target, grad_output=torch.tensor(65536.0))[2]
    assert (exact / 65536).abs().median() < 1e-4
    assert not (ours == 0).any()
    assert torch.allclose(ours, exact, rtol=4 * torch.finfo(torch.float16).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [50, 201])
def test_counts_and_sums_in_chunks(monkeypatch, dtype, rows):
    monkeypatch.setattr(common, "COUNT_ROWS", 16)
    monkeypatch.setattr(common, "CHUNK", 64)
    student, teacher, target = make(rows, 5, dtype)
    target[::3] = -100
    for reduction in ("mean", "sum"):
        check(student, teacher, target, reduction=reduction)
    check(student, teacher, torch.randn(rows, 5).softmax(1), ce_weight=1.0)


def test_many_rows():
    student, teacher, target = make(2100, 3, torch.float32)
    target[5:900] = -100
    check(student, teacher, target, ce_weight=1.0)


def test_same_input_same_bits(regime):
    arguments = make(9, 500, torch.float32)
    for first, second in zip(run(*arguments), run(*arguments), strict=True):
        assert torch.equal(first, second)


def test_without_gradient():
    student, teacher, target = make(5, 20, torch.float16)
    loss = nkd_loss(student, teacher, target, backend="triton")
    assert not loss.requires_grad
    assert torch.allclose(loss.double(), run(student, teacher, target)[0], rtol=1e-6)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiled code takes CPU tensors by a plugin")
def test_unavailable_says_why(monkeypatch):
    assert backend.unavailable("cpu") is None
    assert "xpu" in (backend.unavailable("xpu") or "")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "CUDA tensors" in (backend.unavailable("cpu") or "")
    if not torch.cuda.is_available():
        assert backend.unavailable("cuda") == "no CUDA device"
    monkeypatch.setattr(backend, "_import_failure", lambda: "triton is not installed: pip install triton")
    assert backend.unavailable("cuda") == "triton is not installed: pip install triton"


def test_import_is_light():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import fused_kd.backends.triton as t\n"
        "assert t.unavailable('cuda').startswith('triton'), t.unavailable('cuda')\n"
        "assert not [m for m in sys.modules if m.startswith('fused_kd.backends.triton_') and 'config' not in m]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
