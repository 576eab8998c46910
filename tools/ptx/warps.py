"""Instructions that the threads of a warp run together: shuffles, votes, matches, reductions, 8×8 matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx.instructions.common import known
from tools.ptx.instructions.moves import parts
from tools.ptx.memory import gather
from tools.ptx.parse import Instruction
from tools.ptx.state import State
from tools.ptx.types import Array, Fault, Unsupported

#: Instructions that wait for other threads or ask which are active, with their known modifiers.
_MODIFIERS = {
    "bar": "sync warp cta red popc and or aligned", "barrier": "sync cta red popc and or aligned",
    "shfl": "sync up down bfly idx", "vote": "sync ballot any all uni", "match": "sync any",
    "redux": "sync NaN add min max and or xor", "activemask": "", "elect": "sync",
    "ldmatrix": "sync aligned m8n8 x1 x2 x4 trans shared shared__cta",
    "stmatrix": "sync aligned m8n8 x1 x2 x4 trans shared shared__cta",
}  # fmt: skip
TOGETHER = tuple(_MODIFIERS)


def check(i: Instruction) -> None:
    """Raise Unsupported for instructions unknown to :func:`operate` and to the machine's barriers."""
    try:
        known(i, *_MODIFIERS[i.opcode].split())
        if i.opcode in ("ldmatrix", "stmatrix") and i.types != ["b16"]:
            raise Unsupported("matrices of elements other than b16")
        if i.opcode == "redux" and i.types == ["f32"] and not {"min", "max"} & set(i.modifiers):
            raise Unsupported("a sum of f32")
    except NotImplementedError as error:
        raise Unsupported(f"{i}: {error}") from error


def members(state: State, i: Instruction) -> Array:
    """Each thread's mask of the participating threads."""
    if i.opcode in ("ldmatrix", "stmatrix"):
        return np.full(state.lanes, 0xFFFFFFFF, np.int64)
    return state.source(i.operands[0 if i.opcode in ("bar", "barrier") else -1], "u32")().astype(np.int64)


def ballot(state: State, mask: Array) -> Array:
    """For each thread, the bits of its warp's threads in the mask."""
    bits = np.zeros(state.warps, np.int64)
    np.bitwise_or.at(bits, state.warp[mask], 1 << state.lane_in_warp[mask].astype(np.int64))
    return bits[state.warp]


def operate(state: State, i: Instruction, mask: Array) -> None:
    """Run the instruction for the masked threads, which are whole groups."""
    OPERATIONS[i.opcode](state, i, mask)


def _barrier(state: State, i: Instruction, mask: Array) -> None:
    """bar.warp.sync: nothing to do after the wait."""


def _active(state: State, i: Instruction, mask: Array) -> None:
    state.target(i.operands[0], "b32")(ballot(state, mask).astype(np.uint32), mask)


def _shuffle(state: State, i: Instruction, mask: Array) -> None:
    name, _, predicate = i.operands[0].partition("|")
    value = state.source(i.operands[1], "b32")()
    b, c = (state.source(operand, "u32")().astype(np.int64) for operand in i.operands[2:4])
    lane = state.lane_in_warp.astype(np.int64)
    by, clamp, segment = b & 31, c & 31, c >> 8 & 31
    first, last = lane & segment, (lane & segment) | (clamp & ~segment)
    if "up" in i.modifiers:
        source = lane - by
        inside = source >= last
    else:
        source = lane + by if "down" in i.modifiers else lane ^ by if "bfly" in i.modifiers else first | (by & ~segment)
        inside = source <= last
    source = np.where(inside, source, lane)
    if (mask & (members(state, i) >> source & 1 == 0)).any():
        state.problem("a shuffle reads a thread outside its mask", i)
    # The last warp of a block may have fewer than 32 threads.
    place = np.minimum(state.all_lanes - lane + source, state.lanes - 1)
    state.counts["shuffles"] += state.warps_of(mask)
    state.target(name, "b32")(value[place], mask)
    if predicate:
        state.target(predicate, "pred")(inside, mask)


