# mypy: ignore-errors
# Triton compiles these functions; to a type checker they are not Python.
"""What a row loss needs of the classes outside a few that were kept of the teacher: :mod:`fused_kd.backends.topk`.

Kept classes and the target are left out: ``marks`` (rows, words) has a bit for each class, which is 1 for those. A row
that is not ``counted`` is not read. Constexpr arguments, beside those of :mod:`.on_chip`:

NEED    bits: SHARP for the exponentials at temperature 1 beside those at T, LINEAR for the sum of the logits in the
        first kernel and for what is added to each class's gradient in the second
LANES   threads of a program, each with WIDTH classes of a tile
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.on_chip import at
from fused_kd.backends.triton.kernels.rows import LOG2E, narrowed, zero_if_empty
from fused_kd.backends.triton.kernels.tiles import lane_columns

SHARP, LINEAR = tl.constexpr(1), tl.constexpr(2)
_NEG_INF = tl.constexpr(float("-inf"))
RUNTIME = ["rows", "classes", "words", "student_row", "student_col"]


@triton.jit
def _load(base, marks, cols, end, stride, UNIT: tl.constexpr, ACC: tl.constexpr):
    """Logits, and which of a tile's columns are classes of the rest."""
    inside = cols < end
    s = tl.load(at(base, cols, stride, UNIT), mask=inside, other=_NEG_INF).to(ACC)
    word = tl.load(marks + cols // 32, mask=inside, other=0)
    return s, inside & (((word >> (cols % 32)) & 1) == 0)


@triton.jit(do_not_specialize=RUNTIME)
def rest_statistics(
    student,
    marks,
    counted,
    out,
    rows: tl.int64,
    classes: tl.int32,
    words: tl.int64,
    student_row: tl.int64,
    student_col: tl.int64,
    temperature: tl.float64,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
    NEED: tl.constexpr,
):
    """out (4, rows): the largest logit, 0 where none can occur, the sums of exponentials relative to it at T and at 1,
    and the sum of the logits less that of the row's first column."""
    classes = classes // VEC * VEC
    k = tl.full((), LOG2E, ACC)
    soft_scale = k / tl.full((), temperature, ACC)
    row = tl.program_id(0).to(tl.int64)
    end = classes * tl.load(counted + row)
    base = student + row * (student_row // VEC * VEC)
    marks += row * words
    about = zero_if_empty(tl.load(base, mask=end > 0, other=0.0).to(ACC))
    lane_start, width = lane_columns(tl.arange(0, LANES), LANES, WIDTH, VEC)
    lane = lane_start[:, None] + width
    largest = tl.full([LANES], _NEG_INF, ACC)
    soft, sharp, linear = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
    for start in range(0, end, LANES * WIDTH):
        s, of_rest = _load(base, marks, start + lane, end, student_col, UNIT, ACC)
        if LINEAR & NEED:
            linear += tl.sum(tl.where(of_rest, s - about, 0.0), 1)
        s = tl.where(of_rest, s, _NEG_INF)
        top = tl.maximum(largest, tl.max(s, 1))
        origin = zero_if_empty(top)
        down = largest - origin
        d = s - origin[:, None]
        soft = soft * tl.exp2(down * soft_scale) + tl.sum(tl.exp2(d * soft_scale), 1)
        if SHARP & NEED:
            sharp = sharp * tl.exp2(down * k) + tl.sum(tl.exp2(d * k), 1)
        largest = top
    origin = zero_if_empty(tl.max(largest, 0))
    down = largest - origin
    soft = tl.sum(soft * tl.exp2(down * soft_scale), 0)
    if SHARP & NEED:
        sharp = tl.sum(sharp * tl.exp2(down * k), 0)
    else:
        sharp = soft
    tl.store(out + row, origin)
    tl.store(out + rows + row, soft)
    tl.store(out + 2 * rows + row, sharp)
    tl.store(out + 3 * rows + row, tl.sum(linear, 0))


@triton.jit(do_not_specialize=RUNTIME)
def rest_gradient(
    student,
    marks,
    counted,
    coefficients,
    gradient,
    rows: tl.int64,
    classes: tl.int32,
    words: tl.int64,
    student_row: tl.int64,
    student_col: tl.int64,
    temperature: tl.float64,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
    NEED: tl.constexpr,
):
    """soft exp((s - max) / T) + sharp exp(s - max) + constant, of coefficients (4, rows): max, soft, sharp, constant.
    Columns that are left out get 0; so does a row that is not counted."""
    classes = classes // VEC * VEC
    k = tl.full((), LOG2E, ACC)
    soft_scale = k / tl.full((), temperature, ACC)
    row = tl.program_id(0).to(tl.int64)
    end = classes * tl.load(counted + row)
    base = student + row * (student_row // VEC * VEC)
    out = gradient + row * classes
    marks += row * words
    origin = tl.load(coefficients + row)
    soft = tl.load(coefficients + rows + row)
    sharp = tl.load(coefficients + 2 * rows + row)
    constant = tl.load(coefficients + 3 * rows + row)
    dtype = gradient.dtype.element_ty
    lane_start, width = lane_columns(tl.arange(0, LANES), LANES, WIDTH, VEC)
    lane = lane_start[:, None] + width
    for start in range(0, end, LANES * WIDTH):
        cols = start + lane
        s, of_rest = _load(base, marks, cols, end, student_col, UNIT, ACC)
        d = s - origin
        g = soft * tl.exp2(d * soft_scale)
        if SHARP & NEED:
            g += sharp * tl.exp2(d * k)
        if LINEAR & NEED:
            g += constant
        # A class that cannot occur has no gradient, and a kept one may be larger than all others by any amount.
        g = tl.where(of_rest & (s != _NEG_INF), g, 0.0)
        tl.store(out + cols, narrowed(g, dtype), mask=cols < end)
    for start in range(0, tl.where(end > 0, 0, classes), LANES * WIDTH):
        tl.store(out + (start + lane), tl.zeros_like(lane).to(dtype), mask=start + lane < classes)
