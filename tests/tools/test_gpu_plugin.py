"""How tools/gpu/plugin.py moves CPU tensors to a GPU and back, with the CPU as that device."""

import os

import torch

from tools.gpu.plugin import ALIGNMENT, Carried


def test_storages_go_there_and_back():
    whole = torch.arange(40.0)
    first, second, other = whole[3:20], whole[10:].view(5, 6).t(), torch.zeros(4, dtype=torch.bfloat16)
    carried = Carried("cpu")
    there = [carried.there(tensor) for tensor in (first, second, other)]
    assert len(carried.storages) == 2
    assert there[1].data_ptr() - there[0].data_ptr() == second.data_ptr() - first.data_ptr()
    for tensor, copy in zip((first, second, other), there, strict=True):
        assert copy.data_ptr() % ALIGNMENT == tensor.data_ptr() % ALIGNMENT
        assert copy.data_ptr() != tensor.data_ptr()
    there[0].view(torch.float32)[:2] = torch.tensor([-1.0, -2.0])
    there[2].view(torch.bfloat16)[3] = 7.0
    assert whole[3] == 3.0
    carried.back()
    assert whole[:6].tolist() == [0.0, 1.0, 2.0, -1.0, -2.0, 5.0]
    assert whole[-1] == 39.0 and other.tolist() == [0.0, 0.0, 0.0, 7.0]


def test_everything_else_stays():
    carried = Carried("cpu")
    assert carried.there(None) is None and carried.there(3) == 3
    empty = torch.empty(0)
    carried.there(empty)
    carried.back()


def test_importing_it_leaves_the_interpreter_as_it_is():
    assert torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1"
    assert "tools.gpu.plugin" not in os.environ.get("PYTEST_PLUGINS", "")
