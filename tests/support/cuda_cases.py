"""USKD by a module of the CUDA kernels' calls on CPU tensors, and against the reference in float64."""

import torch

from fused_kd import reference
from fused_kd.backends.native import cuda
from fused_kd.core.options import HyperParameters, Options

#: A few units in the last place: of the accumulating dtype for the loss, of its own for a gradient.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}

WEIGHTS = {"alpha": 1.0, "beta": 0.1, "mu": 0.005, "ce_weight": 0.0, "label_smoothing": 0.0}
DEFAULTS = {"rank": "normalized", "square": True, "ignore_index": -100, "reduction": "mean"}


def asking(wanted=(True, True), scale=1.0, **changed):
    hyper = HyperParameters(**{name: changed.pop(name, value) for name, value in WEIGHTS.items()})
    return Options(hyper, wanted=wanted, scales=(scale, scale), **{**DEFAULTS, **changed})


def ours(core, student, weak, target, scale=1.0, **changed):
    """Loss, parts, both gradients and the batch sums."""
    asked = asking(scale=scale, **changed)
    for_sums = student.double() if weak.dtype == torch.float64 else student
    sums = cuda.uskd_batch_sums(core, for_sums, target, asked.square, asked.ignore_index)
    loss, parts, *rest = cuda.uskd(core, student, weak, target, sums, None, asked)
    student_gradient, weak_gradient, student_norm, weak_norm = rest
    one = torch.ones((), dtype=loss.dtype)
    cuda.scale_gradient(core, student_gradient, one, student_norm, student_gradient)
    cuda.scale_gradient(core, weak_gradient, one, weak_norm, weak_gradient)
    return loss, parts, student_gradient, weak_gradient, sums


def expected(student, weak, target, **options):
    student, weak = (x.double().detach().requires_grad_() for x in (student, weak))
    target = target.double() if target.is_floating_point() else target
    loss, parts = reference.uskd_loss(student, weak, target, **options)
    loss.sum().backward()
    wanted = {key: options[key] for key in ("square", "ignore_index") if key in options}
    sums = reference.uskd_batch_sums(student, target, **wanted)
    return loss.detach(), torch.stack(list(parts)), student.grad, weak.grad, sums


def check(core, student, weak, target, **options):
    """All against the reference in float64; infinities and NaN in the same places."""
    accumulate = reference.accumulation_dtype(student, weak)
    dtypes = (accumulate, accumulate, student.dtype, weak.dtype, accumulate)
    got, wanted = ours(core, student, weak, target, **options), expected(student, weak, target, **options)
    for name, a, b, dtype in zip(("loss", "parts", "student", "weak", "sums"), got, wanted, dtypes, strict=True):
        assert a.shape == b.shape, name
        assert a.dtype == (torch.float64 if name == "sums" else dtype), name
        a = a.double()
        usual = b.isfinite()
        special = [torch.where(usual, 0.0, x).nan_to_num(7.0, 8.0, 9.0) for x in (a, b)]
        assert torch.equal(*special), name
        largest = b[usual].abs().max().clamp(min=1e-3) if usual.any() else 1.0
        error = ((a - b)[usual].abs() / largest).max() if usual.any() else 0.0
        assert error <= TOLERANCE[dtype], (name, float(error))
    return got


def inputs(rows, classes, dtype=torch.float32, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, weak = ((torch.randn(rows, classes, generator=generator) * spread).to(dtype) for _ in range(2))
    return student, weak, torch.randint(classes, (rows,), generator=generator)


def mixed(target, classes, share=0.7, smoothing=0.0):
    one_hot = torch.nn.functional.one_hot
    labels = share * one_hot(target, classes).float() + (1 - share) * one_hot(target.roll(1), classes).float()
    return (1 - smoothing) * labels + smoothing / classes
