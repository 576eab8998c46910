"""The rules that a compiled kernel in use must keep: no spills, launchable, rows in wide vectors."""

from __future__ import annotations

import re
from typing import Any, TypeAlias

#: A compute capability, such as 90 for 9.0, or an AMD GPU, such as "gfx942".
Gpu: TypeAlias = "int | str"
#: Shared memory that a block can have, in bytes, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: What every AMD GPU up to gfx942 gives a block.
AMD_SHARED = 64 * 1024
#: What ranking on chip may take: what every GPU since sm_80 gives a block, the smaller ones included.
RANKED_SHARED = 99 * 1024
REGISTERS = 65536  # of a multiprocessor
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
    """Which rules a compiled kernel breaks."""
    name = f"{row['kernel']} of {row['case']}, {name_of(row['capability'])}"
    if row["library"]:
        return []  # CUB's own choices for sorting in global memory, which spill some bytes
    found = []
    if row["stack"] or row["local"] or row["spilled"]:
        found.append(
            f"{name}: spills: {row['stack']} bytes of stack, {row['local']} instructions on local memory, "
            f"{row['spilled']} bytes spilled at {row['registers']} registers"
        )
    limit = min(shared_limit(row["capability"]), row["shared_limit"])
    if row["shared"] > limit:
        found.append(f"{name}: {row['shared']} bytes of shared memory, {limit} at most")
    amd = isinstance(row["capability"], str)  # whose compiler knows the threads, and spills where they have too few
    if not amd and row["registers"] * row["threads"] > REGISTERS:
        found.append(f"{name}: {row['registers']} registers in {row['threads']} threads cannot launch")
    # On chip a thread's part of each row is loaded in vectors, all of it; what else is loaded are targets, counts, the
    # logits at y, and DIST's sums of columns. Rows of an odd length have no vectors there, so what is asked of them is
    # what the plan says can be had. The loops of the looped kernel stand in the code once or unrolled.
    loads, stores, vector = row["loads"], row["stores"], row["vector"]
    if row["kernel"] in ROW_KERNELS and row["element_bytes"] == 2 and vector >= 8:
        tile = max(1, 2 * row["elements"] // vector) if row["kernel"] == "rows_on_chip" else 1
        scalar_stores = row["writes"] and not stores.get(vector)
        if loads.get(vector, 0) < row["inputs"] * tile or scalar_stores:
            found.append(f"{name}: expected rows in vectors of {vector} bytes, got {loads} and {stores}")
    # These read their rows more than once, after the ranking in another order: one wide load of each row at least.
    if row["kernel"] in RANK_KERNELS and row["element_bytes"] == 2 and vector >= 8:
        wide = sum(count for width, count in loads.items() if width >= 8)
        if wide < row["inputs"]:
            found.append(f"{name}: expected rows in vectors of 8 bytes at least, got {loads}")
    return found
