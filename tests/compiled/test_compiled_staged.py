"""The staged kernels, compiled: pieces of a row against the whole row, through Triton's own JIT."""

from __future__ import annotations

import pytest
import torch

from fused_kd.backends import triton as backend
from fused_kd.core.catalogue import ROW_LOSSES
from tests.support import staged_cases


@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_pieces_are_the_row(gpu, loss):
    options = {"temperature": 3.0}
    if loss != "kd":  # with all that there is
        with_scores = loss not in staged_cases.NO_TEACHER
        options |= {"ce_weight": 1.0, "label_smoothing": 0.1, "labels": "probability", "standardize": with_scores}
    problem = staged_cases.without_columns(staged_cases.make(loss, 700, (7, 512), rows=3, **options))
    staged_cases.assert_within_the_whole_rows_error(backend, problem, torch.float32)


@pytest.mark.parametrize("gpu", [80, 100], indirect=True, ids=["sm_80", "sm_100"])
def test_other_gpus(gpu):
    problem = staged_cases.make("nkd", 300, (160,), rows=3, weighted=True)
    staged_cases.assert_within_the_whole_rows_error(backend, problem, torch.float32)
    staged_cases.assert_within_the_whole_rows_error(backend, problem, torch.bfloat16)


@pytest.mark.parametrize("cuts", [(0, 200), (200, 300)], ids=["first", "last"])
@pytest.mark.parametrize("loss", ["nkd", "js"])
def test_a_piece_without_columns_reads_nothing(gpu, loss, cuts):
    """A process may have no class. Its matrix has no address."""
    problem = staged_cases.make(loss, 300, cuts, rows=3, standardize=True)
    assert any(piece.student.data_ptr() == 0 for piece in staged_cases.pieces_of(problem))
    staged_cases.assert_within_the_whole_rows_error(backend, problem, torch.float32)
