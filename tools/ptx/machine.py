"""Runs the threads: jumps, instructions that wait for other threads, barriers, and the order of warps."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from tools.ptx import warps
from tools.ptx.counters import kinds_of
from tools.ptx.instructions import compile_instruction
from tools.ptx.instructions.common import Run
from tools.ptx.instructions.floats import remember_product
from tools.ptx.memory import SECTOR, Memory
from tools.ptx.parse import Instruction, Module, number
from tools.ptx.state import Options, Size, State
from tools.ptx.types import BITS, Array, Fault, Unsupported

_JUMPS = ("bra", "brx", "ret", "exit", "trap")
#: Most instructions that a batch of blocks may step through: more is an endless loop.
LIMIT = 50_000_000


class Straight(NamedTuple):
    """Instructions without jumps, and the jump or waiting instruction at their end, if any."""

    body: list[Instruction]
    last: Instruction | None

    @property
    def instructions(self) -> list[Instruction]:
        return self.body if self.last is None else [*self.body, self.last]


class Result(NamedTuple):
    """``problems``: errors that a GPU does not report, such as races, with their counts. ``counts``: sectors, bytes,
    shuffles, barriers, and instructions of warps by kind."""

    problems: Counter[str]
    counts: Counter[str]


def launch(
    module: Module,
    name: str,
    memory: Memory,
    grid: Size,
    block: Size,
    shared_bytes: int,
    params: bytes,
    options: Options | None = None,
) -> Result:
    """Run a kernel; it writes to the arrays in ``memory``.

    Raises:
        Fault: an access out of bounds or misaligned, a deadlock, a trap, more threads than the kernel allows.
        Unsupported: an unknown instruction.
    """
    options = options or Options()
    function = module.functions[name]
    threads = block[0] * block[1] * block[2]
    if threads > (function.maxntid or 1024):
        raise Fault(f"{name}: {threads} threads in a block, at most {function.maxntid or 1024} are allowed")
    globals_at = {
        label: memory.add(np.frombuffer(variable.value, np.uint8).copy()) for label, variable in module.globals.items()
    }
    widths = [BITS[i.types[-1]] // 8 for i in function.code if i.opcode in ("ld", "ldu", "st", "atom", "red")]
    memory.load(min([*widths, 2 if any(i.opcode.endswith("matrix") for i in function.code) else 16, 16]))
    problems: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    number_of_blocks = grid[0] * grid[1] * grid[2]
    together = max(1, options.lanes // threads)
    with np.errstate(all="ignore"):
        for first in range(0, number_of_blocks, together):
            blocks = range(first, min(first + together, number_of_blocks))
            state = State(module, function, memory, grid, block, blocks, shared_bytes, params, globals_at, options)
            Machine(state).run()
            problems += state.problems
            counts += state.counts
    counts["threads"] = threads * number_of_blocks
    for how, sectors in memory.touched.items():
        counts[f"{how} bytes of memory"] = SECTOR * int(sectors.sum())
    memory.store()
    return Result(problems, counts)


class Machine:
    def __init__(self, state: State) -> None:
        self.state = state
        self.code = state.function.code
        starts = {0, *state.function.labels.values()}
        for n, i in enumerate(self.code):
            if i.opcode in _JUMPS:
                starts.add(n + 1)
            elif i.opcode in warps.TOGETHER:
                starts |= {n, n + 1}
        ordered = sorted(start for start in starts if start < len(self.code))
        self.at = {start: k for k, start in enumerate(ordered)}
        self.straights = [
            self._straight(self.code[start:end])
            for start, end in zip(ordered, [*ordered[1:], len(self.code)], strict=True)
        ]
        self.runs: dict[int, list[Run]] = {}
        if not state.function.known:  # only once: later launches compile what they reach, a small part of CUB's code
            for at in range(len(self.straights)):
                self._compile(at)
            state.function.known = True
        self.place = np.zeros(state.lanes, np.int64)  # each thread's current straight
        self.done = np.zeros(state.lanes, np.bool_)
        self.waiting = np.zeros(state.lanes, np.bool_)
        self.visits = np.zeros(len(self.straights), np.int64)

    def _straight(self, instructions: list[Instruction]) -> Straight:
        last = instructions[-1] if instructions[-1].opcode in (*_JUMPS, *warps.TOGETHER) else None
        if last is not None and last.opcode == "bra" and last.operands[-1] not in self.state.function.labels:
            raise Unsupported(f"{last}: unknown label {last.operands[-1]}")
        if last is not None and last.opcode in warps.TOGETHER:
            warps.check(last)
        return Straight(instructions[: -1 if last else None], last)

    def _compile(self, at: int) -> list[Run]:
        runs = self.runs[at] = []
        self.state.products = {}
        for i in self.straights[at].body:
            runs.append(compile_instruction(self.state, i))
            if self.state.options.fuse:
                remember_product(self.state, i)
        return runs

    def run(self) -> None:
        state, steps = self.state, 0
        while not self.done.all():
            runnable = self._turn(~(self.done | self.waiting))
            at = int(np.min(self.place[runnable]))  # the threads furthest behind, so that diverged paths meet again
            mask = runnable & (self.place == at)
            straight = self.straights[at]
            everyone = None if mask.all() else mask
            for run in self.runs[at] if at in self.runs else self._compile(at):
                run(everyone)
            self.visits[at] += state.warps if everyone is None else state.warps_of(mask)
            steps += len(straight.body) + (straight.last is not None)
            if steps > LIMIT:
                raise Fault(f"no end after {LIMIT} instructions")
            if straight.last is None:
                self.place[mask] = at + 1
            elif straight.last.opcode in _JUMPS:
                self._jump(straight.last, at, mask)
            else:
                self._meet(straight.last, at, mask)
            self.done |= self.place >= len(self.straights)
        for straight, visits in zip(self.straights, self.visits, strict=True):
            for kind, times in kinds_of(straight.instructions).items() if visits else ():
                state.counts[kind] += times * int(visits)

    def _turn(self, runnable: Array) -> Array:
        """The runnable threads that the schedule selects."""
        if not runnable.any():
            at = sorted({str(self.straights[k].last) for k in self.place[self.waiting]})
            raise Fault(f"deadlock: {int(self.waiting.sum())} threads wait at {'; '.join(at[:4])}")
        schedule = self.state.options.schedule
        if schedule == "together":
            return runnable
        if schedule not in ("forward", "backward"):
            raise ValueError(f"schedule: expected 'together', 'forward' or 'backward', got {schedule!r}")
        able = self.state.warp_in_block[runnable]
        return runnable & (self.state.warp_in_block == (np.min(able) if schedule == "forward" else np.max(able)))

    def _guarded(self, i: Instruction, mask: Array) -> Array:
        if i.guard is None:
            return mask
        return mask & self.state.source(f"!{i.guard}" if i.negated else i.guard, "pred")()

    def _jump(self, i: Instruction, at: int, mask: Array) -> None:
        taken = self._guarded(i, mask)
        self.place[mask & ~taken] = at + 1
        if i.opcode in ("ret", "exit"):
            self.done |= taken
            if self.waiting.any():
                self._open_barriers()
        elif i.opcode == "bra":
            self.place[taken] = self.at.get(self.state.function.labels[i.operands[-1]], len(self.straights))
        elif i.opcode == "brx":
            table = np.array(
                [self.at[self.state.function.labels[x]] for x in self.state.function.tables[i.operands[1]]]
            )
            index = self.state.source(i.operands[0], "u32")()[taken]
            if (index >= len(table)).any():
                raise Fault(f"jump past its table: {i}")
            self.place[taken] = table[index]
        elif taken.any():
            raise Fault(f"trap: {i}")

    def _meet(self, i: Instruction, at: int, mask: Array) -> None:
        taken = self._guarded(i, mask)
        self.place[mask & ~taken] = at + 1
        if i.opcode == "activemask":
            warps.operate(self.state, i, taken)
            self.place[taken] = at + 1
            return
        self.waiting |= taken
        if i.opcode in ("bar", "barrier") and "warp" not in i.modifiers:
            self._open_barriers()
        else:
            self._meet_in_warp(i, at)

    def _meet_in_warp(self, i: Instruction, at: int) -> None:
        """Run the instruction for warps in which all threads named by the mask have arrived."""
        state = self.state
        here = self.waiting & (self.place == at)
        size = np.minimum(32, self.state.threads - 32 * state.warp_in_block)
        named = warps.members(state, i) & ((1 << size) - 1)
        if (here & (named >> state.lane_in_warp & 1 == 0)).any():
            state.problem("a thread is not in its own mask", i)
        ready = here
        if not here.all():
            arrived, ended = warps.ballot(state, here), warps.ballot(state, self.done)
            if (here & (named & ended != 0)).any():
                state.problem("the mask names threads that have ended", i)
            ready = here & (named & ~ended & ~arrived == 0)
            if not ready.any():
                return
        warps.operate(state, i, ready)
        self.waiting &= ~ready
        self.place[ready] = at + 1

    def _open_barriers(self) -> None:
        """Open a barrier in every block in which all threads that have not ended wait at it."""
        state = self.state
        barriers = {
            int(k): last
            for k in np.unique(self.place[self.waiting])
            if (last := self.straights[k].last) and last.opcode in ("bar", "barrier") and "warp" not in last.modifiers
        }
        left = np.bincount(state.block_here[~self.done], minlength=state.blocks)
        opened = np.zeros(state.blocks, np.bool_)
        go = np.zeros(state.lanes, np.bool_)
        for name in {self._name(i) for i in barriers.values()}:  # instructions with one name share a barrier
            places = [k for k, i in barriers.items() if self._name(i) == name]
            arrived = self.waiting & np.isin(self.place, places)
            full = np.bincount(state.block_here[arrived], minlength=state.blocks) == left
            opened |= full & (left > 0)
            go |= arrived & full[state.block_here]
        if not go.any():
            return
        for k, i in barriers.items():
            here = go & (self.place == k)
            if here.any():
                self._barrier(i, here)
        self.waiting &= ~go
        self.place[go] += 1
        state.epoch[opened] += 1
        state.counts["barriers"] += int(opened.sum())

    @staticmethod
    def _name(i: Instruction) -> str:
        return i.operands[1 if "red" in i.modifiers else 0]

    def _barrier(self, i: Instruction, here: Array) -> None:
        state, operands = self.state, list(i.operands)
        if "red" in i.modifiers:
            predicate = state.source(operands.pop(), "pred")()
            ones = np.bincount(state.block_here[here & predicate], minlength=state.blocks)[state.block_here]
            everyone = np.bincount(state.block_here[here], minlength=state.blocks)[state.block_here]
            name = operands.pop(0)
            if "popc" in i.modifiers:
                state.target(name, "u32")(ones.astype(np.uint32), here)
            else:
                state.target(name, "pred")(ones == everyone if "and" in i.modifiers else ones > 0, here)
        if len(operands) > 1 and (operands[1].startswith("%") or number(operands[1]) != state.threads):
            raise Unsupported(f"{i}: a barrier of some of the threads")
