"""USKD's CUDA kernels for rows that do not fit in the registers of a block, on the CPU: see test_cuda_on_cpu.py."""

import pytest
import torch
from cuda_cases import TOLERANCE, check, inputs, mixed

NAN = float("nan")


@pytest.mark.parametrize("classes", (3, 130, 1001, 4099))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sorted_in_global_memory(core, dtype, classes):
    """What rows beyond a block's shared memory take, at any number of classes."""
    core.limit_shared(0)
    student, weak, target = inputs(3, classes, dtype)
    target[1] = -100
    check(core, student, weak, target, ce_weight=1.0)
    check(core, student, weak.t().contiguous().t(), mixed(target.clamp(min=0), classes), ce_weight=1.0)


def test_the_device_says_how_much_a_block_gets(core):
    """12289 classes need 163 KB: a device with 99 KB sorts them in global memory, with the same result."""
    student, weak, target = inputs(2, 12289)
    results, launches = [], []
    for limit in (163, 99):
        core.limit_shared(limit * 1024)
        before = core.launches()
        results.append(check(core, student, weak, target))
        launches.append(core.launches() - before)
    assert launches[1] > launches[0]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", (4100, 4101))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_long_rows_that_start_anywhere(core, dtype, classes):
    """Student, weak logits, labels and gradients are aligned in different ways; strides and dtypes differ."""
    student, weak, target = inputs(3, classes, dtype)
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    pairs = [(x, y) for x in shifted(student, (0, 1, 3)) for y in shifted(weak, (0, 2))]
    pairs += [(student, weak.to(other)), (student.t().contiguous().t(), weak)]
    for a, b in pairs:
        check(core, a, b, target, ce_weight=1.0)
    check(core, pairs[2][0], weak, mixed(target, classes), ce_weight=1.0)


def shifted(rows, steps):
    """The rows with an odd stride, after so many elements of NaN."""
    for step in steps:
        padded = torch.full((rows.shape[0], rows.shape[1] + 5), NAN, dtype=rows.dtype)
        padded[:, step : step + rows.shape[1]] = rows
        yield padded[:, step : step + rows.shape[1]]
