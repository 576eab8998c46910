"""Triton kernels on CUDA tensors; on CPU tensors too, for tests, under Triton's interpreter.

Importing this module imports neither Triton nor the kernels: the first call does.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_kd.backends import cuda_devices, triton_config
from fused_kd.core.catalogue import ROW_LOSSES, has_column_term
from fused_kd.reference import accumulation_dtype

#: Up to so many rows every program counts the targets itself, which saves a launch; they are in its cache line by line.
COUNT_ROWS = 2048
#: Up to so many rows one program sums the parts; beyond, chunks of as many are summed side by side first.
CHUNK = 16384
#: How the kernels find the number of rows that count (their argument COUNT; 0 is "not at all").
COUNT_TARGETS, COUNT_PARTIAL = 1, 2
#: Programs that share the tiles of scale_rows: 8 to 16 on each multiprocessor, and few enough to return at once.
SCALE_PROGRAMS = 2048

#: What Triton compiles for, at least: the major number of the compute capability.
OLDEST = 7


class Launch(NamedTuple):
    """One kernel launch: ``kernel`` names a Triton function of the kernels' modules, or one of ``HOST``."""

    kernel: str
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def planned(kernel: str, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """A launch whose products and sums are not fused. A compiler fuses here and not there: then equal logits have
    different keys, probabilities are not those whose moments were taken, and the lanes of a reduction, each of which
    fuses its own product and gets its neighbour's rounded, end with different sums. NKD takes 3 % more instructions so.
    To be said each time: Triton's default changes with its releases."""
    return Launch(kernel, programs, arguments, {**options, "enable_fp_fusion": False})


@lru_cache(maxsize=1)
def _import_failure() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return "triton is not installed: pip install triton" if missing else f"triton cannot be imported: {error}"
    return None


def unavailable(device: torch.device | str) -> str | None:
    kind = torch.device(device).type
    if kind not in ("cuda", "cpu"):
        return f"Triton kernels run CUDA tensors, not {kind} tensors"
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels run CUDA tensors; CPU tensors only under its interpreter (TRITON_INTERPRET=1), for tests"
    failure = _import_failure()
    if failure is not None or kind == "cpu":
        return failure
    if torch.version.hip:
        return "the Triton kernels are made for NVIDIA GPUs, not for ROCm"
    device = cuda_devices.resolved(device)
    return cuda_devices.missing(device) or _too_old(device) or _driver_failure()


def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major >= OLDEST:
        return None
    return f"Triton needs compute capability {OLDEST}.0, and {cuda_devices.named(device)} has {major}.{minor}"


@lru_cache(maxsize=1)
def _driver_failure() -> str | None:
    """Triton builds a small library at its first launch, which takes a C compiler and the CUDA driver's library."""
    try:
        importlib.import_module("triton.runtime").driver.active.utils  # noqa: B018 - to ask for it is to build it
    except Exception as error:
        return f"Triton cannot reach the GPU: {error}"
    return None


@lru_cache(maxsize=1)
def _kernels() -> dict[str, Any]:
    modules: list[ModuleType] = [
        importlib.import_module(f"fused_kd.backends.{name}")
        for name in (
            "triton_kernels",
            "triton_looped",
            "triton_columns",
            "triton_reductions",
            "triton_uskd_kernels",
            "triton_uskd_streamed",
            "triton_zipf_kernels",
        )
    ]
    names = (
        "rows_on_chip", "rows_looped", "count_chunks", "reduce_parts", "scale_rows",
        "normalize_rows", "column_moments", "finish_columns",
        "target_probabilities", "ranked_on_chip", "write_keys", "write_zipf", "combine_ranked",
        "find_votes", "rank_votes", "zipf_rows",
    )  # fmt: skip
    return {name: getattr(module, name) for module in modules for name in names if hasattr(module, name)}


def _sort_rows(keys: Tensor, values: Tensor, order: Tensor) -> None:
    torch.sort(keys, dim=1, descending=True, stable=True, out=(values, order))


#: What a plan may ask of PyTorch between its launches.
HOST = {"sort_rows": _sort_rows}


def _replay() -> ModuleType:
    return importlib.import_module("fused_kd.backends.triton_replay")  # which imports this one


def __getattr__(name: str) -> Any:
    """What other modules have, which are imported when they are first asked for it."""
    elsewhere = {"uskd": "triton_uskd", "uskd_batch_sums": "triton_uskd", "zipf_ls": "triton_zipf"}
    if name in elsewhere:
        return getattr(importlib.import_module(f"fused_kd.backends.{elsewhere[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def run(launches: list[Launch], device: torch.device) -> list[Any]:
    """Launch on the tensors' device, in its current stream. Returns the compiled kernels, None where there is none."""
    kernels = _kernels()
    with cuda_devices.current(device):
        return [
            HOST[kernel](*arguments) if kernel in HOST else kernels[kernel][(programs,)](*arguments, **options)
            for kernel, programs, arguments, options in launches
        ]


@lru_cache(maxsize=1)
def acc_types() -> dict[torch.dtype, Any]:
    language = importlib.import_module("triton.language")
    return {torch.float32: language.float32, torch.float64: language.float64}


def row_loss(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    factors: Tensor | None,
    loss_name: str,
    weights: list[float],
    standardize: bool,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
    gradient_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, _classes = student.shape
    other = student if teacher is None else teacher  # not read where the loss has no teacher
    dtype, device = accumulation_dtype(student, other), student.device
    shape = (rows,) if reduction == "none" else ()
    loss = torch.empty(shape, dtype=dtype, device=device)
    parts = torch.empty((3, *shape), dtype=dtype, device=device)
    gradient = torch.empty(student.shape if need_gradient else (0,), dtype=student.dtype, device=device)
    norm = torch.empty((), dtype=dtype, device=device)
    if rows == 0:
        return loss.zero_(), parts.zero_(), gradient, norm.fill_(1.0)
    settings: tuple[Any, ...] = (
        loss_name,
        tuple(weights),
        standardize,
        ignore_index,
        reduction,
        need_gradient,
        gradient_scale,
    )
    outputs = gradient, loss, parts, norm
    _replay().run(
        "row_loss",
        (student, other, target, factors),
        outputs,
        settings,
        lambda: plan_row_loss(student, other, target, factors, *outputs, *settings),
    )
    return loss, parts, gradient, norm


def kernel_weights(loss_name: str, weights: Sequence[float], classes: int) -> tuple[float, ...]:
    """The weights as :mod:`triton_losses` has them."""
    first, second, temperature, ce_weight, smoothing = weights
    if loss_name == "tf_kd":
        rest = classes - 1
        gap = (first - (1.0 - first) / rest) / temperature
        log_others = -(max(gap, 0.0) + math.log(math.exp(gap - max(gap, 0.0)) + rest * math.exp(-max(gap, 0.0))))
        others, own = math.exp(log_others), math.exp(log_others + gap)
        return others, own, rest * others * log_others + own * (log_others + gap), ce_weight, smoothing
    if loss_name == "kd":
        second = 1.0
    if classes == 2 and loss_name in (
        "nkd",
        "kd",
        "dkd",
        "wsld",
    ):  # two classes leave one outside the target: its term and gradient are 0
        first, second = (0.0 if loss_name == "nkd" else first), 0.0
    return first, second, temperature, ce_weight, smoothing


def plan_row_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    factors: Tensor | None,
    gradient: Tensor,
    loss: Tensor,
    parts: Tensor,
    norm: Tensor,
    loss_name: str,
    weights: Sequence[float],
    standardize: bool,
    ignore_index: int,
    reduction: str,
    need_gradient: bool,
    gradient_scale: float,
) -> list[Launch]:
    """The launches that fill the outputs, in order."""
    rows, classes = student.shape
    if loss_name == "js" and weights[0] == 0.0:
        loss_name = "kd"
    acc = acc_types()[loss.dtype]
    probabilities = target.is_floating_point()
    per_row, mean = reduction == "none", reduction == "mean"
    # As row_needs and one_temperature of csrc have it.
    _, _, temperature, ce_weight, smoothing = weights
    sharp_distilled, ce = loss_name in ("nkd", "wsld"), ce_weight != 0.0
    single = (
        loss_name == "tf_kd"
        or not (sharp_distilled or ce)
        or (temperature == 1.0 and (not standardize or (sharp_distilled and not ce)))
    )
    linear = loss_name == "tf_kd" or (ce and smoothing != 0.0)
    # float16 might underflow when divided by the row count, so the power of two next to it stays for the backward op.
    half = mean and student.dtype == torch.float16
    target_row, target_col = target.stride() if probabilities else (target.stride(0), 0)
    launches: list[Launch] = []
    counts = plan_count(launches, target, ignore_index, reduction, need_gradient)
    columns: tuple[Tensor, Tensor, Tensor] | None = None
    if has_column_term(loss_name, weights):
        assert factors is None  # see dist_terms
        plan_columns = importlib.import_module("fused_kd.backends.triton_dist").plan_columns
        columns = plan_columns(launches, student, teacher, target, loss.dtype, weights, standardize, ignore_index)
    row_parts = parts if per_row else torch.empty((3, rows), dtype=loss.dtype, device=student.device)
    narrow = min(t.element_size() for t in (student, teacher, target) if t.is_floating_point())
    row_strides = [student.stride(0), teacher.stride(0), *([target_row] if probabilities else [])]
    unit = student.stride(1) == teacher.stride(1) == 1 and (target_col == 1 or not probabilities)
    vector = 16 // narrow if unit else 1
    # Rows that start alike modulo a vector can be walked in vectors, from the same column on.
    together = unit and all((stride - classes) % vector == 0 for stride in row_strides)
    config = triton_config.row_config(
        classes,
        narrow,
        wide=loss.dtype == torch.float64,
        probabilities=probabilities,
        unit_temperature=single,
        neighbours=unit,
        vectors=together,
        mixed=student.dtype != teacher.dtype,
        loss=loss_name,
        scores=standardize,
        smoothed=ce and smoothing != 0.0,
    )
    options = {
        "ACC": acc,
        "UNIT": unit,
        "LOSS": ROW_LOSSES[loss_name].kind,
        "SINGLE": single,
        "PROB": probabilities,
        "GRAD": need_gradient,
        "COUNT": counts.how if need_gradient else 0,
        "HALF": half,
        "PER_ROW": per_row,
        "STD": standardize,
        "LINEAR": linear,
        "RAW": standardize and sharp_distilled and ce,
        "COLUMNS": columns is not None,
        "num_warps": config.warps,
        "maxnreg": config.registers,
    }
    if isinstance(config, triton_config.OnChip):
        kernel, programs = "rows_on_chip", -(-rows // config.rows)
        options |= {"ROWS": config.rows, "BLOCK": config.block, "VEC": math.gcd(vector, classes, *row_strides)}
    else:
        kernel, programs = "rows_looped", rows
        options |= {"LANES": config.lanes, "WIDTH": config.width, "VEC": vector if together else 1}
        # The column term's numbers lie alike for every row: where the logits do too, they are vectors as well.
        options["EDGES"] = together and not (columns and classes % vector == 0)
    # Every row of probabilities counts.
    known = 1.0 / rows if mean and probabilities else 1.0
    if half and probabilities:
        known *= 2.0 ** (rows.bit_length() - 1)
    arguments = (
        student, teacher, target, gradient, loss, row_parts, norm, counts.source, factors,
        *(columns or (loss, loss, loss)), rows, classes, *student.stride(), *teacher.stride(), target_row, target_col,
        counts.items, columns[2].shape[0] if columns else 0, ignore_index,
        *kernel_weights(loss_name, weights, classes), gradient_scale * known, 1.0 / gradient_scale,
    )  # fmt: skip
    launches.append(planned(kernel, programs, arguments, options))

    if not per_row:
        finish = (loss, (norm, norm), (1.0 / gradient_scale,) * 2, (half, half))
        plan_reduction(launches, row_parts, parts, counts, ignore_index, reduction, finish)
    return launches


class Counts(NamedTuple):
    """Where kernels find the number of rows that count, and ``how``: their argument COUNT."""

    source: Tensor
    stride: int
    items: int
    how: int


def plan_count(
    launches: list[Launch], target: Tensor, ignore_index: int, reduction: str, every_row: bool = True
) -> Counts:
    """Where to find the number of rows that count, for which a mean over many index targets appends a launch. With
    ``every_row`` each program of a row kernel will count, else only the one that reduces the parts."""
    rows, stride = target.shape[0], target.stride(0)
    if reduction != "mean" or target.is_floating_point():
        return Counts(target, stride, rows, 0)
    if rows <= (COUNT_ROWS if every_row else CHUNK):
        return Counts(target, stride, rows, COUNT_TARGETS)
    chunk = max(COUNT_ROWS, -(-rows // 1024))
    items = -(-rows // chunk)
    counts = torch.empty(items, dtype=torch.int32, device=target.device)
    arguments = (target, counts, stride, rows, chunk, ignore_index)
    launches.append(planned("count_chunks", items, arguments, {"num_warps": 4}))
    return Counts(counts, 1, items, COUNT_PARTIAL)


#: The loss, and for each of two gradients (or twice for one) its norm, that norm's value, and whether it is kept in
#: float16, where the divisor's power of two goes into the norm.
Finish = tuple[Tensor, tuple[Tensor, Tensor], tuple[float, float], tuple[bool, bool]]


def plan_reduction(
    launches: list[Launch],
    row_parts: Tensor,
    parts: Tensor,
    counts: Counts | None,
    ignore_index: int,
    reduction: str,
    finish: Finish | None,
) -> None:
    """Append the launches that reduce ``row_parts`` (parts, rows) to ``parts`` (parts,) and ``finish``; without that,
    to plain sums."""
    width, rows = row_parts.shape
    counts = counts or Counts(row_parts, 1, rows, 0)
    loss, norms, norm_values, halves = finish or (parts, (parts, parts), (1.0, 1.0), (False, False))
    while True:
        programs = -(-rows // CHUNK)
        last = programs == 1
        sums = parts if last else torch.empty((width, programs), dtype=parts.dtype, device=parts.device)
        arguments = (
            row_parts, sums, loss, *norms, counts.source,
            rows, CHUNK, counts.stride, counts.items, ignore_index, *norm_values,
        )  # fmt: skip
        options = {
            "ACC": acc_types()[parts.dtype],
            "PARTS": width,
            "FINAL": last and finish is not None,
            "MEAN": reduction == "mean",
            "COUNT": counts.how,
            "HALF": halves[0],
            "OTHER_HALF": halves[1],
            "num_warps": 8,
        }
        launches.append(planned("reduce_parts", programs, arguments, options))
        if last:
            return
        row_parts, rows = sums, programs


def scale_gradient(gradient: Tensor, grad_output: Tensor, norm: Tensor, out: Tensor) -> None:
    """out = gradient * grad_output * norm, row by row; ``out`` may be ``gradient``."""
    if gradient.numel():
        inputs, in_place = (gradient, grad_output, norm, out), gradient.data_ptr() == out.data_ptr()
        _replay().run("scale", inputs, (), (in_place,), lambda: [plan_scale(*inputs)])


def plan_scale(gradient: Tensor, grad_output: Tensor, norm: Tensor, out: Tensor) -> Launch:
    """The launch of scale_rows. One factor for all makes one long row of the gradient."""
    rows, width = gradient.shape
    stride = grad_output.stride(0) if grad_output.dim() else 0
    if stride == 0:
        rows, width = 1, rows * width
    config = triton_config.scale_config(width)
    vector = 16 // gradient.element_size()
    tiles = rows * -(-(width + vector - 1) // config.block)
    options = {
        "ACC": acc_types()[norm.dtype],
        "BLOCK": config.block,
        "VEC": vector,
        "IN_PLACE": gradient.data_ptr() == out.data_ptr(),
        "num_warps": config.warps,
    }
    arguments = (gradient, out, grad_output, norm, rows, width, stride)
    return planned("scale_rows", min(tiles, SCALE_PROGRAMS), arguments, options)
