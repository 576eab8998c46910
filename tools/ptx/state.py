"""State of several blocks of a launch that run together: each thread is a lane of NumPy arrays."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tools.ptx.memory import LOCAL, PARAM, SECTOR, SHARED, Memory, Shadow, gather, scatter
from tools.ptx.numerics import Approximation
from tools.ptx.parse import Function, Instruction, Module, bits_of, number
from tools.ptx.types import BITS, NUMPY, SIGNED, UNSIGNED, Array, Fault, Unsupported, as_type

Source = Callable[[], Array]
#: Writes values where the mask is true; None means everywhere.
Target = Callable[[Array, Array | None], None]
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Options:
    """How to run a program.

    schedule: run the warps of a block in step ("together"), or each as far as it gets, in order ("forward") or in
        reverse order ("backward").
    noise: the share of its documented error that an approximation has, 0 to 1.
    fuse: contract products and sums to fused multiply-adds where PTX allows it, as ptxas does.
    lanes: number of threads to run at a time, in whole blocks.
    """

    schedule: str = "together"
    noise: float = 0.0
    fuse: bool = False
    lanes: int = 1 << 14


class State:
    def __init__(
        self,
        module: Module,
        function: Function,
        memory: Memory,
        grid: Size,
        block: Size,
        blocks: Sequence[int],
        shared_bytes: int,
        params: bytes,
        globals_at: dict[str, int],
        options: Options,
    ) -> None:
        self.function, self.memory, self.options = function, memory, options
        self.approximation = Approximation(options.noise)
        self.threads, self.blocks = block[0] * block[1] * block[2], len(blocks)
        self.lanes = self.threads * self.blocks
        self.warps_per_block = -(-self.threads // 32)
        self.warps = self.warps_per_block * self.blocks
        self.all_lanes = np.arange(self.lanes)
        thread = np.tile(np.arange(self.threads), self.blocks)
        self.block_here = np.repeat(np.arange(self.blocks), self.threads)
        self.block = np.repeat(np.asarray(blocks), self.threads)
        self.lane_in_warp, self.warp_in_block = thread % 32, thread // 32
        self.warp = self.block_here * self.warps_per_block + self.warp_in_block
        self.special = self._special_registers(grid, block, thread)
        self.epoch = np.zeros(self.blocks, np.int64)  # barriers passed
        self.registers: dict[str, Array] = {}
        self.carry: Array = np.zeros(self.lanes, np.bool_)
        self.products: dict[str, tuple[str, ...]] = {}  # registers with a product that may still be contracted
        self.problems: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.symbols = dict(globals_at)
        self._place_shared(module, function, shared_bytes)
        self._place_local(function)
        self.symbols |= {name: offset for name, offset, _ in function.params}
        self.params = np.zeros(-(-(len(params) + 16) // 16) * 16, np.uint8)
        self.params[: len(params)] = np.frombuffer(params, np.uint8)

    def _special_registers(self, grid: Size, block: Size, thread: Array) -> dict[str, Array]:
        lane = self.lane_in_warp
        values = {"%laneid": lane, "%warpid": self.warp_in_block, "%lanemask_eq": 1 << lane}
        values |= {"%lanemask_lt": (1 << lane) - 1, "%lanemask_le": (2 << lane) - 1}
        values |= {"%lanemask_ge": 0xFFFFFFFF & -(1 << lane), "%lanemask_gt": 0xFFFFFFFF & -(2 << lane)}
        for name, number_of, index in (("tid", block, thread), ("ctaid", grid, self.block)):
            values[f"%{name}.x"] = index % number_of[0]
            values[f"%{name}.y"] = index // number_of[0] % number_of[1]
            values[f"%{name}.z"] = index // (number_of[0] * number_of[1])
            for axis, size in zip("xyz", number_of, strict=True):
                values[f"%n{name}.{axis}"] = np.full(self.lanes, size)
        return {name: value.astype(np.uint32) for name, value in values.items()}

    def _place_shared(self, module: Module, function: Function, dynamic_bytes: int) -> None:
        named = {word for i in function.code for word in re.findall(r"[\w$]+", i.text)}
        at = 0
        for name, variable in module.shared.items():
            if variable.size is not None and name in named:
                at = -(-at // variable.align) * variable.align
                self.symbols[name] = at
                at += variable.size
        dynamic = [name for name, variable in module.shared.items() if variable.size is None]
        at = -(-at // 128) * 128 if dynamic and at else at
        self.symbols |= dict.fromkeys(dynamic, at)
        self.shared_limit = at + dynamic_bytes
        self.shared_size = max(-(-self.shared_limit // 16) * 16, 16)
        self.shared = np.full(self.shared_size * self.blocks, 0xA5, np.uint8)
        self.shared_shadow = Shadow(len(self.shared), self.memory.shadow.grain)

    def _place_local(self, function: Function) -> None:
        at = 0
        for name, variable in function.local.items():
            at = -(-at // variable.align) * variable.align
            self.symbols[name] = at
            at += variable.size or 0
        self.local_size = max(-(-at // 16) * 16, 16)
        self.local = np.full(self.local_size * self.lanes if at else 0, 0xA5, np.uint8)
        self.local_written = np.zeros(len(self.local), np.bool_)

    def warps_of(self, mask: Array) -> int:
        """Number of warps with threads in a mask."""
        return self.warps if mask.all() else int(np.count_nonzero(np.bincount(self.warp[mask])))

    # Operands

    def register(self, name: str) -> Array:
        if name not in self.registers:
            kind = self.function.register_type(name)
            if kind is None:
                raise Unsupported(f"undeclared register {name}")
            if kind == "pred":
                array: Array = np.zeros(self.lanes, np.bool_)
            elif kind == "b128":
                array = np.zeros((self.lanes, 2), np.uint64)
            else:  # a pattern that is unlikely to be right by chance
                pattern = 0xCDCDCDCDCDCDCDCD & ((1 << BITS[kind]) - 1)
                array = np.full(self.lanes, pattern, UNSIGNED[BITS[kind]])
            self.registers[name] = array
        return self.registers[name]

    def source(self, operand: str, kind: str) -> Source:
        """A function that returns an operand's values as an array of a type."""
        if kind == "pred":
            return self._predicate(operand)
        bits, dtype = BITS[kind], NUMPY[kind]
        if operand in self.special:
            array = self.special[operand]
        elif operand.startswith("%") or self.function.register_type(operand):
            array = self.register(operand)
            if array.dtype == np.bool_ or array.itemsize * 8 < bits:
                raise Unsupported(f"{operand} is narrower than {kind}")
        elif operand in self.symbols or re.fullmatch(r"[A-Za-z_$][\w$]*\s*\+.*", operand):
            array = np.full(self.lanes, self._symbol(operand), np.uint64)
        else:
            array = np.full(self.lanes, bits_of(operand, kind), UNSIGNED[bits])
        if array.itemsize * 8 == bits:
            view = array.view(dtype)
            return lambda: view
        return lambda: array.astype(UNSIGNED[bits]).view(dtype)  # the lower part; a special register is widened

    def _predicate(self, operand: str) -> Source:
        if operand.lstrip("-").isdigit():
            constant = np.full(self.lanes, int(operand) != 0)
            return lambda: constant
        array = self.register(operand.lstrip("!"))
        return (lambda: ~array) if operand.startswith("!") else (lambda: array)

    def target(self, operand: str, kind: str) -> Target:
        """A function that writes values of a type to a register, sign-extended if the register is wider."""
        if operand == "_":
            return lambda values, mask: None
        array = self.register(operand)
        if kind == "pred" or array.dtype == np.bool_:
            return partial(_put, array, lambda values: values)
        bits, have = BITS[kind], array.itemsize * 8
        if have < bits:
            raise Unsupported(f"{operand} is narrower than {kind}")
        if have == bits:
            return partial(_put, array, lambda values: as_type(values, kind).view(array.dtype))
        if kind[0] == "s":
            return partial(_put, array, lambda values: as_type(values, kind).astype(SIGNED[have]).view(array.dtype))
        return partial(_put, array, lambda values: as_type(values, kind).view(UNSIGNED[bits]).astype(array.dtype))

    def _symbol(self, operand: str) -> int:
        name, _, offset = operand.partition("+")
        if name.strip() not in self.symbols:
            raise Unsupported(f"undeclared symbol {name.strip()}")
        return self.symbols[name.strip()] + (int(number(offset)) if offset else 0)

    def address(self, operand: str) -> Source:
        """A function that returns the addresses of ``[base + offset]``."""
        inside = operand.strip()[1:-1].strip()
        base, _, rest = (part.strip() for part in inside.partition("+"))
        offset = int(number(rest)) if rest else 0
        if base.startswith("%") or self.function.register_type(base):
            array = self.register(base)
            add = np.uint64(offset & 0xFFFFFFFFFFFFFFFF)
            if array.itemsize == 4:
                return lambda: (array.astype(np.uint64) + add) & np.uint64(0xFFFFFFFF)
            return (lambda: array + add) if offset else (lambda: array)
        at = int(number(base)) + offset if base[0].isdigit() else self._symbol(inside)
        constant = np.full(self.lanes, at, np.uint64)
        return lambda: constant

    # Memory

    def access(
        self, space: str | None, address: Array, lanes: Array, size: int, instruction: Instruction, how: str
    ) -> tuple[Array, Array]:
        """Check the lanes' accesses of ``size`` bytes; return the space's bytes and the places in them.

        ``how`` is "load", "store" or "update". Without a space the addresses determine it.
        """
        address = address[lanes]
        wrong = address % np.uint64(size) != 0
        if wrong.any():
            raise Fault(f"misaligned address {int(address[wrong][0]):#x} of {size} bytes: {instruction}")
        if space is None:
            space, address = self._space_of(address)
        if space in ("global", "const"):
            return self._access_global(address, lanes, size, instruction, how)
        if space == "shared":
            return self._access_shared(address.astype(np.int64), lanes, size, instruction, how)
        limit = self.local_size if space == "local" else len(self.params)
        inside = address.astype(np.int64)
        if (address + np.uint64(size) > np.uint64(limit)).any():
            raise Fault(f"{space} memory out of bounds: {instruction}")
        if space == "param":
            return self.params, inside
        places = lanes * self.local_size + inside
        of_bytes = places[:, None] + np.arange(size)
        if how == "store":
            self.local_written[of_bytes] = True
        elif not self.local_written[of_bytes].all():
            self.problem("a read of unwritten local memory", instruction)
        return self.local, places

    def _space_of(self, address: Array) -> tuple[str, Array]:
        kinds = np.searchsorted(np.array([SHARED, LOCAL, PARAM], np.uint64), address, side="right")
        if (kinds != kinds[0]).any():
            raise Unsupported("one access to several spaces")
        name, base = (("global", 0), ("shared", SHARED), ("local", LOCAL), ("param", PARAM))[kinds[0]]
        return name, address - np.uint64(base)

    def _access_global(
        self, address: Array, lanes: Array, size: int, instruction: Instruction, how: str
    ) -> tuple[Array, Array]:
        places, ok = self.memory.locate(address, size)
        if not ok.all():
            lane = lanes[~ok][0]
            thread = f"thread {lane % self.threads} of block {self.block[lane]}"
            raise Fault(f"global memory out of bounds at {int(address[~ok][0]):#x} by {thread}: {instruction}")
        self._watch(self.memory.shadow, places, size, lanes, instruction, how)
        sectors = places // SECTOR
        for kind in ("load", "store") if how == "update" else (how,):
            self.memory.touched[kind][sectors] = True
            requests = np.unique(self.warp[lanes].astype(np.int64) << 40 | sectors)
            self.counts[f"{kind} sectors"] += len(requests)
            self.counts[f"{kind} bytes"] += size * len(lanes)
        return self.memory.bytes, places

    def _access_shared(
        self, inside: Array, lanes: Array, size: int, instruction: Instruction, how: str
    ) -> tuple[Array, Array]:
        if (inside + size > self.shared_limit).any() or (inside < 0).any():
            raise Fault(f"shared memory out of bounds, {int(inside.max())} of {self.shared_limit}: {instruction}")
        places = self.block_here[lanes] * self.shared_size + inside
        self._watch(self.shared_shadow, places, size, lanes, instruction, how)
        self.counts[f"shared {how}s"] += 1
        return self.shared, places

    def _stamp(self, lanes: Array) -> Array:
        return Shadow.stamp(self.block[lanes], self.epoch[self.block_here[lanes]], self.warp_in_block[lanes])

    def _watch(
        self, shadow: Shadow, places: Array, size: int, lanes: Array, instruction: Instruction, how: str
    ) -> None:
        """Check a load or an update for races; :meth:`store` checks stores, as it knows the values."""
        unwritten = False
        if how == "load":
            wrong, unwritten = shadow.read(places, size, self._stamp(lanes))
            self._report(wrong, shadow, instruction)
        elif how == "update":
            unwritten = shadow.update(places, size)
        if unwritten and shadow is self.shared_shadow:  # global memory is initialised before the kernel
            self.problem("a read of unwritten shared memory", instruction)

    def store(self, memory: Array, places: Array, values: Array, lanes: Array, instruction: Instruction) -> None:
        """Write one word per lane to places from :meth:`access`."""
        size = values.itemsize
        changed = gather(memory, places, size) != values
        if not scatter(memory, places, values):
            self.problem("threads write different values to one place", instruction)
        if memory is not self.local:
            shadow = self.shared_shadow if memory is self.shared else self.memory.shadow
            self._report(shadow.write(places, size, self._stamp(lanes), changed), shadow, instruction)

    def _report(self, wrong: Counter[str], shadow: Shadow, instruction: Instruction) -> None:
        for text in wrong:
            self.problem(f"{'shared' if shadow is self.shared_shadow else 'global'} memory: {text}", instruction)

    def problem(self, text: str, instruction: Instruction) -> None:
        self.problems[f"{text}: {instruction}"] += 1


def _put(array: Array, convert: Callable[[Array], Array], values: Array, mask: Array | None) -> None:
    values = convert(values)
    if mask is None:
        array[:] = values
    else:
        np.copyto(array, values, where=mask)
