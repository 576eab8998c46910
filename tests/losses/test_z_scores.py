"""Z-scores of rows that lie far from 0: a mean in float32 is off by more than the z-scores of such a row may be."""

import importlib

import pytest
import staged_cases
import torch
from loss_cases import compare
from test_row_weight import long_rows  # noqa: F401

from fused_kd import check

LOSSES = ("kd", "nkd", "dkd", "wsld", "js", "dist")


def inputs(classes, mean, dtype=torch.float32, rows=8):
    generator = torch.Generator().manual_seed(classes)
    logits = mean + torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return *logits.to(dtype), torch.arange(rows) % classes


def outcome(backend, loss, classes, mean, **options):
    options = {"logit_standardization": True, **({"gamma": 0.0} if loss == "dist" else {}), **options}
    return check.compare_inputs(backend, *inputs(classes, mean), options, loss=loss)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mean", (1000.0, -1000.0, 30000.0))
@pytest.mark.parametrize("classes", (10, 300))  # the z-scores of two do not depend on them
def test_every_backend_has_the_digits(loss, mean, classes):
    for backend in check.runnable("cpu", loss):
        for options in ({}, {"ce_weight": 0.5, "label_smoothing": 0.1}, {"temperature": 2.0}):
            found = outcome(backend, loss, classes, mean, **options)
            assert found.gradient <= found.gradient_budget, (backend, options, found)


@pytest.mark.skipif("triton" not in check.runnable("cpu", "kd"), reason="Triton does not run here")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("long_rows")
def test_long_rows_by_triton(loss):
    found = outcome("triton", loss, 1301, 1000.0)
    assert found.gradient <= found.gradient_budget, found


@pytest.mark.parametrize("name", check.runnable("cpu", "kd"))
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_in_pieces(name, loss):
    problem = staged_cases.without_columns(staged_cases.make(loss, 60, (7, 31), standardize=True, spread=1.0))
    problem = problem._replace(student=1000 + problem.student, teacher=1000 + problem.teacher)
    staged_cases.assert_within_the_whole_rows_error(
        importlib.import_module(f"fused_kd.backends.{name}"), problem, torch.float32
    )


@pytest.mark.parametrize("name", check.runnable("cpu", "kd"))
@pytest.mark.parametrize("loss", LOSSES)
def test_a_block_of_a_row_in_which_no_class_can_occur(name, loss):
    """Its largest logit stands as 0, far above the others."""
    student, teacher, target = inputs(2100, -1000.0, torch.float64, rows=2)
    target += 2000
    for which in (student, teacher):
        which[:, :1100] = -torch.inf
        options = {"logit_standardization": True, "ce_weight": 0.5, "temperature": 2.0}
        if loss == "dist":
            options["gamma"] = 0.0
        compare((loss, name, "cpu"), student, [teacher], target, tolerance=1e-9, **options)
