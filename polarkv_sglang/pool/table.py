"""What is known of each block, in columns: a million objects would take several times the memory."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polarkv_sglang.errors import PolarError
from polarkv_sglang.identity import KEY_BYTES, NO_PARENT

Rows = npt.NDArray[np.intp]
_ONE = np.uint32(1)
_NEVER = np.uint64(2**64 - 1)
_KEY = np.dtype(f"V{KEY_BYTES}")
_NO_KEY = np.frombuffer(NO_PARENT, _KEY)[0]


class Places(NamedTuple):
    """Where blocks lie and what a reader of them must find; one number per row that was asked for."""

    addresses: list[int]
    lengths: list[int]
    checksums: list[int]
    generations: list[int]


class BlockTable:
    """Columns with one entry per row; a block keeps its row until it is discarded, then another may get it.

    Row 0 is no block: its entries are 0, and so a look-up that finds nothing reads zeros there.

    Columns have their full length from the start, and take memory only as far as rows were ever used: arrays
    that grow, moved by the allocator again and again, would leave holes as large as themselves. The public
    ones are views for single rows, where numpy's own access takes twice the time; and a request for one block
    makes do with them, since whatever numpy does takes it a microsecond.
    """

    def __init__(self, max_blocks: int, scan_rows: int = 1 << 16) -> None:
        """``scan_rows``: how many are looked through at a time, which bounds the memory that takes."""
        rows = max_blocks + 1
        self.keys = _KeyColumn(rows)
        self.parents = _KeyColumn(rows)
        self._addresses, self.addresses = _column(rows, np.uint64)  # of the slot
        self._lengths, self.lengths = _column(rows, np.uint64)  # bytes
        self._checksums, self.checksums = _column(rows, np.uint64)
        # Never given twice by one node: equal means that nobody wrote here in between.
        self._generations, self.generations = _column(rows, np.uint64)
        # A tick, never given twice; 0: nobody may read this block (yet, or any more).
        self._last_uses, self.last_uses = _column(rows, np.uint64)
        self._leases, self.leases = _column(rows, np.uint32)
        self._children, self.children = _column(rows, np.uint32)  # blocks that continue this one
        self._free, _ = _column(rows, np.uint32)  # a stack
        self._free_count = 0
        self._scan_rows = scan_rows
        self._used_rows = 1  # no row from here on was ever used

    def add(
        self,
        keys: Sequence[bytes],
        parents: Sequence[bytes],
        addresses: Sequence[int],
        length: int,
        generation: int,
        children: Sequence[int],
    ) -> Rows:
        """Rows of new blocks that nobody may read yet; ``generation`` is the first one's, and counts up."""
        rows = self._take(len(keys))
        if rows.size == 1:
            row = rows.item()
            self.keys[row], self.parents[row] = keys[0], parents[0]
            self.addresses[row], self.lengths[row] = addresses[0], length
            self.generations[row], self.children[row] = generation, children[0]
        else:
            self.keys.put(rows, keys)
            self.parents.put(rows, parents)
            self._addresses[rows] = addresses
            self._lengths[rows] = length
            self._generations[rows] = np.arange(generation, generation + rows.size, dtype=np.uint64)
            self._children[rows] = children
        return rows

    def commit(self, rows: Rows, checksums: Sequence[int], last_uses: npt.NDArray[np.uint64]) -> Rows:
        """Blocks that may be read from now on; those of them that no other continues."""
        if rows.size == 1:
            row = rows.item()
            self.checksums[row], self.last_uses[row] = checksums[0], last_uses.item()
            return rows[:0] if self.children[row] else rows
        self._checksums[rows] = np.array(checksums, np.uint64)
        self._last_uses[rows] = last_uses
        leaves: Rows = rows[self._children[rows] == 0]
        return leaves

    def discard(self, rows: Rows) -> None:
        """Forget blocks that are neither leased nor continued."""
        if rows.size == 1:
            row = rows.item()
            self.keys[row] = self.parents[row] = NO_PARENT
            self.addresses[row] = self.lengths[row] = self.checksums[row] = 0
            self.generations[row] = self.last_uses[row] = 0
        else:
            for keys in (self.keys, self.parents):
                keys.clear(rows)
            for column in (
                self._addresses, self._lengths, self._checksums, self._generations, self._last_uses
            ):  # fmt: skip
                column[rows] = 0
        self._free[self._free_count : self._free_count + rows.size] = rows
        self._free_count += rows.size

    def _take(self, count: int) -> Rows:
        """Rows of no block."""
        used = min(count, self._free_count)
        self._free_count -= used
        again = self._free[self._free_count : self._free_count + used]
        first = self._used_rows
        self._used_rows += count - used
        rows: Rows = np.concatenate((again, np.arange(first, self._used_rows))).astype(np.intp)
        return rows

    def places(self, rows: Rows) -> Places:
        """Of any rows."""
        if rows.size == 1:
            row = rows.item()
            return Places(
                [self.addresses[row]], [self.lengths[row]], [self.checksums[row]], [self.generations[row]]
            )
        columns = (self._addresses, self._lengths, self._checksums, self._generations)
        return Places(*(column.take(rows).tolist() for column in columns))

    def use(self, rows: Rows, tick: int) -> None:
        """Used in ``tick`` and the ticks before it, the first row in the latest; row 0 is left out."""
        if rows.size == 1:
            self.last_uses[rows.item()] = tick
        else:
            self._last_uses[rows] = np.arange(tick, tick - rows.size, -1, dtype=np.uint64)
        self.last_uses[0] = 0

    def lease(self, rows: Rows) -> int:
        """One lease more on each row, as often as it is named; the bytes of those that had none."""
        if rows.size == 1:
            row = rows.item()
            self.leases[row] += 1
            return self.lengths[row] if self.leases[row] == 1 else 0
        new = rows[self._leases[rows] == 0]
        np.add.at(self._leases, rows, _ONE)
        return self._bytes_of(new, self._leases[new])

    def release(self, rows: Rows) -> int:
        """Undo ``lease``; the bytes of those that have none any more."""
        if rows.size == 1:
            row = rows.item()
            self.leases[row] -= 1
            return 0 if self.leases[row] else self.lengths[row]
        before = self._leases[rows]
        np.subtract.at(self._leases, rows, _ONE)
        free = self._leases[rows] == 0
        return self._bytes_of(rows[free], before[free])

    def _bytes_of(self, rows: Rows, named: npt.NDArray[np.unsignedinteger]) -> int:
        """Of rows that are each named so many times: sorting them out would cost more than a lease."""
        return round(float((self._lengths[rows] / named).sum()))

    def oldest_leaves(self, after: int, count: int) -> list[tuple[int, int]]:
        """See ``Leaves``."""
        rows = np.empty(0, np.intp)
        before = _NEVER
        for start in range(0, self._used_rows, self._scan_rows):
            part = slice(start, min(start + self._scan_rows, self._used_rows))
            last_uses = self._last_uses[part]
            is_leaf = self._children[part] == 0
            is_leaf &= last_uses > after  # and so above 0
            is_leaf &= last_uses < before
            rows = np.concatenate((rows, np.flatnonzero(is_leaf) + start))
            if rows.size >= count:
                last_uses = self._last_uses[rows]
                first = np.argpartition(last_uses, count - 1)[:count]
                rows, before = rows[first], last_uses[first[-1]]
        return sorted(zip(self._last_uses[rows].tolist(), rows.tolist()))

    def check_integrity(self, in_use: Collection[int]) -> None:
        """PolarError unless exactly these rows, each named once, are in use, and all others are blank."""
        free = self._free[: self._free_count].tolist()
        _require(sorted([0, *in_use, *free]) == list(range(self._used_rows)), "a row is lost or used twice")
        columns = (self.addresses, self.lengths, self.checksums, self.generations, self.last_uses)
        for row in (0, *free):
            entries = [column[row] for column in (*columns, self.leases, self.children)]
            _require(not any(entries), f"row {row} of no block is not blank")
            _require(self.keys[row] == self.parents[row] == NO_PARENT, f"row {row} of no block has a name")


class _KeyColumn:
    """Keys in one mapping; as objects of their own they would take four times the memory."""

    __slots__ = ("_array", "_mapping")

    def __init__(self, rows: int) -> None:
        self._mapping = mmap.mmap(-1, rows * KEY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._array = np.frombuffer(self._mapping, _KEY)

    def __getitem__(self, row: int) -> bytes:
        return self._mapping[row * KEY_BYTES : (row + 1) * KEY_BYTES]

    def __setitem__(self, row: int, key: bytes) -> None:
        self._mapping[row * KEY_BYTES : (row + 1) * KEY_BYTES] = key

    def put(self, rows: Rows, keys: Sequence[bytes]) -> None:
        """Set those of many rows."""
        self._array[rows] = np.frombuffer(b"".join(keys), _KEY)

    def clear(self, rows: Rows) -> None:
        """Set those of many rows to NO_PARENT."""
        self._array[rows] = _NO_KEY


def _column(
    rows: int, dtype: type[np.uint32 | np.uint64]
) -> tuple[npt.NDArray[np.unsignedinteger], memoryview]:
    """Zeros, for many rows at once and for single ones."""
    array = np.zeros(rows, dtype)
    return array, array.data


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise PolarError(f"the block table is inconsistent: {text}")
