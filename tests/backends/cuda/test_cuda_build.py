"""The CUDA build: its architectures, the reason if it is left out, launch parameters, and no spills."""

import math
import struct

import pytest

from fused_kd import backends
from fused_kd.backends import native
from fused_kd.backends.native import cuda


@pytest.fixture
def core():
    return native._core


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8.0", ["80-real"]),
        ("8.0;9.0+PTX", ["80-real", "90-real", "90-virtual"]),
        ("8.0 8.6  8.9 9.0", ["80-real", "86-real", "89-real", "90-real"]),
        ("8.0, 9.0a ; 10.0+PTX 12.0", ["80-real", "90a-real", "100-real", "100-virtual", "120-real"]),
        ("9.0 9.0+PTX", ["90-real", "90-virtual"]),
        ("6.1 7.0 7.5 8.6", ["86-real"]),
    ],
)
def test_architecture_lists(build, text, found):
    assert build.parse_architectures(text) == found


@pytest.mark.parametrize("text", ["Hopper", "90", "8.0;ninety", "8.0+SASS", "7.0 7.5"])
def test_architecture_lists_that_are_refused(build, text):
    with pytest.raises(build.NoCuda, match="TORCH_CUDA_ARCH_LIST"):
        build.parse_architectures(text)


def test_cuda_is_left_out_with_the_reason(build, monkeypatch, tmp_path):
    def reason(**environment):
        for name in ("TORCH_CUDA_ARCH_LIST", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(build.NoCuda) as caught:
            build.cuda_options()
        return str(caught.value)

    monkeypatch.setattr(build, "visible_architectures", list)
    assert "no GPU" in reason()
    assert "expected architectures such as" in reason(TORCH_CUDA_ARCH_LIST="fast")
    assert "no nvcc" in reason(TORCH_CUDA_ARCH_LIST="9.0", PATH=str(tmp_path), CUDA_HOME=str(tmp_path))
    assert "does not run" in reason(TORCH_CUDA_ARCH_LIST="9.0", CUDACXX=str(tmp_path / "nvcc"))
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert "does not run" in reason(TORCH_CUDA_ARCH_LIST="9.0", CUDACXX=str(broken))
    broken.write_text("#!/bin/sh\necho compute_80\n")
    assert "does not know the architecture 90-real" in reason(TORCH_CUDA_ARCH_LIST="9.0", CUDACXX=str(broken))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0+PTX")
    assert build.cuda_options() == [f"-DCMAKE_CUDA_COMPILER={broken}", "-DFKD_CUDA_ARCHITECTURES=80-real;80-virtual"]


def test_the_module_says_what_it_has(core):
    assert bool(core.cuda_architectures) != bool(core.cuda_missing)
    if core.cuda_missing:
        assert "without CUDA" in core.cuda_missing
        assert cuda.unavailable(core) == core.cuda_missing
        assert not hasattr(core, "cuda_uskd")
    assert "NKD" in backends.unavailable("native", "cuda", "nkd")


def test_every_row_has_an_arrangement_that_holds_it(core):
    arrangements = core.cuda_arrangements()
    capacities = [threads * items for threads, items, _ in arrangements]
    assert capacities == sorted(capacities)
    for (threads, items, shared), capacity in zip(arrangements, capacities, strict=True):
        assert threads % 32 == 0
        assert threads & (threads - 1) == 0, "the reductions' butterflies"
        assert items % 4 == 0, "loads of four classes"
        assert capacity <= 2**15, "places of 16 bits"
        assert shared <= 163 * 1024, "what compute capability 8.0 gives"
    for classes in {2, 3, *(c + d for c in capacities for d in (-1, 0, 1))}:
        chosen = core.cuda_arrangement_for(classes, False, 227 * 1024)
        if classes > capacities[-1]:
            assert chosen == -1
        else:
            assert capacities[chosen] >= classes
            assert chosen == 0 or capacities[chosen - 1] < classes
        assert core.cuda_arrangement_for(classes, True, 227 * 1024) == -1


def test_a_device_that_gives_less_shared_memory_sorts_long_rows_in_global_memory(core):
    for kilobytes, longest in ((227, 24576), (163, 24576), (99, 12288), (48, 4096)):
        assert core.cuda_arrangement_for(longest, False, kilobytes * 1024) >= 0
        assert core.cuda_arrangement_for(longest + 1, False, kilobytes * 1024) == -1


def test_passes_of_a_sort_in_global_memory(core):
    assert core.cuda_rows_per_pass(5, 21841) == 5
    assert core.cuda_rows_per_pass(10**6, 21841) == 768
    assert core.cuda_rows_per_pass(8192, 128256) == 130
    assert core.cuda_rows_per_pass(8, 2**31 - 1) == 1
    for classes in (2, 1000, 128256, 2**25):
        rows = core.cuda_rows_per_pass(10**9, classes)
        assert rows == 1 or rows * classes <= 2**24, "CUB's offsets have 32 bits"
        threads = core.cuda_streaming_threads(classes)
        assert threads in (64, 256, 512)


def test_blocks_and_threads(core):
    """Enough for every row and class, within a launch's limits, and powers of two for the reductions."""
    assert core.cuda_reducing_blocks(10**6, False) == 1, "one block sums, so that the order depends on nothing else"
    for rows in (0, 1, 1024, 1025, 10**6, 2**31 - 1):
        blocks = core.cuda_reducing_blocks(rows, True)
        assert 1 <= blocks <= 1024
        assert blocks == 1024 or blocks * 1024 >= rows, "or each block takes several"
        threads = core.cuda_summing_threads(rows)
        assert threads in (128, 1024) and (threads == 1024 or rows <= 128)
    for classes in (1, 8191, 8192, 8193, 128256, 2**40):
        pieces = core.cuda_scaling_pieces(classes)
        assert (pieces - 1) * 8192 < classes <= pieces * 8192
    assert core.cuda_scaling_pieces(2**40) < 2**31, "blocks of a launch"


def test_workspace(core):
    """Room for four parts per row, and aligned for vectors and CUB."""
    for element in (4, 8):
        for rows in (0, 1, 63, 64, 1000, 2**31):
            size = core.cuda_parts_bytes(rows, element)
            assert size % 256 == 0
            assert 4 * element * rows <= size < 4 * element * rows + 256


def test_keys_as_integers(core):
    """Ascending integers are descending keys; both zeros are equal."""
    keys = [math.inf, 1e6, 2.0, math.nextafter(2.0, 0), 1.0, 1e-45, 0.0, -1e-45, -1.0, -math.inf]
    singles = [struct.unpack("f", struct.pack("f", key))[0] for key in keys]
    for values, twice in ((sorted({*singles}, reverse=True), False), (keys, True)):
        bits = [core.cuda_descending_bits(key, twice) for key in values]
        assert bits == sorted(bits)
        assert len({*bits}) == len(bits)
        assert max(bits) < (2**64 if twice else 2**32) - 1, "what is past the row's end sorts last"
        assert core.cuda_descending_bits(-0.0, twice) == core.cuda_descending_bits(0.0, twice)


def test_stored_scales(core):
    """float16 (3) keeps a power of two; the product of scale and norm is 1 / rows for every dtype."""
    for rows in (1, 2, 3, 7, 1000, 2**31 - 1):
        for dtype, scale in ((0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0**14)):
            stored, norm = core.cuda_stored_scale(dtype, scale, rows)
            assert stored * norm == pytest.approx(1 / rows, rel=1e-15)
            if dtype == 3:
                assert scale / 2 < stored <= scale
                assert math.frexp(norm)[0] == 0.5
            else:
                assert norm == 1.0
