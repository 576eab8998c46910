"""The interpreter's options for pytest's command line, shared by both plugins."""

from __future__ import annotations

import argparse

import pytest

from tools.ptx.state import Options

SCHEDULES = ("together", "forward", "backward")


def add(parser: pytest.Parser) -> pytest.OptionGroup:
    group = parser.getgroup("ptx", "compiled kernels on an interpreter of PTX")
    group.addoption("--ptx-schedule", choices=SCHEDULES, default="together", help="order of warps (%(default)s)")
    group.addoption("--ptx-noise", type=float, default=0.0, help="share of the documented errors to add, 0 to 1")
    group.addoption("--ptx-fuse", action="store_true", help="contract products and sums as ptxas may")
    return group


def read(namespace: argparse.Namespace) -> Options:
    return Options(namespace.ptx_schedule, namespace.ptx_noise, namespace.ptx_fuse)
