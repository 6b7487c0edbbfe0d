"""The memory that a node lends: one anonymous mapping, cut into segments, cut into slots of one size.

A segment serves one slot size until its last slot is free; then it may serve another. So blocks of
different lengths share the memory without a compactor, which one-sided readers could not bear.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import threading
from collections.abc import Iterable

from polarkv_sglang.config import format_bytes
from polarkv_sglang.errors import ConfigError, PolarError

PAGE_BYTES = 4096  # slots start at and are multiples of this
_HUGE_PAGE_BYTES = 2 << 20
_DEFAULT_SEGMENT_BYTES = 64 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; mmap has no name for it


def default_segment_bytes(capacity_bytes: int) -> int:
    """A sixteenth of the capacity in whole huge pages, at least one of them, at most 64 MiB."""
    sixteenth = capacity_bytes // 16 // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    return max(_HUGE_PAGE_BYTES, min(_DEFAULT_SEGMENT_BYTES, sixteenth))


class SlabMemory:
    """Anonymous memory at a fixed address, to be registered with UCX. Not touched until it is used."""

    def __init__(self, capacity_bytes: int) -> None:
        """Raises ConfigError if the system does not grant that much address space."""
        try:
            self._mapping = mmap.mmap(-1, capacity_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise ConfigError(
                f"capacity {format_bytes(capacity_bytes)} cannot be mapped ({error}); give less"
            ) from error
        self.capacity_bytes = capacity_bytes
        self.base_address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        try:
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without transparent huge pages
                raise

    def prefault(self, stop: threading.Event, step_bytes: int = _DEFAULT_SEGMENT_BYTES) -> None:
        """Back all of it by physical pages, or until ``stop`` is set; changes no content.

        May run beside readers and writers. Raises OSError where the kernel cannot: ENOMEM, or EINVAL before
        Linux 5.14.
        """
        libc = ctypes.CDLL(None, use_errno=True)  # unlike mmap.madvise, drops the GIL
        for start in range(0, self.capacity_bytes, step_bytes):
            if stop.is_set():
                return
            address = ctypes.c_void_p(self.base_address + start)
            length = ctypes.c_size_t(min(step_bytes, self.capacity_bytes - start))
            if libc.madvise(address, length, _MADV_POPULATE_WRITE) != 0:
                raise OSError(ctypes.get_errno(), "MADV_POPULATE_WRITE failed")

    def close(self) -> None:
        """Give the memory back; nothing may read or write it any more."""
        self._mapping.close()


class _Segment:
    """A stretch of the slab; ``taken`` are the addresses of its slots in use."""

    __slots__ = ("address", "fresh", "recycled", "slot_bytes", "taken")

    def __init__(self, address: int) -> None:
        self.address = address
        self.slot_bytes = 0  # 0: unassigned
        self.fresh = address  # slots from here on were never used
        self.recycled: list[int] = []
        self.taken: set[int] = set()


class Slab:
    """Hands out slots, in constant time, and never more than the capacity. Owned by one thread."""

    def __init__(self, base_address: int, capacity_bytes: int, segment_bytes: int) -> None:
        """Raises ConfigError if no segment fits or segments are not whole pages."""
        if segment_bytes < PAGE_BYTES or segment_bytes % PAGE_BYTES:
            raise ConfigError(f"segment {segment_bytes} B is not a positive multiple of {PAGE_BYTES} B")
        if capacity_bytes < segment_bytes:
            raise ConfigError(
                f"capacity {format_bytes(capacity_bytes)} is below one segment of "
                f"{format_bytes(segment_bytes)}; raise --capacity or lower --segment"
            )
        self.base_address = base_address
        self.segment_bytes = segment_bytes
        self.capacity_bytes = capacity_bytes // segment_bytes * segment_bytes
        self.used_bytes = 0  # slots in use, whole
        count = capacity_bytes // segment_bytes
        self._segments = [_Segment(base_address + number * segment_bytes) for number in range(count)]
        self._unassigned = list(reversed(self._segments))
        # Segments with slots in use and free ones, by slot size; the keys of a dict are an ordered set.
        self._partial: dict[int, dict[_Segment, None]] = {}

    def fits(self, length: int) -> bool:
        """Whether a block of this length could ever be stored."""
        return _slot_bytes(length) <= self.segment_bytes

    def has_room(self, length: int) -> bool:
        """Whether ``allocate`` would find a slot now."""
        return self.fits(length) and bool(self._partial.get(_slot_bytes(length)) or self._unassigned)

    def allocate(self, length: int) -> int | None:
        """The address of a slot for ``length`` bytes, None if there is no room."""
        slot_bytes = _slot_bytes(length)
        partial = self._partial.get(slot_bytes)
        if partial is None:
            if not self._unassigned or slot_bytes > self.segment_bytes:
                return None
            segment = self._unassigned.pop()
            segment.slot_bytes = slot_bytes
            partial = self._partial[slot_bytes] = {segment: None}
        segment = next(reversed(partial))
        if segment.recycled:
            address = segment.recycled.pop()
        else:
            address = segment.fresh
            segment.fresh += slot_bytes
        segment.taken.add(address)
        self.used_bytes += slot_bytes
        if not segment.recycled and segment.fresh + slot_bytes > segment.address + self.segment_bytes:
            self._unlist(segment)
        return address

    def free(self, address: int) -> None:
        """Take a slot back; KeyError if it is not in use."""
        segment = self._segments[(address - self.base_address) // self.segment_bytes]
        segment.taken.remove(address)
        self.used_bytes -= segment.slot_bytes
        if segment.taken:
            segment.recycled.append(address)
            self._partial.setdefault(segment.slot_bytes, {})[segment] = None
        else:
            self._unlist(segment)
            segment.slot_bytes = 0
            segment.fresh = segment.address
            segment.recycled.clear()
            self._unassigned.append(segment)

    def _unlist(self, segment: _Segment) -> None:
        """Forget that the segment has free slots, if it had."""
        partial = self._partial.get(segment.slot_bytes, {})
        partial.pop(segment, None)
        if not partial:
            self._partial.pop(segment.slot_bytes, None)

    def check_integrity(self, in_use: Iterable[tuple[int, int]]) -> None:
        """PolarError unless exactly these slots, (address, length) of each, are in use, and disjoint."""
        expected = sorted(in_use)
        _require(
            [address for address, _ in expected] == sorted(a for s in self._segments for a in s.taken),
            "the slots in use are not those of the blocks",
        )
        end = 0
        for address, length in expected:
            segment = self._segments[(address - self.base_address) // self.segment_bytes]
            _require(address >= end, "two blocks overlap")
            _require(segment.slot_bytes == _slot_bytes(length), "a block lies in a slot of another size")
            end = address + segment.slot_bytes
            _require(end <= segment.address + self.segment_bytes, "a block reaches beyond its segment")
        used_bytes = sum(segment.slot_bytes * len(segment.taken) for segment in self._segments)
        _require(self.used_bytes == used_bytes <= self.capacity_bytes, "used_bytes is wrong")
        for segment in self._segments:
            slots = self.segment_bytes // segment.slot_bytes if segment.slot_bytes else 0
            listed = segment in self._partial.get(segment.slot_bytes, {})
            _require(listed == (0 < len(segment.taken) < slots), "a segment is listed wrongly")
            _require((segment in self._unassigned) == (not segment.taken), "an empty segment is lost")


def _slot_bytes(length: int) -> int:
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise PolarError(f"the slab is inconsistent: {text}")
