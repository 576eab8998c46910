"""A functional interpreter of PTX: runs the GPU code that Triton and nvcc compile from our kernels, without a GPU.

The threads of several blocks are lanes of NumPy arrays. The code is as compiled: with contraction, layouts, shuffles,
barriers and vector loads. Besides computing results the interpreter checks the bounds and alignment of every access,
reads of unwritten shared memory, races between warps and between blocks, masks of shuffles, and deadlocks. It gives no
times, does not model ptxas, and knows no memory order but its own execution order.

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
