"""Every loss on every fused backend against its reference: golden values, gradients, the grid, rows that are special.

NKD and USKD have further tests of their own; a loss added to the catalogue is tested here without another line.
"""

import golden
import pytest
import torch
from loss_cases import FUSED, HERE, INF, compare, function, has, make, mixed, run

from fused_kd import check
from fused_kd.backends.triton import layout
from fused_kd.core.catalogue import LOSSES, ROW_LOSSES

here = pytest.mark.parametrize("place", HERE, ids="-".join)
fused_here = pytest.mark.parametrize("place", FUSED, ids="-".join)
GOLDEN = golden.CASES
GOLDEN_NAMES = {"tf_kd_reg": "tf_kd"}


@here
def test_golden(place):
    loss, name, device = place
    cases = [case for case in GOLDEN if GOLDEN_NAMES.get(case["loss"], case["loss"]) == loss]
    assert bool(cases) == bool(LOSSES[loss].published)
    for case in cases:
        assert case["source"].startswith(LOSSES[loss].published)
        inputs = {
            key: torch.tensor(value, dtype=None if key == "target" else torch.float64, device=device)
            for key, value in case["inputs"].items()
        }
        others = [inputs[key] for key in {"tf_kd": [], "zipf_ls": ["dense_logits"]}.get(loss, ["teacher_logits"])]
        params = {"correct" if key == "correct_prob" else key: value for key, value in case["params"].items()}
        if loss == "zipf_ls":
            params["beta"] = 1.0
        value, _, gradient = run(loss, name, inputs["student_logits"], others, _labels(case, device), **params)
        tolerance = 1e-6 if "1e-6" in case["source"] else 1e-8
        torch.testing.assert_close(value.item(), case["value"], rtol=tolerance, atol=tolerance)
        expected = torch.tensor(case["grads"]["student_logits"], dtype=torch.float64, device=device)
        torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


def _interpreted(place):
    """Where a kernel takes a tenth of a second."""
    return place[1:] == ("triton", "cpu")


def _labels(case, device):
    target = torch.tensor(case["inputs"]["target"], dtype=torch.float64, device=device)
    return target if target.dim() == 2 else target.long()


@fused_here
@pytest.mark.parametrize("soft", (False, True))
def test_gradcheck(place, soft):
    loss, name, device = place
    student, others, target = make(loss, rows=3, classes=7, device=device)
    target = mixed(3, 7, device) if soft else target
    # WSLD's u is a constant to the gradient, and so no function that could be differentiated numerically.
    options = {"ce_weight": 0.0, "alpha": 0.0} if loss == "wsld" else {"ce_weight": 0.7, "label_smoothing": 0.1}
    extra = {"logit_standardization": True} if has(loss, "logit_standardization") and name != "triton" else {}
    for further in ({}, extra):
        assert torch.autograd.gradcheck(
            lambda s, further=further: function(loss)(s, *others, target, backend=name, **options, **further),
            student.requires_grad_(),
            fast_mode=_interpreted(place),
        )


