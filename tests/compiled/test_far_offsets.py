"""Offsets past 2^31 elements: the last rows of matrices that have addresses for all rows, but memory only there."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from fused_kd.backends import triton as backend
from fused_kd.core.options import HyperParameters, Options, in_order
from fused_kd.core.rows import Piece, StageResults
from tools.ptx import machine
from tools.ptx.triton import driver

LARGE, END = 1 << 27, 1 << 20  # bytes
SUMS = torch.tensor([0.5, 0.0, 3.0], dtype=torch.float64)


@pytest.fixture
def ends(gpu, monkeypatch):
    """Run the last two programs of each launch alone, on the ends of large tensors alone."""
    whole = driver._pointer

    def pointer(memory, places, tensor):
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        if size < LARGE:
            return whole(memory, places, tensor)
        if start not in places:
            places[start] = ((len(places) + 1) << 40) + start % 512
            end = (size - END) // 512 * 512
            data = np.ctypeslib.as_array((ctypes.c_uint8 * (size - end)).from_address(start + end))
            memory.add(data, address=places[start] + end)
        return places[start] + tensor.data_ptr() - start

    def last(*bounds):  # only the loop over blocks has a step
        return range(max(0, bounds[1] - 2), *bounds[1:]) if len(bounds) == 3 else range(*bounds)

    monkeypatch.setattr(driver, "_pointer", pointer)
    monkeypatch.setattr(machine, "range", last, raising=False)


def matrix(rows, values):
    """A matrix whose last two rows have values."""
    result = torch.empty(rows, values.shape[1], dtype=values.dtype)
    result[-2:] = values
    return result


def options(loss, gradients=1):
    named = {"gamma": 1.5, "alpha": 1.0, "beta": 0.3, "mu": 1.0, "power": 1.0, "temperature": 2.0, "ce_weight": 0.5}
    wanted, scales = (True,) * gradients, (1.0,) * gradients
    return Options(HyperParameters._make(in_order(named)), -100, "none", wanted, scales, loss)


def staged(student, target):
    classes, asked = student.shape[1], options("nkd")
    piece = Piece(student, student, None, target, 0, classes)
    found = backend.row_stage("statistics", piece, StageResults(), asked, None)
    return backend.row_stage("gradient", piece, StageResults(statistics=found[None]), asked, None)[1:]


def zipf(student, target):
    return backend.zipf_ls(student, student.unsqueeze(1), target, None, options("zipf_ls"))[2:3]


def top_k(student, target):
    indices = torch.tensor([[3, 1, 7, 11]]).expand(len(student), 4)
    log_probs = torch.tensor([[-3.0, -1.0, -2.0, -1.5]]).expand(len(student), 4)
    return backend.topk_loss(student, log_probs, indices, "bucket", target, None, options("nkd"))[2:]


def rows_of(loss):
    return lambda student, target: backend.row_loss(student, student, target, None, None, options(loss))[2:3]


CALLS = {
    "nkd": rows_of("nkd"),
    "js": rows_of("js"),
    "labels": lambda student, _: backend.row_loss(student, student, student, None, None, options("nkd"))[2:3],
    "uskd": lambda student, target: backend.uskd(student, student, target, SUMS, None, options("uskd", 2))[2:4],
    "zipf_ls": zipf,
    "staged": staged,
    "topk": top_k,
}


#: Held on chip, and walked. USKD would sort the walked rows, all of them.
CASES = [(call, 2048) for call in ("nkd", "js", "labels", "uskd")]
CASES += [(call, 65536) for call in ("nkd", "js", "labels", "zipf_ls", "staged", "topk")]


@pytest.mark.parametrize(("call", "classes"), CASES)
def test_rows_of_a_large_matrix(ends, call, classes):
    """The logits and the gradient have as many elements, and a top-k teacher's marks a bit for each."""
    values = torch.randn(2, classes, generator=torch.Generator().manual_seed(0)).softmax(1).bfloat16()
    results = []
    for rows in (2**31 // classes + 2, 2):
        found = CALLS[call](matrix(rows, values), torch.full((rows,), 5))
        results.append([gradient[-2:].float() for gradient in found])
    for far, near in zip(*results, strict=True):
        torch.testing.assert_close(far, near, rtol=2**-7, atol=0)


def test_scaling_rows(ends):
    """The last two programs scale the last row: of two tiles for each row, every 1024th row's are theirs."""
    rows, classes = 2**20 + 1024, 2048
    gradient, incoming = matrix(rows, torch.ones(2, classes, dtype=torch.bfloat16)), torch.ones(rows)
    incoming[-1] = 2.0
    backend.scale_gradient(gradient, incoming, torch.ones(()), gradient)
    assert (gradient[-1] == 2.0).all() and (gradient[-2] == 1.0).all()
