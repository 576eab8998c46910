"""A row loss with a top-k teacher: :mod:`fused_kd.backends.topk`. :mod:`.topk_losses` has the formulas.

There are four kernels, with a program for each row. :func:`mark_kept` checks the kept classes. :func:`rest_statistics`
walks over the student's logits of the other classes. :func:`resolve_kept` computes the loss and the gradient's
coefficients from a few numbers, in float64. :func:`rest_gradient` walks again. If processes share the classes, a row's
``columns`` are some of its ``num_classes`` classes, from ``first_class`` on.

``marks`` (rows, words) has a bit for each class, 1 for a kept one. The sums over the others leave out kept classes and
the target. ``state`` (rows,) is 0 for a row that does not count, which is not read, 1 for one that counts, and 2 for an
invalid one, which becomes NaN: its target or an index is out of range, or an index appears twice. ``labels``, if not
None, are probability targets (rows, columns), of which ``target`` has the likeliest class. Constexpr arguments, in
addition to those of :mod:`.on_chip`:

NEED    bits: SHARP for the exponentials at temperature 1 beside those at T, LINEAR for the sum of the logits in
        rest_statistics and for the constant in each class's gradient in rest_gradient
LANES   threads of a program, each with WIDTH classes of a tile
KEPT    a power of two; the first ``kept`` of so many entries are a row's kept classes
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kd.backends.triton.kernels.constants import LOG2E, NEG_INF
from fused_kd.backends.triton.kernels.on_chip import all_weights, gradient_width
from fused_kd.backends.triton.kernels.rows import at, kernel, load_fields, narrowed, store_fields, zero_if_empty
from fused_kd.backends.triton.kernels.tiles import lane_columns
from fused_kd.backends.triton.kernels.topk_losses import Row, resolve
from fused_kd.core.rows import TOPK_FIELDS

SHARP, LINEAR = tl.constexpr(1), tl.constexpr(2)
_FIELDS = tl.constexpr(TOPK_FIELDS)  # numbers of rest_statistics beside the logits of kept classes


@triton.jit
def _indices(indices, row, kept, indices_row, indices_col, read, KEPT: tl.constexpr):
    """Load the kept indices of a row, -1 where there is none."""
    entry = tl.arange(0, KEPT)
    return entry, tl.load(indices + row * indices_row + entry * indices_col, mask=read & (entry < kept), other=-1)


@kernel
def mark_kept(
    target, indices, factors, marks, state, num_classes: tl.int32, words: tl.int64, kept: tl.int32,
    ignore_index: tl.int64, indices_row: tl.int64, indices_col: tl.int64, KEPT: tl.constexpr,
):  # fmt: skip
    """Fill ``marks`` and ``state``. KEPT is at least the number of threads, so each thread has its own entries, and the
    result of an atomic belongs to one thread."""
    row = tl.program_id(0).to(tl.int64)
    own = marks + row * words
    for start in range(0, words, KEPT):
        word = start + tl.arange(0, KEPT)
        tl.store(own + word, tl.zeros([KEPT], tl.int32), mask=word < words)
    tl.debug_barrier()  # the bits of a word that one thread has cleared may be another's
    y = tl.load(target + row)
    counted = y != ignore_index
    if factors is not None:
        counted = counted & (tl.load(factors + row) != 0.0)
    _, j = _indices(indices, row, kept, indices_row, indices_col, counted, KEPT)
    present = (j >= 0) & (j < num_classes)
    # A bit that was already set is a class that appears twice.
    bit = (j % 32).to(tl.int32)
    before = tl.atomic_or(own + tl.where(present, j, 0) // 32, 1 << bit, mask=present)
    wrong = (j < -1) | (j >= num_classes) | (present & (((before >> bit) & 1) != 0))
    bad = (tl.max(wrong.to(tl.int32), 0) != 0) | (y < 0) | (y >= num_classes)
    tl.store(state + row, tl.where(counted, tl.where(bad, 2, 1), 0))


@triton.jit
def _load(base, marks, cols, end, first_class, y_column, stride, UNIT: tl.constexpr, ACC: tl.constexpr):
    """Load a tile's logits, with a mask of the classes that are neither kept nor the target."""
    inside = cols < end
    s = tl.load(at(base, cols, stride, UNIT), mask=inside, other=NEG_INF).to(ACC)
    j = first_class + cols
    word = tl.load(marks + j // 32, mask=inside, other=0)
    return s, inside & (((word >> (j % 32)) & 1) == 0) & (cols != y_column)


@triton.jit
def _columns_of(j, first_class, columns):
    """Return the columns of classes, -1 for classes of other processes."""
    column = j - first_class
    return tl.where((column >= 0) & (column < columns), column, -1).to(tl.int32)


@triton.jit
def _load_labels(labels, row, cols, end, labels_row, labels_col, ACC: tl.constexpr):
    return tl.load(labels + row * labels_row + cols * labels_col, mask=cols < end, other=0.0).to(ACC)


@kernel
def rest_statistics(
    student, marks, state, target, indices, found, labels, of_labels, rows: tl.int64, columns: tl.int32,
    first_class: tl.int32, words: tl.int64, kept: tl.int32, student_row: tl.int64, student_col: tl.int64,
    indices_row: tl.int64, indices_col: tl.int64, labels_row: tl.int64, labels_col: tl.int64, temperature: tl.float64,
    ACC: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
    NEED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """found (5 + kept, rows) float64, see :mod:`fused_kd.backends.topk`: the largest logit, 0 if no class can occur,
    the sums of exponentials relative to it at T and at 1, the sum of the logits, and the logits of the target and of
    the kept classes. of_labels (2, rows) float64: the sums of the labels V and of V (s - largest)."""
    columns = columns // VEC * VEC
    k = tl.full((), LOG2E, ACC)
    soft_scale = k / tl.full((), temperature, ACC)
    row = tl.program_id(0).to(tl.int64)
    valid = tl.load(state + row) == 1
    y_column = tl.where(valid, _columns_of(tl.load(target + row), first_class, columns), -1)
    end = columns * valid.to(tl.int32)
    base = student + row * (student_row // VEC * VEC)
    marks += row * words
    about = zero_if_empty(tl.load(base, mask=end > 0, other=0.0).to(ACC))
    lane_start, width = lane_columns(tl.arange(0, LANES), LANES, WIDTH, VEC)
    lane = lane_start[:, None] + width
    largest = tl.full([LANES], NEG_INF, ACC)
    soft, sharp, linear = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
    v_sum, v_cross = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
    for start in range(0, end, LANES * WIDTH):
        s, of_rest = _load(base, marks, start + lane, end, first_class, y_column, student_col, UNIT, ACC)
        if LINEAR & NEED:
            linear += tl.sum(tl.where(of_rest, s - about, 0.0), 1)
        s = tl.where(of_rest, s, NEG_INF)
        top = tl.maximum(largest, tl.max(s, 1))
        origin = zero_if_empty(top)
        down = largest - origin
        d = s - origin[:, None]
        soft = soft * tl.exp2(down * soft_scale) + tl.sum(tl.exp2(d * soft_scale), 1)
        if SHARP & NEED:
            sharp = sharp * tl.exp2(down * k) + tl.sum(tl.exp2(d * k), 1)
        if labels is not None:
            v = tl.where(of_rest, _load_labels(labels, row, start + lane, end, labels_row, labels_col, ACC), 0.0)
            v_cross += v_sum * (zero_if_empty(largest) - origin) + tl.sum(tl.where(v == 0.0, 0.0, v * d), 1)
            v_sum += tl.sum(v, 1)
        largest = top
    origin = zero_if_empty(tl.max(largest, 0))
    down = largest - origin
    soft = tl.sum(soft * tl.exp2(down * soft_scale), 0)
    if SHARP & NEED:
        sharp = tl.sum(sharp * tl.exp2(down * k), 0)
    else:
        sharp = soft
    if labels is not None:
        v_cross = tl.sum(v_cross + v_sum * (zero_if_empty(largest) - origin), 0)
        store_fields(of_labels, (tl.sum(v_sum, 0).to(tl.float64), v_cross.to(tl.float64)), rows, row, None)
    entry, j = _indices(indices, row, kept, indices_row, indices_col, valid, KEPT)
    at_kept = _columns_of(j, first_class, columns)
    s_kept = tl.load(base + at_kept * student_col, mask=at_kept >= 0, other=0.0)
    s_target = tl.load(base + y_column * student_col, mask=y_column >= 0, other=0.0)
    left_out = tl.sum(((at_kept >= 0) & (at_kept != y_column)).to(tl.int32), 0) + (y_column >= 0).to(tl.int32)
    number = (end - left_out).to(tl.float64)
    linear = tl.sum(linear, 0).to(tl.float64) + tl.where(number > 0, number * about.to(tl.float64), 0.0)
    of_row = (origin.to(tl.float64), soft.to(tl.float64), sharp.to(tl.float64), linear, s_target.to(tl.float64))
    store_fields(found, of_row, rows, row, None)
    tl.store(found + (entry + _FIELDS).to(tl.int64) * rows + row, s_kept.to(tl.float64), mask=entry < kept)


@kernel
def resolve_kept(
    found, state, target, indices, log_probs, factors, loss, parts, coefficients, entries, labels, of_labels,
    rows: tl.int64, num_classes: tl.int32, kept: tl.int32, indices_row: tl.int64, indices_col: tl.int64,
    log_probs_row: tl.int64, log_probs_col: tl.int64, labels_row: tl.int64, labels_col: tl.int64,
    temperature: tl.float64, first: tl.float64, second: tl.float64, ce_weight: tl.float64, smoothing: tl.float64,
    scale: tl.float64, LOSS: tl.constexpr, REST: tl.constexpr, SINGLE: tl.constexpr, CE: tl.constexpr,
    GRAD: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Compute loss (rows,) and parts (3, rows). For the gradient, compute coefficients (5, rows): the rest's largest
    logit, the factors of its exponentials at T and at 1, a constant, and the factor of the labels; and entries
    (kept + 1, rows): the values at the kept classes and, last, at the target."""
    row = tl.program_id(0).to(tl.int64)
    state_of_row = tl.load(state + row)
    valid = state_of_row == 1
    y = tl.load(target + row)
    entry, j = _indices(indices, row, kept, indices_row, indices_col, valid, KEPT)
    present = j >= 0
    t = tl.load(log_probs + row * log_probs_row + entry * log_probs_col, mask=present, other=0.0).to(tl.float64)
    s = tl.load(found + (entry + _FIELDS).to(tl.int64) * rows + row, mask=present, other=0.0)
    own, is_target = present & (j != y), present & (j == y)
    kept_y = tl.max(is_target.to(tl.int32), 0) != 0
    number = num_classes - 1 - tl.sum(own.to(tl.int32), 0)
    top, soft, sharp, linear, s_y = load_fields(found, rows, row, True, _FIELDS)
    v, v_y, v_rest, v_cross = tl.zeros_like(t), 1.0, 0.0, 0.0
    if labels is not None:
        of_row = labels + row * labels_row
        v = tl.load(of_row + j * labels_col, mask=own, other=0.0).to(tl.float64)
        v_y = tl.load(of_row + y * labels_col, mask=valid, other=0.0).to(tl.float64)
        v_rest, v_cross = load_fields(of_labels, rows, row, True, 2)
    x = Row(
        tl.where(own, s, NEG_INF),
        tl.where(own, t, NEG_INF),
        s_y,
        tl.where(kept_y, tl.sum(tl.where(is_target, t, 0.0), 0), NEG_INF),
        kept_y,
        number.to(tl.float64),
        top,
        soft,
        sharp,
        linear,
        v,
        v_y,
        v_rest,
        v_cross,
    )
    weights = all_weights(first, second, temperature, ce_weight, smoothing, tl.float64)
    one, two, ce, by, by_y, soft, sharp, constant, of_v = resolve(
        x, own, weights, num_classes, LOSS, REST, CE, labels is not None
    )
    factor, of_gradient = tl.full((), 1.0, tl.float64), tl.full((), 1.0, tl.float64)
    missing = tl.where(valid, 0.0 * factor, float("nan"))
    if factors is not None:
        factor, of_gradient = tl.load(factors + row), tl.load(factors + rows + row)
    ignored = state_of_row == 0
    one = tl.where(ignored, 0.0, factor * one + missing)
    two = tl.where(ignored, 0.0, factor * two + missing)
    ce = tl.where(ignored, 0.0, factor * ce + missing)
    dtype = loss.dtype.element_ty
    tl.store(loss + row, (one + two + ce).to(dtype))
    store_fields(parts, (one.to(dtype), two.to(dtype), ce.to(dtype)), rows, row, None)
    if GRAD:
        scale = tl.where(ignored, 0.0, scale * of_gradient + missing)
        if SINGLE:
            soft += sharp
        scaled = (
            x.top.to(dtype), (soft * scale).to(dtype), (sharp * scale).to(dtype), (constant * scale).to(dtype),
            (of_v * scale).to(dtype),
        )  # fmt: skip
        store_fields(coefficients, scaled, rows, row, None)
        tl.store(entries + entry.to(tl.int64) * rows + row, (by * scale).to(dtype), mask=entry < kept)
        tl.store(entries + kept.to(tl.int64) * rows + row, (by_y * scale).to(dtype))


@kernel
def rest_gradient(
    student, marks, state, target, indices, coefficients, entries, labels, gradient, padding, rows: tl.int64,
    columns: tl.int32, first_class: tl.int32, words: tl.int64, kept: tl.int32, student_row: tl.int64,
    student_col: tl.int64, indices_row: tl.int64, indices_col: tl.int64, labels_row: tl.int64, labels_col: tl.int64,
    temperature: tl.float64, ACC: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr,
    UNIT: tl.constexpr, NEED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Write soft exp((s - max) / T) + sharp exp(s - max) + constant - of_v V, and the entries of kept classes and
    the target. A row that does not count gets 0, an invalid one NaN."""
    columns = columns // VEC * VEC
    k = tl.full((), LOG2E, ACC)
    soft_scale = k / tl.full((), temperature, ACC)
    row = tl.program_id(0).to(tl.int64)
    counted = tl.load(state + row) != 0
    y_column = tl.where(counted, _columns_of(tl.load(target + row), first_class, columns), -1)
    end = columns * counted.to(tl.int32)
    base = student + row * (student_row // VEC * VEC)
    out = gradient + row * gradient_width(columns, padding, VEC)
    marks += row * words
    origin, soft, sharp, constant, of_v = load_fields(coefficients, rows, row, True, 5)
    dtype = gradient.dtype.element_ty
    lane_start, width = lane_columns(tl.arange(0, LANES), LANES, WIDTH, VEC)
    lane = lane_start[:, None] + width
    for start in range(0, end, LANES * WIDTH):
        cols = start + lane
        s, of_rest = _load(base, marks, cols, end, first_class, y_column, student_col, UNIT, ACC)
        d = s - origin
        g = soft * tl.exp2(d * soft_scale)
        if SHARP & NEED:
            g += sharp * tl.exp2(d * k)
        if LINEAR & NEED:
            g += constant
        if labels is not None:
            g -= of_v * _load_labels(labels, row, cols, end, labels_row, labels_col, ACC)
        # A class that cannot occur has no gradient. A kept class may exceed all others by any amount: its g may be inf.
        g = tl.where(of_rest & (s != NEG_INF), g, 0.0)
        tl.store(out + cols, narrowed(g, dtype), mask=cols < end)
    for start in range(0, tl.where(end > 0, 0, columns), LANES * WIDTH):
        tl.store(out + (start + lane), tl.zeros_like(lane).to(dtype), mask=start + lane < columns)
    tl.debug_barrier()  # other threads have stored there; masking single classes would make their stores scalar
    entry, j = _indices(indices, row, kept, indices_row, indices_col, counted, KEPT)
    at_kept = _columns_of(j, first_class, columns)
    here = (at_kept >= 0) & (at_kept != y_column)
    possible = tl.load(base + at_kept * student_col, mask=here, other=0.0) != NEG_INF
    value = tl.load(entries + entry.to(tl.int64) * rows + row, mask=here, other=0.0)
    tl.store(out + at_kept, narrowed(tl.where(possible, value, 0.0), dtype), mask=here)
    possible = tl.load(base + y_column * student_col, mask=y_column >= 0, other=0.0) != NEG_INF
    value = tl.load(entries + kept.to(tl.int64) * rows + row)
    tl.store(out + y_column, narrowed(tl.where(possible, value, 0.0), dtype), mask=y_column >= 0)
