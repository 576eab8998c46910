"""Every loss on every fused backend against its reference: golden values, gradients, the grid, rows that are special.

NKD and USKD have further tests of their own; a loss added to the registry is tested here without another line.
"""

import inspect
import json
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck

import fused_kd
from fused_kd import backends, check, registry
from fused_kd.backends import triton_config
from fused_kd.registry import LOSSES, ROW_LOSSES

pytestmark = [
    pytest.mark.usefixtures("quick_interpreter"),
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # NumPy, of the interpreter's inf and NaN
]

INF = float("inf")
#: (loss, backend, device) of everything that runs here.
HERE = [
    (loss, name, device)
    for loss in LOSSES
    if loss != "uskd"
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    for name in ("reference", *check.runnable(device, loss))
]
FUSED = [place for place in HERE if place[1] != "reference"]
every_loss = pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "uskd"])
here = pytest.mark.parametrize("place", HERE, ids="-".join)
fused_here = pytest.mark.parametrize("place", FUSED, ids="-".join)
GOLDEN = json.loads((Path(__file__).parent / "data" / "published.json").read_text())["cases"]
GOLDEN_NAMES = {"tf_kd_reg": "tf_kd"}


def function(loss):
    return getattr(fused_kd, LOSSES[loss].function)


def has(loss, option):
    return option in inspect.signature(function(loss)).parameters


