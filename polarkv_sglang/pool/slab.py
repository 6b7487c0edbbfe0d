"""The memory that a node lends: one shared mapping, cut into segments, cut into slots of one size.

A segment serves one slot size until its last slot is free; then it may serve another. So blocks of
different lengths share the memory without a compactor, which one-sided readers could not bear.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable

from polarkv_sglang.config import format_bytes
from polarkv_sglang.errors import ConfigError, PolarError
from polarkv_sglang.pool.pages import map_shared, memory_bytes, populate_huge
from polarkv_sglang.transport import HUGE_PAGE_BYTES

PAGE_BYTES = 4096  # slots start at and are multiples of this
_DEFAULT_SEGMENT_BYTES = 64 << 20
_NONE = 0xFFFF_FFFF  # no slot
_IN_USE = 0xFFFF_FFFE


def default_segment_bytes(capacity_bytes: int) -> int:
    """A sixteenth of the capacity in whole huge pages, at least one of them, at most 64 MiB."""
    sixteenth = capacity_bytes // 16 // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    return max(HUGE_PAGE_BYTES, min(_DEFAULT_SEGMENT_BYTES, sixteenth))


class SlabMemory:
    """Memory at a fixed address, to be registered with UCX. Not touched until it is used.

    It is a memfd, so that readers and writers on this host can map it too, by ``fd``. Sealed: nobody can
    change its size, and so make those who have it mapped fail.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """Raises ConfigError if the system has or grants less than that."""
        available_bytes = memory_bytes()
        if capacity_bytes > available_bytes:
            raise ConfigError(
                f"capacity {format_bytes(capacity_bytes)} is more than the memory and swap of this host, "
                f"{format_bytes(available_bytes)}; give less"
            )
        try:
            self._mapped = map_shared("polarkv-slab", capacity_bytes)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"capacity {format_bytes(capacity_bytes)} cannot be mapped ({error}); give less"
            ) from error
        self.fd = self._mapped.fd  # closed by ``close``
        self.pages = self._mapped.pages
        self.capacity_bytes = self._mapped.length  # less than was asked for by the part of a huge page
        self.base_address = self._mapped.address

    def prefault(self, stop: threading.Event, step_bytes: int = _DEFAULT_SEGMENT_BYTES) -> None:
        """Back all of it by physical pages, or until ``stop`` is set; changes no content.

        May run beside readers and writers. Raises OSError where the kernel cannot: ENOMEM, or EINVAL before
        Linux 5.14.
        """
        huge = True
        for start in range(0, self.capacity_bytes, step_bytes):
            if stop.is_set():
                return
            huge &= populate_huge(self.base_address + start, min(step_bytes, self.capacity_bytes - start))
        if huge and self.pages == "4 KiB pages":
            self.pages = "transparent"

    def close(self) -> None:
        """Give the memory back; nothing here may read or write it any more. Other mappings of it live on."""
        self._mapped.close()


class _Segment:
    """A stretch of the slab.

    ``links`` has an entry for each slot that was used since the segment was assigned: _IN_USE, or the number
    of the next free slot, with ``first_free`` the start of that list and _NONE its end.
    """

    __slots__ = ("address", "first_free", "in_use", "links", "slot_bytes")

    def __init__(self, address: int) -> None:
        self.address = address
        self.slot_bytes = 0  # 0: unassigned
        self.in_use = 0  # slots
        self.links = array("I")
        self.first_free = _NONE

    def take(self, count: int) -> list[int]:
        """Numbers of free slots, which are in use now; there must be as many."""
        slots: list[int] = []
        while len(slots) < count and (slot := self.first_free) != _NONE:
            self.first_free = self.links[slot]
            self.links[slot] = _IN_USE
            slots.append(slot)
        new = range(len(self.links), len(self.links) + count - len(slots))
        self.links.extend([_IN_USE] * len(new))
        slots += new
        self.in_use += count
        return slots


