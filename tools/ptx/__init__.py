"""Compiled GPU code, run without a GPU: a functional interpreter of the PTX that Triton and nvcc make of our kernels.

All threads of some blocks are lanes of NumPy arrays. What the compilers did to a kernel is there: contraction, layouts,
shuffles, barriers, vector loads. Besides results it checks the bounds and the alignment of every access, reads of
shared memory that nobody wrote, races between warps and between blocks, masks of shuffles, and deadlocks. It shows no
time, nothing of what ptxas does after it, and no order of memory but the one in which it runs.

    module = Module(text)
    memory = Memory()
    pointer = memory.add(array_of_bytes)
    result = launch(module, name, memory, grid, block, shared_bytes, params)
"""

from tools.ptx.machine import Result, launch
from tools.ptx.memory import Memory
from tools.ptx.parse import Module
from tools.ptx.state import Options
from tools.ptx.types import Fault, Unsupported

__all__ = ["Fault", "Memory", "Module", "Options", "Result", "Unsupported", "launch"]
