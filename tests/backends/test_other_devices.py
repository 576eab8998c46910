"""Devices other than CPUs and NVIDIA GPUs: the reference runs there, and explain() gives the reason."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fused_kd
from fused_kd import Head, backends, check, reference
from fused_kd.backends import native, triton
from fused_kd.backends.triton import launch, layout
from tools.compile_matrix.machine_code import read_amdgcn

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")


@pytest.mark.parametrize("kind", ("mps", "xpu"))
@pytest.mark.parametrize("loss", list(fused_kd.catalogue()), ids=lambda loss: loss.function)
def test_explain_says_that_the_reference_runs_and_why(kind, loss):
    explanation = fused_kd.explain(kind, loss.function.removesuffix("_loss"))
    assert explanation.chosen == "reference"
    assert explanation.reasons["native"] in (
        native._failure,
        f"the C++ core runs CPU and CUDA tensors, not {kind} tensors",
    )
    assert explanation.reasons["triton"] == f"Triton kernels run CUDA tensors, not {kind} tensors"
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run {kind} tensors here: .*not {kind} tensors"):
        backends.choose("triton", kind, loss.function.removesuffix("_loss"))


class WithoutFloat64(TorchDispatchMode):
    """Meta tensors as a device without float64, like Apple's MPS."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for each in _pytree.tree_leaves(results):
            if isinstance(each, torch.Tensor) and each.dtype == torch.float64 and each.device.type == "meta":
                raise TypeError(f"{function} makes a float64 tensor")
        return results


@pytest.mark.parametrize("loss", [*check.OPTIONS])
@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
@pytest.mark.parametrize("options", ("plain", "weight", "normalizer", "head"))
def test_a_device_without_float64(monkeypatch, loss, soft, options):
    """Loss and gradient, including all sums over the batch."""
    monkeypatch.setattr(reference.rows, "SINGLE_ALONE", {"meta"})
    case = check.Case(torch.float32, 6, 10, check.OPTIONS[loss][-1], soft=soft, loss=loss)
    student, other, target = case.inputs("meta")
    student.requires_grad_()
    given = {**case.options}
    if options == "weight":
        given["weight"] = torch.ones(6, device="meta")
    elif options == "normalizer":
        given |= {"weight": torch.ones(6, device="meta"), "normalizer": 3.0}
    logits = student
    if options == "head":
        if loss in ("zipf_ls", "dist"):
            pytest.skip("takes matrices alone")
        logits = Head(student, torch.ones(10, 10, device="meta"))
    with WithoutFloat64():
        function = getattr(fused_kd, f"{loss}_loss")
        function(logits, *([] if loss == "tf_kd" else [other]), target, **given).backward()
    assert student.grad.dtype == torch.float32


@pytest.fixture
def rocm(monkeypatch):
    """PyTorch as built for AMD GPUs: it calls their tensors CUDA tensors."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for name, replacement in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda which=None: "AMD Instinct",
        "get_device_capability": lambda which=None: (9, 4),
        "get_device_properties": lambda which=None: SimpleNamespace(warp_size=64),
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(triton, "_driver_failure", lambda: None)
    launch.gpu_of.cache_clear()
    yield
    launch.gpu_of.cache_clear()


@needs_triton
def test_rocm_takes_the_reference_unless_triton_is_named(rocm):
    """Kernels that were compiled but never run are used only if the user names them."""
    with pytest.warns(RuntimeWarning, match="triton: can run by name only: its kernels compile for AMD GPUs"):
        assert backends.choose("auto", "cuda", "nkd") == "reference"
    assert backends.choose("triton", "cuda", "nkd") == "triton"
    explanation = fused_kd.explain("cuda", "uskd")
    assert explanation.chosen == "reference" and "none has run them yet" in explanation.reasons["triton"]
    assert check.runnable("cuda", "nkd") == ["triton"], "what `python -m fused_kd check` compares"


def test_rocm_does_not_blame_nvcc(rocm):
    reason = native.cuda.unavailable(SimpleNamespace(cuda_missing="built without nvcc"), "cuda")
    assert reason == "the CUDA kernels run on NVIDIA GPUs, and this PyTorch is built for AMD's"


def test_what_a_launch_must_know_of_a_gpu(rocm, monkeypatch):
    options = {"num_warps": 8, "maxnreg": 128, "BLOCK": 1024}
    amd = launch.gpu_of(torch.device("cuda", 0))
    assert amd == layout.Gpu(lanes=64, register_limit=False)
    assert layout.fitted(options, amd) == {"num_warps": 4, "BLOCK": 1024}, "as many threads"
    assert layout.fitted({"num_warps": 1}, amd) == {"num_warps": 1}
    assert layout.fitted(options, layout.Gpu(32, False)) == {"num_warps": 8, "BLOCK": 1024}
    assert launch.gpu_of(torch.device("cpu")) == layout.NVIDIA
    launch.gpu_of.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    assert layout.fitted(options, launch.gpu_of(torch.device("cuda", 0))) is options


#: Triton's own JIT, with a driver that has an AMD GPU: all of a launch but the launch.
BINDING = """
import sys
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Amd:
    get_current_target = lambda self: GPUTarget("hip", "gfx942", 64)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

