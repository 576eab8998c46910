"""The staged schedule of the Triton kernels: a row cut into pieces at any columns equals the whole row."""

import pytest
import torch
from hypothesis import given, settings

from fused_kd.backends import staged
from fused_kd.backends import triton as backend
from fused_kd.backends.triton.launch import run
from fused_kd.backends.triton.plans.staged import fields, plan_stage
from fused_kd.core.catalogue import ROW_LOSSES
from fused_kd.core.rows import StageResults
from tests.support import staged_cases

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(backend.unavailable("cpu") is not None, reason=str(backend.unavailable("cpu"))),
]


@settings(max_examples=40, deadline=None)
@given(staged_cases.problems(most=80))
def test_pieces_are_the_row(problem):
    staged_cases.assert_same(backend, staged_cases.without_columns(problem))


@pytest.mark.parametrize("labels", ["index", "probability"])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_pieces_are_as_exact_as_the_row(loss, standardize, labels):
    if standardize and loss in staged_cases.NO_TEACHER:
        return
    options = {"temperature": 3.0, "ce_weight": 1.0, "label_smoothing": 0.1, "standardize": standardize}
    problem = staged_cases.make(loss, 1500, (7, 1024, 1400), labels=labels, **options)
    staged_cases.assert_within_the_whole_rows_error(backend, staged_cases.without_columns(problem), torch.float32)


def test_a_stage_fills_all_its_fields_and_no_more():
    problem = staged_cases.make("dist", 10, (4,), standardize=True)
    (piece, _), options = staged_cases.pieces_of(problem), staged_cases.without_columns(problem).options
    earlier, unwritten = StageResults(), -12345.0
    for stage, number in fields().items():
        out = torch.full((number + 1, len(piece.student)), unwritten, dtype=torch.float64)
        run([plan_stage(stage, piece, earlier, options, None, out, torch.empty(0))], out.device)
        assert (out[:-1] != unwritten).all() and (out[-1] == unwritten).all(), stage
        earlier = earlier._replace(**{stage: out[None, :-1].contiguous()})


def test_js_of_beta_0_is_kd():
    staged_cases.assert_beta_0_is_kd(backend)


def test_the_columns_of_dist_have_no_stages():
    problem = staged_cases.make("dist", 10, (4,))
    with pytest.raises(NotImplementedError, match="columns"):
        staged.run(backend, staged_cases.pieces_of(problem), problem.options)