def make(loss, rows=6, classes=9, dtype=torch.float64, device="cpu", scale=2.0):
    """The tensors that a loss takes after the student's, and the student's logits."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    dense = torch.randn(rows, 5, classes, generator=generator, dtype=torch.float64)
    others = {"tf_kd": [], "zipf_ls": [dense]}.get(loss, [teacher])
    student, *others = (tensor.to(device, dtype) for tensor in (student, *others))
    return student, others, target.to(device)


def mixed(rows=6, classes=9, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.rand(rows, classes, generator=generator, dtype=torch.float64)).softmax(1).to(device)


def run(loss, backend, student, others, target, **options):
    """Loss, parts and gradient."""
    student = student.detach().clone().requires_grad_()
    value, parts = function(loss)(student, *others, target, backend=backend, return_parts=True, **options)
    value.sum().backward()
    return value.detach(), torch.stack(tuple(parts)), student.grad


def compare(place, student, others, target, *, tolerance=1e-11, **options):
    """Of a backend and the reference, in float64."""
    loss, name, device = place
    student, *others, target = (tensor.to(device) for tensor in (student, *others, target))
    for ours, exact in zip(
        run(loss, name, student, others, target, **options),
        run(loss, "reference", student, others, target, **options),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance, equal_nan=True)


@here
def test_golden(place):
    loss, name, device = place
    cases = [case for case in GOLDEN if GOLDEN_NAMES.get(case["loss"], case["loss"]) == loss]
    assert cases
    for case in cases:
        inputs = {
            key: torch.tensor(value, dtype=None if key == "target" else torch.float64, device=device)
            for key, value in case["inputs"].items()
        }
        others = [inputs[key] for key in {"tf_kd": [], "zipf_ls": ["dense_logits"]}.get(loss, ["teacher_logits"])]
        params = {"correct" if key == "correct_prob" else key: value for key, value in case["params"].items()}
        if loss == "zipf_ls":
            params["weight"] = 1.0
        value, _, gradient = run(loss, name, inputs["student_logits"], others, _labels(case, device), **params)
        tolerance = 1e-6 if "1e-6" in case["source"] else 1e-8
        torch.testing.assert_close(value.item(), case["value"], rtol=tolerance, atol=tolerance)
        expected = torch.tensor(case["grads"]["student_logits"], dtype=torch.float64, device=device)
        torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


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
        )


@fused_here
@pytest.mark.parametrize("dtype", check.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("classes", (2, 3, 10, 100, 1000, 1001, 4096, 21841))
def test_within_budget(place, dtype, classes):
    loss, name, device = place
    slow = name == "triton" and device == "cpu"
    if slow and classes not in (2, 3, 100, 1001):
        pytest.skip("too slow under Triton's interpreter")
    # The divergence of a single row may be next to nothing, which float32 formulas have fewer digits of.
    for rows in (0, 3) if name == "triton" else (0, 1, 7):
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


@fused_here
@pytest.mark.parametrize("dtype", check.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_standardization_within_budget(place, dtype):
    """As a sum: a mean of float16 rows ends among numbers that have fewer digits, and is rounded there once more."""
    loss, name, device = place
    if not has(loss, "logit_standardization"):
        pytest.skip("without a teacher there is none")
    for classes in (10, 100) if name == "triton" and device == "cpu" else (10, 100, 1000):
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
        for temperature in (1.0, 2.0, 3.0, 4.0):
            for ce_weight, smoothing in ((0.0, 0.0), (0.7, 0.0), (0.7, 0.2)):
                options = {"ce_weight": ce_weight, "label_smoothing": smoothing, "reduction": reduction}
                if has(loss, "temperature"):
                    options["temperature"] = temperature
                compare(place, student, others, labels, **options)
                if has(loss, "logit_standardization"):
                    compare(place, student, others, labels, **options, logit_standardization=True)


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


@here
def test_shapes_and_errors(place):
    loss, name, device = place
    student, others, target = make(loss, rows=6, device=device)
    if loss != "dist":
        flat = function(loss)(student, *others, target, reduction="none", backend=name)
        folded = [tensor.reshape(2, 3, *tensor.shape[1:]) for tensor in (student, *others, target)]
        assert torch.equal(function(loss)(*folded, reduction="none", backend=name), flat.reshape(2, 3))
    with pytest.raises(ValueError, match="ce_weight: expected a finite number of at least 0, got -1"):
        function(loss)(student, *others, target, ce_weight=-1.0, backend=name)
    with pytest.raises(ValueError, match="label_smoothing: expected a number from 0 to below 1, got 1"):
        function(loss)(student, *others, target, label_smoothing=1.0, backend=name)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        function(loss)(student, *others, target, reduction="batchmean", backend=name)
    with pytest.raises(ValueError, match="target: expected"):
        function(loss)(student, *others, target[:2], backend=name)
    if device == "cpu" and name != "triton":
        with pytest.raises(IndexError, match="target: expected class indices from 0 to 8"):
            function(loss)(student, *others, target + 100, backend=name)
    if others and loss != "zipf_ls":
        with pytest.raises(ValueError, match="teacher_logits: expected logits that do not require grad"):
            function(loss)(student, others[0].requires_grad_(), target, backend=name)


@here
def test_without_targets(place):
    loss, name, device = place
    if loss not in ("kd", "dist"):
        pytest.skip("it needs targets")
    student, others, target = make(loss, device=device)
    torch.testing.assert_close(
        function(loss)(student, *others, backend=name), function(loss)(student, *others, target, backend=name)
    )
    with pytest.raises(ValueError, match=r"target: expected one, since ce_weight is 1\.0; got None"):
        function(loss)(student, *others, ce_weight=1.0, backend=name)


@here
def test_modules(place):
    loss, name, device = place
    student, others, target = make(loss, device=device)
    module = getattr(fused_kd, LOSSES[loss].module)(ce_weight=0.5, reduction="sum", backend=name)
    value, parts = module(student, *others, target, return_parts=True)
    expected = function(loss)(student, *others, target, ce_weight=0.5, reduction="sum", backend=name)
    assert torch.equal(value, expected)
    torch.testing.assert_close(torch.stack(tuple(parts)).sum(), value)
    for option, default in LOSSES[loss].defaults.items():
        assert f"{option}={0.5 if option == 'ce_weight' else default!r}" in repr(module)
    assert module.state_dict() == {}


@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("standardize", (False, True))
def test_opcheck(loss, standardize, native):
    student, others, target = make(loss, dtype=torch.float32)
    weights = [1.0, 0.5, 2.0, 0.7, 0.1]
    teacher = others[0] if others else None
    after = (standardize and bool(others), -100, "mean", True, "native")
    opcheck(torch.ops.fused_kd.row_loss.default, (student, teacher, target, loss, weights, *after))
    weights = torch.tensor(weights, dtype=torch.float64)
    opcheck(torch.ops.fused_kd.row_loss_scheduled.default, (student, teacher, target, loss, weights, *after))


def test_opcheck_of_votes(native):
    student, (dense,), target = make("zipf_ls", dtype=torch.float32)
    for reduction in ("mean", "none"):
        after = ([0.1, 1.0, 0.7, 0.1], -100, reduction, True, "native")
        opcheck(torch.ops.fused_kd.zipf_ls.default, (student, dense, target, *after))


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_whole_and_only_once_more_when_weights_change(loss):
    """A float is taken for a constant until it changes once; from then on it is an input of the graph."""
    student, others, target = make(loss, dtype=torch.float32)
    if backends.choose("auto", "cpu", loss) == "reference":
        pytest.skip("the reference is ordinary PyTorch")
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    schedule = {"uskd": "beta", "zipf_ls": "weight"}.get(loss, "temperature")

    @torch.compile(backend=counter, fullgraph=True)
    def step(s, value, ce_weight):
        return function(loss)(s, *others, target, ce_weight=ce_weight, **{schedule: value})

    for turn in range(6):
        value, ce_weight = 1.0 + 0.5 * turn, 0.1 + 0.1 * turn
        compiled = step(student.requires_grad_(), value, ce_weight)
        eager = function(loss)(student, *others, target, ce_weight=ce_weight, **{schedule: value})
        torch.testing.assert_close(compiled, eager)
        assert counter.frame_count == min(turn + 1, 2)
    torch._dynamo.reset()


@every_loss
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
    for name, value in {"ON_CHIP": (), "ON_CHIP_PROBABILITIES": (), "ON_CHIP_WIDE": (), "LOOPED_WARPS": 1}.items():
        monkeypatch.setattr(triton_config, name, value)
    triton_config.row_config.cache_clear()
    student, others, target = make(loss, rows=3, classes=301)
    student[0, 7], target[1] = -INF, -100
    if others:
        others[0][0, 7] = others[0][2, 250] = -INF
    for labels in (target, mixed(3, 301)):
        for options in ({}, {"temperature": 3.0, "ce_weight": 0.7, "label_smoothing": 0.2}):
            compare(place, student, others, labels, reduction="none", **options)
            if has(loss, "logit_standardization"):
                compare(place, student, others, labels, reduction="none", **options, logit_standardization=True)
    triton_config.row_config.cache_clear()


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
            options = {"weight": 1.0, "power": 0.7, "ce_weight": 0.5, "reduction": "none"}
            compare(place, student, [dense], labels, **options)


def test_registry():
    for loss in fused_kd.losses():
        assert LOSSES[loss.name] is loss
        assert loss.defaults["ce_weight"] == 0.0
        assert callable(getattr(fused_kd, loss.module))
        assert loss.function in fused_kd.__all__ and loss.module in fused_kd.__all__
        for device, names in loss.backends.items():
            assert device in ("cpu", "cuda") and names[-1] == "reference"
    assert set(ROW_LOSSES) < set(LOSSES)


def test_documents_are_in_step():
    """To write them anew: python -m fused_kd losses --write."""
    root = Path(__file__).parent.parent
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert f"<!-- losses:begin -->\n{registry.markdown_table()}\n<!-- losses:end -->" in readme
    assert (root / "docs" / "losses.md").read_text(encoding="utf-8") == registry.markdown_page()
    for loss in LOSSES.values():
        assert loss.formula in readme


def test_decompose():
    student, (teacher,), target = make("nkd")
    target[1] = -100
    student.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        parts = fused_kd.decompose(student, teacher, target, temperature=2.0, reduction=reduction)
        options = {"temperature": 2.0, "reduction": reduction}
        torch.testing.assert_close(
            parts.nkd_target + 1.5 * parts.nkd_non_target, fused_kd.nkd_loss(student, teacher, target, **options)
        )
        torch.testing.assert_close(
            parts.dkd_binary + 8.0 * parts.dkd_non_target, fused_kd.dkd_loss(student, teacher, target, **options)
        )
    folded = fused_kd.decompose(
        student.reshape(2, 3, 9), teacher.reshape(2, 3, 9), target.reshape(2, 3), temperature=2.0, reduction="none"
    )
    assert folded.kd_target.shape == (2, 3)
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        fused_kd.decompose(student, teacher, target, temperature=0.0)
