"""The C++ core: the build of each instruction set, determinism, and exact conversions."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_kd
from fused_kd import check
from fused_kd.core.catalogue import ROW_LOSSES


def test_every_instruction_set_is_within_budget(native):
    names = native.instruction_sets()
    assert names[-1] == "baseline"
    for name in names:
        native.instruction_set = name
        for case in [*check.cases(True, "nkd"), *check.cases(True, "uskd")]:
            outcome = check.compare("native", case)
            assert outcome.passed, (name, case, outcome)
        for dtype in check.DTYPES:  # several blocks in a row, with a last one that is partly filled
            outcome = check.compare("native", check.Case(dtype, 3, 5000, {"temperature": 2.0, "ce_weight": 1.0}))
            assert outcome.passed, (name, dtype, outcome)


@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_long_rows_of_few_different_logits(native, loss):
    """Far from 0 the logits of half precision are multiples of 4: sums of equal terms, which round in one direction."""
    for name in native.instruction_sets():
        native.instruction_set = name
        for classes in (500, 1000, 3000, 4000, 8000):
            case = check.Case(torch.bfloat16, 7, classes, check.OPTIONS[loss][0], offset=1000.0, loss=loss)
            outcome = check.compare("native", case)
            assert outcome.passed, (name, case, outcome)


@pytest.mark.parametrize("size", [*range(2, 40), 63, 64, 65, 127, 128, 129, 255, 256, 257, 2047, 2048, 2049, 4097])
def test_every_remainder_and_target_position(native, size):
    """Sizes around the lengths of a vector and a block; targets at the start, the end and on both sides of a vector."""
    generator = torch.Generator().manual_seed(size)
    positions = sorted(
        {p for p in (0, 1, 3, 4, 7, 8, 15, 16, 17, size // 2, size - 17, size - 2, size - 1) if 0 <= p < size}
    )
    rows = len(positions)
    student, teacher = (torch.randn(rows, size, generator=generator) * 3 for _ in range(2))
    for name in native.instruction_sets():
        native.instruction_set = name
        outcome = check.compare_inputs("native", student, teacher, torch.tensor(positions), {"temperature": 2.0})
        assert outcome.passed, (name, outcome)


@pytest.mark.parametrize("dtype", check.DTYPES, ids=str)
def test_same_bits_whatever_the_thread_count(native, dtype):
    student, teacher, target = check.Case(dtype, 77, 3001, {}).inputs("cpu")
    results = []
    for threads in (1, 2, 3, 8, 2):
        torch.set_num_threads(threads)
        results.append(check.evaluate("native", student, teacher, target, {"ce_weight": 1.0}))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_conversions_are_torchs(native, dtype):
    """Every 16-bit pattern through the kernels' loads and stores, by scaling a gradient by 1 and by 1/3."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    for name in native.instruction_sets():
        native.instruction_set = name
        for factor in (1.0, 1.0 / 3.0, 3.0, 2.0**-14):
            out = torch.empty_like(patterns)
            native.scale_gradient(patterns, torch.tensor(factor), torch.tensor(1.0), out)
            expected = (patterns.float() * torch.tensor(factor)).to(dtype)
            assert torch.equal(out.isnan(), expected.isnan())
            finite = ~expected.isnan()
            assert torch.equal(out[finite].view(torch.int16), expected[finite].view(torch.int16)), (name, factor)


def test_asking_for_an_instruction_set_that_is_not_there(native):
    native.instruction_set = "avx1024"
    with pytest.raises(ValueError, match="avx1024"):
        fused_kd.nkd_loss(torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0, 1]), backend="native")


def test_concurrent_calls_from_python_threads(native):
    from concurrent.futures import ThreadPoolExecutor

    student, teacher, target = check.Case(torch.float32, 16, 3001, {}).inputs("cpu")
    expected = check.evaluate("native", student, teacher, target, {})
    with ThreadPoolExecutor(4) as pool:
        for loss, gradient in pool.map(lambda _: check.evaluate("native", student, teacher, target, {}), range(16)):
            assert torch.equal(loss, expected[0])
            assert torch.equal(gradient, expected[1])


LINUX = pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux tells what is loaded")
PROCESS = """
import os, torch, fused_kd
from fused_kd.backends import native

torch.set_num_threads(4)
logits = torch.ones(64, 5000) * 2  # PyTorch's threads are there

def call():
    fused_kd.nkd_loss(logits, logits, torch.arange(64), backend="native")

def threads():
    return len(os.listdir("/proc/self/task"))
"""


def run(code):
    """Return the lines that a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", PROCESS + code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@LINUX
def test_one_openmp_runtime_is_loaded_and_it_is_pytorchs():
    used, *loaded = run("call(); print(native.openmp_runtime(), *native.loaded_openmp_runtimes(), sep='\\n')")
    assert [Path(path).resolve() for path in loaded] == [Path(used).resolve()]


@LINUX
def test_rows_go_to_the_threads_that_are_asked_for():
    """Six threads are more than PyTorch has started, so the kernels must start a team."""
    before, after = run("torch.set_num_threads(6); print(threads()); call(); print(threads())")
    assert int(after) > int(before)


def test_memory_that_is_lacking_in_a_thread_is_an_error():
    """The process must survive: an exception that leaves an OpenMP thread would end it."""
    code = """
many = torch.zeros(2, 1).expand(2, 2**45)  # no memory itself, but each thread's scratch holds a row or two
try:
    fused_kd.nkd_loss(many, many, torch.arange(2), backend="native")
except MemoryError:
    print("MemoryError")
"""
    assert run(code) == ["MemoryError"]


@pytest.mark.parametrize("flush", (False, True))
def test_every_thread_treats_subnormal_numbers_as_the_caller_does(flush):
    """torch.set_flush_denormal sets only the calling thread."""
    same, subnormal = run(f"""
student, teacher = (torch.full((64, 4096), value).index_fill_(1, torch.tensor([0]), 0.0) for value in (-85.0, -200.0))
torch.set_flush_denormal({flush})

def gradient(threads):
    torch.set_num_threads(threads)
    leaf = student.clone().requires_grad_()
    fused_kd.kd_loss(leaf, teacher, None, temperature=1.0, backend="native").backward()
    return leaf.grad

one, four = gradient(1), gradient(4)
torch.set_flush_denormal(False)
print(torch.equal(one, four))
print(int(((four != 0) & (four.abs() < 2.0**-126)).any(dim=1).sum()))
""")
    assert (same, subnormal) == ("True", "0" if flush else "64")


def test_a_default_device_is_not_the_kernels():
    """A caller in C++, such as AOTInductor's, leaves PyTorch's mode for it on inside an op."""
    assert run("""
logits, target = torch.randn(4, 7), torch.arange(4)
expected = native.uskd_batch_sums(logits, target, True, -100), native.argsort_descending(logits)
with torch.device("meta"):
    found = native.uskd_batch_sums(logits, target, True, -100), native.argsort_descending(logits)
print(all(map(torch.equal, found, expected)))
""") == ["True"]


def test_logits_whose_memory_was_freed(native):
    """F.cross_entropy raises a RuntimeError, too. FSDP frees parameters in this way."""
    given = [torch.randn(4, 7), torch.randn(4, 7), torch.arange(4)]
    for place in range(3):
        arguments = list(given)
        arguments[place] = arguments[place].clone()
        arguments[place].untyped_storage().resize_(0)
        for options in ({}, {"reduction": "none"}):
            with pytest.raises(RuntimeError, match="whose storage is empty"):
                fused_kd.nkd_loss(*arguments, **options)
