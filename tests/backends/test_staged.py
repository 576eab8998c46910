"""The staged schedule of the C++ core: a row cut into pieces at any columns equals the whole row."""

import pytest
import torch
from hypothesis import given, settings

from fused_kd.backends import native, staged
from fused_kd.core.catalogue import ROW_LOSSES
from tests.support import staged_cases

pytestmark = pytest.mark.skipif(native.unavailable("cpu") is not None, reason="without the C++ core")


@settings(max_examples=300, deadline=None)
@given(staged_cases.problems())
def test_pieces_are_the_row(problem):
    staged_cases.assert_same(native, problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_pieces_are_as_exact_as_the_row(loss, standardize, dtype):
    if standardize and loss in staged_cases.NO_TEACHER:
        return
    options = {"temperature": 3.0, "ce_weight": 1.0, "standardize": standardize}
    problem = staged_cases.make(loss, 3000, (7, 1024, 2500), **options)
    staged_cases.assert_within_the_whole_rows_error(native, problem, dtype)


def test_js_of_beta_0_is_kd():
    staged_cases.assert_beta_0_is_kd(native)


def test_a_class_out_of_range_is_named():
    problem = staged_cases.make("nkd", 10, (4,))
    problem.target[2] = 10
    with pytest.raises(IndexError, match=r"from 0 to 9.*got 10"):
        staged.run(native, staged_cases.pieces_of(problem), problem.options)


def test_labels_that_are_no_probabilities_are_named():
    problem = staged_cases.make("kd", 10, (4,), labels="probability", ce_weight=1.0)
    problem.target[2] *= 2
    with pytest.raises(ValueError, match="a row that sums to 2"):
        staged.run(native, staged_cases.pieces_of(problem), problem.options)
