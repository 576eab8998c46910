"""The plan of the backward op: a stored gradient times the incoming gradient."""

from __future__ import annotations

from torch import Tensor

from fused_kd.backends.triton import layout, replay
from fused_kd.backends.triton.launch import Launch, acc_types, planned

#: Programs that share the tiles of scale_rows: 8 to 16 on each multiprocessor, and few enough to return at once.
SCALE_PROGRAMS = 2048


def scale_gradient(gradient: Tensor, grad_output: Tensor, norm: Tensor, out: Tensor) -> None:
    """out = gradient * grad_output * norm, row by row; ``out`` may be ``gradient``."""
    if gradient.numel():
        inputs, in_place = (gradient, grad_output, norm, out), gradient.data_ptr() == out.data_ptr()
        replay.run("scale", inputs, (), (in_place,), lambda: [plan_scale(*inputs)])


def plan_scale(gradient: Tensor, grad_output: Tensor, norm: Tensor, out: Tensor) -> Launch:
    """Plan the launch of scale_rows. With one factor for all rows, the gradient is one long row."""
    rows, width = gradient.shape
    stride = grad_output.stride(0) if grad_output.dim() else 0
    if stride == 0:
        rows, width = 1, rows * width
    config = layout.scale_config(width)
    vector = 16 // gradient.element_size()
    tiles = rows * -(-(width + vector - 1) // config.block)
    options = {
        "ACC": acc_types()[norm.dtype],
        "VEC": vector,
        "IN_PLACE": gradient.data_ptr() == out.data_ptr(),
        **layout.options_of(config),
    }
    arguments = (gradient, out, grad_output, norm, rows, width, stride)
    return planned("scale_rows", min(tiles, SCALE_PROGRAMS), arguments, options)
