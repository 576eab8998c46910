"""Three kernels as Triton compiles them, without a GPU, and their launch arguments: python ptx_kernels.py OUT.json.

A separate process, because Triton must be imported without its interpreter.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

SCALARS = {"i32": "<i", "i64": "<q", "fp32": "<f", "fp64": "<d"}
CLASSES, ROWS = 1000, 2


def compiled(launch: Any) -> dict[str, Any]:
    """The PTX of a planned launch, and its arguments: size and type of a tensor, bytes of a number."""
    import triton
    from torch import Tensor
    from triton.backends.compiler import GPUTarget

    from tools.compile_matrix.machine_code import TYPES, source_of

    source, options = source_of(launch)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    given = [parameter for parameter in source.fn.params if not parameter.is_constexpr]
    values = []
    for parameter, argument in zip(given, launch.arguments, strict=True):
        if isinstance(argument, Tensor):
            values.append([TYPES[argument.dtype], argument.untyped_storage().nbytes(), parameter.name])
        elif argument is not None:
            kind = parameter.annotation_type
            values.append([kind, struct.pack(SCALARS[kind], argument).hex(), parameter.name])
    return {
        "name": launch.kernel,
        "ptx": kernel.asm["ptx"],
        "grid": launch.programs,
        "threads": 32 * kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        "values": values,
    }


def main(out: str) -> None:
    import torch

    from tools.compile_matrix.cases import Case

    single = torch.float32
    calls = [Case(single, single, CLASSES, rows=ROWS), Case(single, single, CLASSES, rows=ROWS, loss="dist")]
    wanted = {"rows_on_chip", "reduce_parts", "column_moments"}
    kernels = {x.kernel: x for call in reversed(calls) for x in call.launches() if x.kernel in wanted}
    Path(out).write_text(json.dumps([compiled(kernels[name]) for name in sorted(wanted)]))


if __name__ == "__main__":
    main(sys.argv[1])
