"""Memory of a program, with checks of bounds, races, and reads of unwritten cells."""

from __future__ import annotations

from collections import Counter

import numpy as np

from tools.ptx.types import UNSIGNED, Array

#: Base addresses of spaces other than global memory.
SHARED, LOCAL, PARAM = 1 << 56, 1 << 57, 1 << 58
SECTOR = 32


class Memory:
    """Global memory: arrays of bytes at addresses, with gaps between them.

    While a program runs, one arena holds the arrays, each at its address modulo 512: data aligned for the program is
    aligned there too.
    """

    GAP = 4096
    FIRST = 0x7F0000000000

    def __init__(self) -> None:
        self.regions: list[tuple[int, int, Array]] = []  # address, place in the arena, bytes
        self.size = self.GAP

    def add(self, data: Array, address: int | None = None, offset: int = 0) -> int:
        """Add an array and return its address: the given one, else ``offset`` bytes after a multiple of 512."""
        wanted = offset if address is None else address % 512
        place = -(-self.size // 512) * 512 + wanted % 512
        address = self.FIRST + place if address is None else address
        self.regions.append((address, place, data))
        self.size = place + len(data) + self.GAP
        return address

    def load(self, grain: int) -> None:
        """Build the arena; no access is narrower than ``grain`` bytes."""
        self.regions.sort(key=lambda region: region[0])
        self.bytes = np.full(-(-self.size // 64) * 64, 0xDB, np.uint8)
        for _, place, data in self.regions:
            self.bytes[place : place + len(data)] = data
        self.addresses = np.array([region[0] for region in self.regions], np.uint64)
        self.places = np.array([region[1] for region in self.regions], np.int64)
        self.lengths = np.array([len(region[2]) for region in self.regions], np.int64)
        self.shadow = Shadow(len(self.bytes), grain)
        self.touched = {how: np.zeros(len(self.bytes) // SECTOR + 1, np.bool_) for how in ("load", "store")}

    def store(self) -> None:
        """Copy the program's writes back to the arrays."""
        for _, place, data in self.regions:
            data[:] = self.bytes[place : place + len(data)]

    def locate(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """Places in the arena of accesses of ``size`` bytes, and which of them lie within one array."""
        if not self.regions:
            return np.zeros(len(addresses), np.int64), np.zeros(len(addresses), np.bool_)
        low = int(addresses.min())
        k = max(int(np.searchsorted(self.addresses, np.uint64(low), side="right")) - 1, 0)
        start, place, length = int(self.addresses[k]), int(self.places[k]), int(self.lengths[k])
        if start <= low and int(addresses.max()) + size <= start + length:  # fast path: all in one array
            return (addresses - np.uint64(start)).astype(np.int64) + place, np.ones(len(addresses), np.bool_)
        which = np.maximum(np.searchsorted(self.addresses, addresses, side="right") - 1, 0)
        inside = (addresses - self.addresses[which]).astype(np.int64)
        ok = (addresses >= self.addresses[which]) & (inside + size <= self.lengths[which])
        return np.where(ok, self.places[which] + inside, 0), ok


class Shadow:
    """The last writer and reader of each cell of a memory.

    A stamp identifies them: block, number of barriers it has passed, and warp. Between two barriers of its block, a
    warp must not touch cells that another warp writes. A block must never touch cells that another block writes,
    because blocks do not wait for each other.
    """

    NOBODY, SEVERAL_BLOCKS, ATOMIC = -1, -2, -3
    SEVERAL_WARPS = 0xFFFF

    def __init__(self, size: int, grain: int) -> None:
        self.grain = grain
        self.writer = np.full(size // grain, self.NOBODY, np.int64)
        self.reader = self.writer.copy()

    @staticmethod
    def stamp(block: Array, epoch: Array, warp: Array) -> Array:
        return (block.astype(np.int64) << 40) | (epoch.astype(np.int64) << 16) | warp

    def _cells(self, places: Array, size: int, stamp: Array) -> tuple[Array, Array]:
        number = size // self.grain
        first = places // self.grain
        if number == 1:
            return first, stamp
        return (first[:, None] + np.arange(number)).ravel(), np.repeat(stamp, number)

    def read(self, places: Array, size: int, stamp: Array) -> tuple[Counter[str], bool]:
        """Record a read; return its conflicts and whether it reads unwritten cells."""
        cells, stamp = self._cells(places, size, stamp)
        writer, reader = self.writer[cells], self.reader[cells]
        wrong = self._conflicts(writer, stamp, "one block reads what another writes", "write and read")
        together = reader >> 16 == stamp >> 16
        mark = np.where(together & (reader != stamp), stamp | self.SEVERAL_WARPS, stamp)
        apart = (reader == self.SEVERAL_BLOCKS) | ((reader >= 0) & (reader >> 40 != stamp >> 40))
        mark = np.where(apart, self.SEVERAL_BLOCKS, mark)
        self.reader[cells] = mark
        kept = self.reader[cells]
        for other in (self.SEVERAL_WARPS, self.SEVERAL_BLOCKS):  # readers of one cell in one instruction
            same = kept >> 16 == mark >> 16
            lost = (kept != mark) & (same if other == self.SEVERAL_WARPS else ~same)
            if lost.any():
                self.reader[cells[lost]] = mark[lost] | other if other == self.SEVERAL_WARPS else other
        return wrong, bool((writer == self.NOBODY).any())

    def write(self, places: Array, size: int, stamp: Array, changed: Array) -> Counter[str]:
        """Record a write; return its conflicts. Unchanged values may be written twice: compilers store values that
        several warps hold this way."""
        cells, stamp = self._cells(places, size, stamp)
        changed = np.repeat(changed, size // self.grain)
        writer, reader = self.writer[cells], self.reader[cells]
        wrong = self._conflicts(writer[changed], stamp[changed], "two blocks write the same", "two writes")
        wrong += self._conflicts(reader, stamp, "one block reads what another writes", "read and write")
        self.writer[cells] = stamp
        return wrong

    def update(self, places: Array, size: int) -> bool:
        """Record an atomic, which has no conflicts; return whether it reads unwritten cells."""
        cells, _ = self._cells(places, size, places)
        unwritten = bool((self.writer[cells] == self.NOBODY).any())
        self.writer[cells] = self.ATOMIC
        return unwritten

    def _conflicts(self, earlier: Array, stamp: Array, between_blocks: str, between_warps: str) -> Counter[str]:
        wrong: Counter[str] = Counter()
        blocks = (earlier == self.SEVERAL_BLOCKS) | ((earlier >= 0) & (earlier >> 40 != stamp >> 40))
        if blocks.any():
            wrong[between_blocks] += int(blocks.sum())
        warps = (earlier >> 16 == stamp >> 16) & (earlier != stamp)
        if warps.any():
            wrong[f"race between warps, {between_warps} with no barrier between"] += int(warps.sum())
        return wrong


def gather(memory: Array, places: Array, size: int) -> Array:
    """Read words of ``size`` bytes at aligned places."""
    return memory.view(UNSIGNED[8 * size])[places // size]


def scatter(memory: Array, places: Array, values: Array) -> bool:
    """Write words at aligned places; return False if one place was given two values."""
    words, at = memory.view(values.dtype), places // values.itemsize
    words[at] = values
    return bool((words[at] == values).all())
