"""Tuples that the steps of a row kernel pass on, with the names of csrc/losses/row_losses.h; :mod:`.rows` has the
notation.

All entries are blocks: of rows, of a row's lanes, or of one row.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl


class Statistics(NamedTuple):
    """Sums over the classes other than the target, of rows or of the lanes of a row, (rows or lanes,) each."""

    s_max: tl.tensor  # m_s
    s_soft: tl.tensor  # sum of e_j(soft_s); all sums of exponentials are relative to the maximum
    s_sharp: tl.tensor
    t_max: tl.tensor  # m_t
    t_soft: tl.tensor  # sum of f_j
    t_sharp: tl.tensor
    blocked: tl.tensor  # with STD, sum of f_j where s_j = -inf
    cross: tl.tensor  # sum f_j (s_j - m_s) soft_s, minus f_j (t_j - m_t) soft_t if a loss needs KL's logarithms
    v_sum: tl.tensor  # of the class probabilities V_j
    v_cross: tl.tensor  # sum V_j (s_j - m_s)
    v_cross_t: tl.tensor  # sum V_j (t_j - m_t)
    linear: tl.tensor  # sum s_j - m_s
    number: tl.tensor  # number of classes in linear
    s_raw: tl.tensor  # sum of e_j(log2(e))
    w_soft: tl.tensor  # sums of exponentials times s_j - mean_s
    w_sharp: tl.tensor
    w_teacher: tl.tensor


class Scales(NamedTuple):
    """log2(e) over the temperature T, twice, and log2(e), twice, as scalars. With STD (logit standardization) each row
    has its own, since z-scores are the logits at another scale."""

    soft_s: tl.tensor
    soft_t: tl.tensor
    sharp_s: tl.tensor
    sharp_t: tl.tensor
    mean_s: tl.tensor  # the mean of the student's row, with STD


class Moments(NamedTuple):
    """Moments of a row's logits over the classes that can occur."""

    mean: tl.tensor
    deviation: tl.tensor  # unbiased
    number: tl.tensor
    low: tl.tensor  # what the mean was rounded by: the mean is mean + low


class Coefficients(NamedTuple):
    """Coefficients of a row's gradient: of each exponential, of V_j, a constant, of s_j - mean_s, and the value at the
    target."""

    soft: tl.tensor
    sharp: tl.tensor
    teacher: tl.tensor
    raw: tl.tensor
    v: tl.tensor
    constant: tl.tensor
    slope: tl.tensor
    target: tl.tensor


class Weights(NamedTuple):
    """Hyper-parameters as scalars: two of the loss's own, see :mod:`.losses`, and the common ones."""

    first: tl.tensor
    second: tl.tensor
    temperature: tl.tensor
    ce_weight: tl.tensor
    label_smoothing: tl.tensor


class Constants(NamedTuple):
    """Inputs of a pointwise loss's functions of a class beside its probabilities."""

    first: tl.tensor  # of the weights
    share: tl.tensor  # 1 / C


class Softmaxes(NamedTuple):
    """What a pointwise loss needs beside logits to compute the probabilities of a row."""

    stats: Statistics
    scales: Scales
    of_rows: tl.tuple  # see :mod:`.pointwise`
    constants: Constants


class PointwiseSums(NamedTuple):
    """Sums over all classes, of a row or of a lane."""

    of_1: tl.tensor  # the loss's own three
    of_2: tl.tensor
    of_3: tl.tensor
    by_1: tl.tensor  # p f_1
    by_2: tl.tensor  # p f_2, or p without f_2
    by_column: tl.tensor  # p times the column's slope
    w: tl.tensor  # with STD, p, p f_1, p f_2 and p times the column's slope, each times s - mean
    w_1: tl.tensor
    w_2: tl.tensor
    w_column: tl.tensor


class Slopes(NamedTuple):
    """Factors of f_1, f_2 and the column's slope, and an offset, in (h_j - sum p_k h_k) / T: they are
    (c_1, c_2, 1, -sum p_k h_k) / T. With one slope the offset is that of f_1, before its factor."""

    by_1: tl.tensor
    by_2: tl.tensor
    by_column: tl.tensor
    offset: tl.tensor


class ColumnMoments(NamedTuple):
    """Moments of the columns of p and q over some of the rows that count, ``(parts,)`` or ``(parts, columns)``."""

    number: tl.tensor  # of rows
    mean_p: tl.tensor
    mean_q: tl.tensor
    pp: tl.tensor  # sums of the centred squares and the product
    pq: tl.tensor
    qq: tl.tensor


class Inputs(NamedTuple):
    """What the tiles of a long row are loaded from: of s, t and V, and the columns' numbers of DIST."""

    bases: tl.tuple
    strides: tl.tuple
    columns: tl.tensor
    classes: tl.tensor


class Tile(NamedTuple):
    """Columns of a long row, (lanes, classes)."""

    offsets: tl.tensor  # from the bases of the row
    inside: tl.tensor  # a mask of those in the row
    is_target: tl.tensor
    target_here: tl.tensor  # whether the target may be among them
