"""Rules for compiled kernels: no spills, launchable, rows in wide vectors."""

from __future__ import annotations

import re
from typing import Any, TypeAlias

#: A compute capability, such as 90 for 9.0, or an AMD GPU, such as "gfx942".
Gpu: TypeAlias = "int | str"
#: Bytes of shared memory available to a block, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: The same on every AMD GPU up to gfx942.
AMD_SHARED = 64 * 1024
#: Limit for ranking on chip: available on every GPU since sm_80, the smaller ones included.
RANKED_SHARED = 99 * 1024
REGISTERS = 65536  # per multiprocessor
#: Bytes that a kernel may spill, stores and loads together. A thread of rank_streamed_row has 24 keys and their classes
#: in 64 registers. What it spills is read once a pass or a visit, and not once a class: addresses, flags.
SPILLS = {"rank_streamed_row": 192}
ROW_KERNELS = ("rows_on_chip", "rows_looped")
RANK_KERNELS = ("target_probabilities", "ranked_on_chip", "write_keys", "combine_ranked")
ONE_INPUT = ("target_probabilities", "combine_ranked")

Row = dict[str, Any]


def parsed_gpu(text: str) -> Gpu:
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", text):
        return text
    return int(text)


def name_of(gpu: Gpu) -> str:
    return f"sm_{gpu}" if isinstance(gpu, int) else gpu


def shared_limit(gpu: Gpu) -> int:
    return SHARED_LIMIT.get(gpu, RANKED_SHARED) if isinstance(gpu, int) else AMD_SHARED


def problems(row: Row) -> list[str]:
    """Rules that a compiled kernel breaks, as messages."""
    name = f"{row['kernel']} of {row['case']}, {name_of(row['capability'])}"
    if row["library"]:
        return []  # CUB's own kernels for sorting in global memory, which spill some bytes
    found = []
    allowed = SPILLS.get(row["kernel"].partition("<")[0], 0)
    if row["spilled"] > allowed or (not allowed and (row["stack"] or row["local"])):
        found.append(
            f"{name}: spills: {row['stack']} bytes of stack, {row['local']} instructions on local memory, "
            f"{row['spilled']} bytes spilled at {row['registers']} registers"
        )
    limit = min(shared_limit(row["capability"]), row["shared_limit"])
    if row["shared"] > limit:
        found.append(f"{name}: {row['shared']} bytes of shared memory, {limit} at most")
    amd = isinstance(row["capability"], str)  # AMD's compiler knows the block size and spills if registers run out
    if not amd and row["registers"] * row["threads"] > REGISTERS:
        found.append(f"{name}: {row['registers']} registers in {row['threads']} threads cannot launch")
    # On chip, each thread loads its whole part of each row in vectors. Other loads are targets, counts, the logits at
    # y, and DIST's column sums. Rows of odd length allow no such vectors, so the rule uses the width that the plan says
    # is possible. The code has the loops of the looped kernel once or unrolled.
    loads, stores, vector = row["loads"], row["stores"], row["vector"]
    if row["kernel"] in ROW_KERNELS and row["element_bytes"] == 2 and vector >= 8:
        tile = max(1, 2 * row["elements"] // vector) if row["kernel"] == "rows_on_chip" else 1
        scalar_stores = row["writes"] and not stores.get(vector)
        if loads.get(vector, 0) < row["inputs"] * tile or scalar_stores:
            found.append(f"{name}: expected rows in vectors of {vector} bytes, got {loads} and {stores}")
    # These read their rows more than once, after the ranking in another order: at least one wide load per row.
    if row["kernel"] in RANK_KERNELS and row["element_bytes"] == 2 and vector >= 8:
        wide = sum(count for width, count in loads.items() if width >= 8)
        if wide < row["inputs"]:
            found.append(f"{name}: expected rows in vectors of 8 bytes at least, got {loads}")
    return found