def _vote(state: State, i: Instruction, mask: Array) -> None:
    predicate = state.source(i.operands[1], "pred")()
    ones, everyone = ballot(state, mask & predicate), ballot(state, mask)
    if "ballot" in i.modifiers:
        return state.target(i.operands[0], "b32")(ones.astype(np.uint32), mask)
    if "any" in i.modifiers:
        result = ones != 0
    else:
        result = ones == everyone
        if "uni" in i.modifiers:
            result |= ones == 0
    return state.target(i.operands[0], "pred")(result, mask)


def _match(state: State, i: Instruction, mask: Array) -> None:
    value = state.source(i.operands[1], i.types[-1])()
    lanes = np.nonzero(mask)[0]
    keys = np.stack([state.warp[lanes].astype(np.uint64), value[lanes].astype(np.uint64)], axis=1)
    _, which = np.unique(keys, axis=0, return_inverse=True)
    bits = np.zeros(len(lanes), np.int64)
    np.bitwise_or.at(bits, which.ravel(), 1 << state.lane_in_warp[lanes].astype(np.int64))
    result = np.zeros(state.lanes, np.uint32)
    result[lanes] = bits[which.ravel()]
    state.target(i.operands[0], "b32")(result, mask)


def _reduce(state: State, i: Instruction, mask: Array) -> None:
    kind = i.types[-1]
    value = state.source(i.operands[1], kind)()
    operation = next(word for word in i.modifiers if word in ("add", "min", "max", "and", "or", "xor"))
    nan = "NaN" in i.modifiers
    functions: dict[str, np.ufunc] = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }  # fmt: skip
    function = functions[operation]
    if kind == "f32":
        function = function if nan else np.fmin if operation == "min" else np.fmax
    lanes = np.nonzero(mask)[0]  # in order of warps
    warps = state.warp[lanes]
    starts = np.nonzero(np.diff(warps, prepend=-1))[0]
    result = np.zeros(state.warps, value.dtype)
    result[warps[starts]] = function.reduceat(value[lanes], starts)
    state.counts["shuffles"] += len(starts)
    state.target(i.operands[0], kind)(result[state.warp], mask)


def _elect(state: State, i: Instruction, mask: Array) -> None:
    here = ballot(state, mask)
    leader = np.bitwise_count((here & -here) - 1).astype(np.uint32)
    name, _, predicate = i.operands[0].partition("|")
    state.target(name, "b32")(leader, mask)
    state.target(predicate, "pred")(state.lane_in_warp == leader, mask)


def _matrices(state: State, i: Instruction, mask: Array) -> None:
    """ldmatrix and stmatrix: threads 8k to 8k + 7 give the addresses of the rows of matrix k, 8×8 words of 16 bits.

    Each thread holds two neighbours of a row, with .trans of a column.
    """
    load = i.opcode == "ldmatrix"
    names = parts(i.operands[0 if load else 1])
    address = state.address(i.operands[1 if load else 0])()
    lane = state.lane_in_warp.astype(np.int64)
    first, lanes = state.all_lanes - lane, np.nonzero(mask)[0]
    for k, name in enumerate(names):
        rows = lanes[(state.lane_in_warp[lanes] >= 8 * k) & (state.lane_in_warp[lanes] < 8 * k + 8)]
        if (address[rows] % np.uint64(16)).any():
            raise Fault(f"misaligned row of a matrix: {i}")
        words = np.zeros(state.lanes, np.uint32) if load else state.source(name, "b32")()
        for half in (0, 1):
            row, column = (
                (2 * (lane % 4) + half, lane // 4) if "trans" in i.modifiers else (lane // 4, 2 * (lane % 4) + half)
            )
            at = address[first + 8 * k + row] + (2 * column).astype(np.uint64)
            memory, places = state.access("shared", at, lanes, 2, i, "load" if load else "store")
            if load:
                words[lanes] |= gather(memory, places, 2).astype(np.uint32) << np.uint32(16 * half)
            else:
                state.store(memory, places, (words[lanes] >> np.uint32(16 * half)).astype(np.uint16), lanes, i)
        if load:
            state.target(name, "b32")(words, mask)


OPERATIONS: dict[str, Callable[[State, Instruction, Array], None]] = {
    "bar": _barrier, "barrier": _barrier, "activemask": _active, "shfl": _shuffle, "vote": _vote, "match": _match,
    "redux": _reduce, "elect": _elect, "ldmatrix": _matrices, "stmatrix": _matrices,
}  # fmt: skip