@fused_here
@pytest.mark.parametrize("dtype", check.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("classes", (2, 3, 10, 100, 1000, 1001, 4096, 21841))
def test_within_budget(place, dtype, classes):
    loss, name, device = place
    if _interpreted(place) and classes not in (2, 3, 100, 1001):
        pytest.skip("too slow under Triton's interpreter")
    # The divergence of a single row may be next to nothing, which float32 formulas have fewer digits of.
    # Of two rows that count DIST's columns have the correlation 1 or -1, and their gradient is rounding, see below:
    # eager's error in float32 is then from 6e-8 to 1e-4 over a dozen seeds at 100 classes; of six rows it is 4e-8.
    few = (0, 7) if loss == "dist" else (0, 3)
    for rows in few if name == "triton" or loss in ("js", "kd", "dkd") else (0, 1, 7):
        for options in check.OPTIONS[loss]:
            outcome = check.compare(name, check.Case(dtype, rows, classes, options, loss=loss), device)
            assert outcome.passed, (rows, options, outcome)
    for case in (
        check.Case(dtype, 7, classes, {"ce_weight": 1.0, "label_smoothing": 0.1}, soft=True, loss=loss),
        check.Case(dtype, 7, classes, {"ce_weight": 1.0, "label_smoothing": 0.1}, loss=loss),
        check.Case(dtype, 7, classes, {}, spread=100.0, loss=loss),
    ):
        outcome = check.compare(name, case, device)
        assert outcome.passed, (case, outcome)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("place", [place for place in FUSED if place[:2] in (("kd", "native"), ("dkd", "native"))])
def test_single_rows_are_as_exact_as_eagers(place, dtype):
    """The error of one row is one draw, and eager's may be next to nothing by luck: of many rows, one by one, the root
    of the mean square is compared."""
    loss, name, device = place
    ours, eager = [], []
    for seed in range(64):
        tensors = check.Case(dtype, 1, 1001, {}, loss=loss, seed=seed).inputs(device)
        doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
        exact = check.evaluate("reference", *doubles, {}, None, loss)[0]
        for errors, backend in ((ours, name), (eager, "reference")):
            errors.append((check.evaluate(backend, *tensors, {}, None, loss)[0].double() / exact - 1).item())
    assert torch.tensor(ours).norm() <= torch.tensor(eager).norm()


@pytest.mark.parametrize("classes", (10, 1000))
def test_the_gradient_of_two_rows_of_dist_is_as_exact_as_eagers(classes):
    """Over two rows, a column's correlation is 1 or -1. Its gradient is what is left of two terms that cancel."""
    if "native" not in check.runnable("cpu", "dist"):
        pytest.skip("there is no core")
    errors = {"native": [], "reference": []}
    for seed in range(100):
        tensors = check.Case(torch.float32, 2, classes, {}, loss="dist", seed=seed).inputs("cpu")
        doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
        exact = check.evaluate("reference", *doubles, {}, None, "dist")[1]
        for backend, found in errors.items():
            gradient = check.evaluate(backend, *tensors, {}, None, "dist")[1].double()
            found.append((gradient - exact).abs().max() / exact.abs().max())
    ours, eager = (torch.stack(found).quantile(torch.tensor([0.5, 0.9]).double()) for found in errors.values())
    assert bool((ours <= 1.25 * eager).all()), (ours, eager)


@fused_here
@pytest.mark.parametrize("dtype", check.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_standardization_within_budget(place, dtype):
    """As a sum: a mean of float16 rows ends among numbers that have fewer digits, and is rounded there once more."""
    loss, name, device = place
    if not has(loss, "logit_standardization"):
        pytest.skip("without a teacher there is none")
    for classes in (10, 100) if _interpreted(place) else (10, 100, 1000):
        for options in ({}, {"temperature": 1.0}, {"temperature": 3.0, "ce_weight": 1.0, "label_smoothing": 0.1}):
            given = {**options, "logit_standardization": True, "reduction": "sum"}
            outcome = check.compare(name, check.Case(dtype, 77, classes, given, loss=loss), device)
            assert outcome.passed, (classes, options, outcome)


@fused_here
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
def test_options_together(place, reduction):
    loss = place[0]
    student, others, target = make(loss)
    target[1] = -100
    for labels in (target, mixed()):
        for temperature in (1.0, 3.0) if _interpreted(place) else (1.0, 2.0, 3.0, 4.0):
            for ce_weight, smoothing in ((0.0, 0.0), (0.7, 0.0), (0.7, 0.2)):
                options = {"ce_weight": ce_weight, "label_smoothing": smoothing, "reduction": reduction}
                if has(loss, "temperature"):
                    options["temperature"] = temperature
                compare(place, student, others, labels, **options)
                if has(loss, "logit_standardization"):
                    compare(place, student, others, labels, **options, logit_standardization=True)


@fused_here
def test_rows_weighted_one_by_one(place):
    """What comes into the backward pass of every row differs; DIST's second term belongs to all of them."""
    loss, name, device = place
    student, others, target = make(loss, device=device)
    target[1] = -100
    weights = torch.arange(1.0, 7.0, dtype=torch.float64, device=device)
    gradients = []
    for backend in (name, "reference"):
        leaf = student.clone().requires_grad_()
        rows = function(loss)(leaf, *others, target, ce_weight=0.5, reduction="none", backend=backend)
        rows.backward(weights)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


@fused_here
def test_special_rows(place):
    """Classes that are impossible for either side, equal logits, NaN, infinities; each in a row of its own."""
    loss = place[0]
    student, others, target = make(loss, rows=12)
    other = others[0] if loss not in ("tf_kd", "zipf_ls") else student.clone()
    y = target.tolist()
    student[0, (y[0] + 1) % 9] = -INF
    other[1, (y[1] + 1) % 9] = -INF
    student[2, (y[2] + 1) % 9] = other[2, (y[2] + 1) % 9] = -INF
    student[3, y[3]] = -INF
    other[4, y[4]] = -INF
    student[5, y[5]] = other[5, y[5]] = -INF
    for j in range(9):
        if j != y[6]:
            student[6, j] = other[6, j] = -INF
    student[7] = 3.0
    other[8] = 3.0
    student[9, 4] = float("nan")
    other[10, 4] = float("nan")
    target[11] = -100
    student[11] = float("nan")
    if loss == "dist":  # whose column term takes a NaN to every row
        keep = [0, 1, 2, 3, 4, 5, 7, 8, 11]
        student, target, others = student[keep], target[keep], [tensor[keep] for tensor in others]
    for options in ({}, {"ce_weight": 0.5}, {"ce_weight": 0.5, "label_smoothing": 0.1}):
        compare(place, student, others, target, reduction="none", **options)


@fused_here
def test_standardized_special_rows(place):
    loss = place[0]
    if not has(loss, "logit_standardization"):
        pytest.skip("without a teacher there is none")
    student, others, target = make(loss, rows=4)
    teacher = others[0]
    student[0, (target[0] + 1) % 9] = teacher[0, (target[0] + 1) % 9] = -INF
    teacher[1, (target[1] + 1) % 9] = -INF
    student[2] = 1.5
    student[3] += 1000.0
    teacher[3] -= 1000.0
    compare(place, student, others, target, reduction="none", logit_standardization=True, tolerance=1e-9)


@here
@pytest.mark.parametrize("dtype, gap", [(torch.float32, 300.0), (torch.float32, 3e4), (torch.float16, 6e4)])
def test_saturated_rows_stay_finite(place, dtype, gap):
    """Where the published forms of KD and DKD give inf and NaN: the softmax underflows, its logarithm does not."""
    loss, name, device = place
    student, others, target = make(loss, rows=4, dtype=torch.float32, scale=1.0)
    rows = torch.arange(4)
    student[rows, (target + 1) % 9] = gap
    if loss not in ("tf_kd", "zipf_ls"):
        others[0][rows, target] = gap
    student, *others, target = (
        tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        for tensor in (student, *others, target)
    )
    ours = run(loss, name, student, others, target, ce_weight=0.5)
    exact = run(loss, "reference", student.double(), [o.double() for o in others], target, ce_weight=0.5)
    for value, wanted in zip(ours, exact, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value.double(), wanted, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "uskd"])
def test_threads_and_instruction_sets_agree(loss, native):
    if "native" not in LOSSES[loss].backends["cpu"]:
        pytest.skip("no C++ kernel")
    student, others, target = make(loss, rows=40, classes=2500, dtype=torch.float32)
    options = {"ce_weight": 0.5, "label_smoothing": 0.1}
    if has(loss, "logit_standardization"):
        options["logit_standardization"] = True
    exact = run(loss, "reference", student.double(), [o.double() for o in others], target, **options)
    for name in native.instruction_sets():
        native.instruction_set = name
        torch.set_num_threads(1)
        single = run(loss, "native", student, others, target, **options)
        torch.set_num_threads(2)
        double = run(loss, "native", student, others, target, **options)
        for one, two, wanted in zip(single, double, exact, strict=True):
            assert torch.equal(one, two)
            torch.testing.assert_close(one.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_triton_rows_that_are_walked(loss, monkeypatch):
    """As rows too long to be held on chip are, with so few threads that a hundred classes are several tiles."""
    place = (loss, "triton", "cuda" if torch.cuda.is_available() else "cpu")
    if place not in HERE:
        pytest.skip("Triton does not run here")
    for name, value in {"ON_CHIP": (), "ON_CHIP_MORE": (), "ON_CHIP_WIDE": (), "LOOPED_WARPS": 1}.items():
        monkeypatch.setattr(layout, name, value)
    layout.row_config.cache_clear()
    student, others, target = make(loss, rows=3, classes=301)
    student[0, 7], target[1] = -INF, -100
    if others:
        others[0][0, 7] = others[0][2, 250] = -INF
    for labels in (target, mixed(3, 301)):
        for options in ({}, {"temperature": 3.0, "ce_weight": 0.7, "label_smoothing": 0.2}):
            compare(place, student, others, labels, reduction="none", **options)
            if has(loss, "logit_standardization"):
                compare(place, student, others, labels, reduction="none", **options, logit_standardization=True)
    layout.row_config.cache_clear()


@pytest.mark.parametrize("classes", (2, 3, 40, 2500))
@pytest.mark.parametrize("positions", (1, 5, 70))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_votes_of_positions_anywhere(classes, positions, dtype, native):
    """A map of logits (N, C, H, W), whose positions lie side by side, and other layouts; few values, so ties."""
    generator = torch.Generator().manual_seed(3)
    student, _, target = make("zipf_ls", rows=4, classes=classes, dtype=torch.float64)
    chart = torch.randint(0, 4, (4, classes, positions), generator=generator).to(dtype)
    chart[1] = -INF
    chart[2, classes - 1, positions // 2] = float("nan")
    layouts = (chart.transpose(1, 2), chart.transpose(1, 2).contiguous(), chart.repeat(2, 1, 1)[::2].transpose(1, 2))
    for dense in (*layouts, torch.stack([chart, chart], 3)[..., 0].transpose(1, 2)):
        for labels in (target, mixed(4, classes)):
            place = ("zipf_ls", "native", "cpu")
            options = {"beta": 1.0, "power": 0.7, "ce_weight": 0.5, "reduction": "none"}
            compare(place, student, [dense], labels, **options)
