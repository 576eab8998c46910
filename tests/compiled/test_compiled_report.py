"""The loads and stores in docs/kernels.md equal what the kernels request."""

from pathlib import Path

import pytest
import torch

from tools.ptx import report
from tools.ptx.__main__ import BEGIN, END

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.mark.parametrize(
    "call", [report.Call("nkd", 1000, torch.bfloat16), report.Call("tf_kd", 9001, torch.bfloat16)], ids=str
)
def test_the_page_s_rows(gpu, call):
    """Compares bytes, which depend only on the kernels; the number of instructions depends on the compiler."""
    block = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [tuple(cell.strip() for cell in line.strip("| ").split("|"))[:8] for line in block.splitlines()]
    for reading in report.read(call):
        assert reading.stated is None or tuple(report.cells(reading)[:8]) in rows


def test_what_is_asked_for_is_what_is_stated(gpu):
    """For the kernel that every loss uses, within a tenth, except for what its rows share."""
    for classes in (1000, 9000):
        row_kernel = report.read(report.Call("nkd", classes, torch.bfloat16))[0]
        assert row_kernel.stated is not None
        for asked, stated in zip((row_kernel.loads[0], row_kernel.stores[0]), row_kernel.stated, strict=True):
            assert asked < 1.1 * stated + 0.1