driver.set_active(Amd())
import torch
from fused_kd.backends.triton import launch, layout
from tools.compile_matrix.cases import BF16, Case
for planned in Case(BF16, BF16, 1000).launches():
    for gpu in (layout.Gpu(64, False), layout.NVIDIA):
        options = layout.fitted(planned.options, gpu)
        arguments = [torch.empty_like(a, device="cpu") if isinstance(a, torch.Tensor) else a for a in planned.arguments]
        try:
            kernel = launch.kernels()[planned.kernel].run(*arguments, grid=(1,), warmup=True, **options)
            print(planned.kernel, kernel.metadata.num_warps, kernel.metadata.warp_size)
        except KeyError as error:
            print(planned.kernel, error)
"""


@needs_triton
def test_triton_takes_what_it_is_given_for_an_amd_gpu(tmp_path):
    """Triton accepts the options for an AMD GPU, and refuses those for an NVIDIA GPU."""
    lines = in_process(BINDING, tmp_path)
    refused = '"Keyword argument maxnreg was specified but unrecognised"'
    assert lines[:2] == ["rows_on_chip 1 64", f"rows_on_chip {refused}".replace('"', "'")]
    assert {line.split()[0] for line in lines[2:]} == {"reduce_parts", "scale_rows"}


COMPILED = """
import json
from tools.compile_matrix.machine_code import compile_launch
from tools.compile_matrix.cases import BF16, FP32, Case, RankedCase, ZipfCase
calls = [Case(BF16, BF16, 1000, loss="dist"), Case(FP32, FP32, 21841, 3.0), RankedCase(BF16, BF16, 1000)]
launches = [planned for call in (*calls, ZipfCase(BF16, BF16, 100)) for planned in call.launches()]
for number, planned in enumerate(launches):
    gpu = ("gfx90a", "gfx942")[number % 2]
    print(json.dumps([planned.kernel, gpu, *compile_launch(planned, gpu)[:6]]))
"""


@needs_triton
def test_a_selection_compiles_for_amd_gpus(tmp_path):
    """`python -m tools.compile_matrix --arch gfx90a,gfx942 --no-cuda` compiles more."""
    rows = [json.loads(line) for line in in_process(COMPILED, tmp_path)]
    assert {row[0] for row in rows} >= {
        "rows_on_chip", "rows_looped", "column_moments", "ranked_on_chip", "zipf_rows", "reduce_parts", "scale_rows"
    }  # fmt: skip
    for kernel, gpu, registers, stack, shared, local, loads, _ in rows:
        assert 0 < registers <= 512 and (stack, local) == (0, 0) and shared <= 65536 and loads, (kernel, gpu)


def in_process(script, folder):
    """Return the lines that a process prints in which Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


ASSEMBLY = """\
kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\tglobal_load_dwordx4 v[0:3], v0, s[2:3]
\tbuffer_load_ushort v4, v0, s[4:7], 0 offen
\tscratch_store_dword off, v1, s32
\tv_exp_f32_e32 v1, v1
\tglobal_store_short_d16_hi v0, v1, s[2:3]
\t.section .rodata
    .group_segment_fixed_size: 16
    .max_flat_workgroup_size: 256
    .private_segment_fixed_size: 8
    .vgpr_count:     35
    .vgpr_spill_count: 2
"""


def test_what_is_read_out_of_amd_assembly():
    code = read_amdgcn(ASSEMBLY)
    assert (code.registers, code.stack, code.shared, code.threads, code.local) == (35, 8, 16, 256, 3)
    assert (code.loads, code.stores, code.instructions, code.exponentials) == ({2: 1, 16: 1}, {2: 1}, 6, 1)
    with pytest.raises(RuntimeError, match=r"expected \.vgpr_count in AMD's assembly"):
        read_amdgcn(ASSEMBLY.replace(".vgpr_count", ".count"))