class Slab:
    """Hands out slots, each in constant time, and never more than the capacity. For one thread at a time."""

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

    @property
    def max_slots(self) -> int:
        """There are never more slots than this."""
        return self.capacity_bytes // PAGE_BYTES

    def fits(self, length: int) -> bool:
        """Whether a block of this length could ever be stored."""
        return slot_bytes_of(length) <= self.segment_bytes

    def has_room(self, length: int) -> bool:
        """Whether ``allocate`` would find a slot now."""
        return self.fits(length) and bool(self._partial.get(slot_bytes_of(length)) or self._unassigned)

    def allocate(self, length: int, count: int = 1) -> list[int]:
        """Addresses of slots for ``count`` blocks of ``length`` bytes; of fewer, as far as there is room."""
        addresses: list[int] = []
        slot_bytes = slot_bytes_of(length)
        while len(addresses) < count:
            partial = self._partial.get(slot_bytes)
            if partial is None:
                if not self._unassigned or slot_bytes > self.segment_bytes:
                    break
                segment = self._unassigned.pop()
                segment.slot_bytes = slot_bytes
                partial = self._partial[slot_bytes] = {segment: None}
            segment = next(reversed(partial))
            slots = self.segment_bytes // slot_bytes
            taken = segment.take(min(count - len(addresses), slots - segment.in_use))
            addresses += [segment.address + slot * slot_bytes for slot in taken]
            self.used_bytes += len(taken) * slot_bytes
            if segment.in_use == slots:
                self._unlist(segment)
        return addresses

    def free(self, address: int) -> None:
        """Take a slot back; KeyError if it is not in use."""
        segment = self._segments[(address - self.base_address) // self.segment_bytes]
        slot, inside = divmod(address - segment.address, segment.slot_bytes or self.segment_bytes)
        if inside or slot >= len(segment.links) or segment.links[slot] != _IN_USE:
            raise KeyError(address)
        segment.in_use -= 1
        self.used_bytes -= segment.slot_bytes
        if segment.in_use:
            segment.links[slot] = segment.first_free
            segment.first_free = slot
            self._partial.setdefault(segment.slot_bytes, {})[segment] = None
        else:
            self._unlist(segment)
            segment.slot_bytes = 0
            segment.links = array("I")
            segment.first_free = _NONE
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
        taken = [
            segment.address + slot * segment.slot_bytes
            for segment in self._segments
            for slot, link in enumerate(segment.links)
            if link == _IN_USE
        ]
        _require(
            [address for address, _ in expected] == taken, "the slots in use are not those of the blocks"
        )
        end = 0
        for address, length in expected:
            segment = self._segments[(address - self.base_address) // self.segment_bytes]
            _require(address >= end, "two blocks overlap")
            _require(segment.slot_bytes == slot_bytes_of(length), "a block lies in a slot of another size")
            end = address + segment.slot_bytes
            _require(end <= segment.address + self.segment_bytes, "a block reaches beyond its segment")
        used_bytes = sum(segment.slot_bytes * segment.in_use for segment in self._segments)
        _require(self.used_bytes == used_bytes <= self.capacity_bytes, "used_bytes is wrong")
        for segment in self._segments:
            slots = self.segment_bytes // segment.slot_bytes if segment.slot_bytes else 0
            listed = segment in self._partial.get(segment.slot_bytes, {})
            _require(listed == (0 < segment.in_use < slots), "a segment is listed wrongly")
            _require((segment in self._unassigned) == (not segment.in_use), "an empty segment is lost")
            free = set()
            slot = segment.first_free
            while slot != _NONE and slot not in free:
                free.add(slot)
                slot = segment.links[slot]
            _require(slot == _NONE, "a free slot is listed twice")
            _require(
                free == {slot for slot, link in enumerate(segment.links) if link != _IN_USE},
                "a free slot is lost",
            )
            _require(segment.in_use + len(free) == len(segment.links), "slots in use are miscounted")


def slot_bytes_of(length: int) -> int:
    """Of the slot that a block takes."""
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise PolarError(f"the slab is inconsistent: {text}")
