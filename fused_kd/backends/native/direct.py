"""Sets up the C++ core for whole calls with Python tensors (csrc/python/direct.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_kd.backends.native.boundary import RANKS
from fused_kd.core import transforms
from fused_kd.core.options import HyperParameters


def begin(core: Any) -> bool:
    """Set up whole calls. Return False if this PyTorch lacks the interface that they need."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if core is None or exchange is None:
        return False
    dtypes = (torch.float32, torch.float64)
    scalars = tuple(torch.empty((), dtype=dtype, device="cpu") for dtype in dtypes)
    parts = tuple(torch.empty(kinds, dtype=dtype, device="cpu") for kinds in (2, 3, 4) for dtype in dtypes)
    if any(type(tensor) is not Tensor for tensor in (*scalars, *parts)):
        return False  # imported under a mode such as FakeTensorMode
    return bool(
        core.direct_begin(
            exchange,
            Tensor,
            torch.empty_like,
            {"memory_format": torch.contiguous_format},
            scalars,
            parts,
            {name: place for place, name in enumerate(HyperParameters._fields)},
            RANKS,
            torch.is_grad_enabled,
            torch._C._autograd._get_current_graph_task_keep_graph,
            transforms.OBSERVERS,
            forward_ad.__dict__,
        )
    )
