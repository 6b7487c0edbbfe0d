from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import random
import re
import threading
from pathlib import Path

import pytest

from polarkv_sglang.errors import ConfigError
from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.pool.slab import Slab, SlabMemory, default_segment_bytes
from tests.pool.listed import ListedIndex

MIB = 1 << 20
SEGMENT = 16 * 4096
BASE = 1 << 40


class Slots:
    """Those that blocks without parents are given; a slot is free again once its reservation is given up."""

    def __init__(self, memory_bytes: int) -> None:
        self.index = ListedIndex(Slab(BASE, memory_bytes, SEGMENT), clock=lambda: 0.0)
        self._keys = (number.to_bytes(16, "big") for number in itertools.count(1))
        self._reservations: dict[int, int] = {}  # by address

    def take(self, length: int, count: int = 1) -> list[int]:
        """As many as there are, up to ``count``."""
        addresses: list[int] = []
        while len(addresses) < count:
            made = self.index.reserve(1, [next(self._keys)], [NO_PARENT], length)
            if not made.number:
                break
            addresses += made.addresses
            self._reservations[made.addresses[0]] = made.number
        self.index.check_integrity()
        return addresses

    def free(self, address: int) -> None:
        self.index.give_up(1, self._reservations.pop(address))
        self.index.check_integrity()


def test_capacity_is_never_exceeded():
    slots = Slots(4 * SEGMENT + 4096)
    addresses = slots.take(5000, 100)
    assert len(set(addresses)) == 4 * 8
    now = slots.index.statistics()
    assert now.used_bytes == 4 * 8 * 8192 <= now.capacity_bytes == 4 * SEGMENT


@pytest.mark.parametrize("count", [1, 3, 33, 100])
def test_slots_of_one_request_are_as_those_of_many(count: int):
    slots, keys = Slots(4 * SEGMENT), [bytes([255, number]).ljust(16) for number in range(count)]
    made = slots.index.reserve(1, keys, [NO_PARENT] * count, 5000)
    given = [address for address in made.addresses if address]
    assert given == Slots(4 * SEGMENT).take(5000, count)
    assert made.addresses == given + [0] * (count - len(given))
    slots.index.check_integrity()


def test_segment_serves_another_size_once_it_is_empty():
    slots = Slots(2 * SEGMENT)
    small = slots.take(4096, 100)
    assert slots.take(SEGMENT) == []
    last = small.pop(3)
    for address in small:
        if address < BASE + SEGMENT:
            slots.free(address)
    assert slots.take(SEGMENT) == []  # one slot of it is still in use
    slots.free(last)
    assert slots.take(SEGMENT) == [BASE]


def test_block_longer_than_a_segment_never_fits():
    slots = Slots(4 * SEGMENT)
    assert slots.take(SEGMENT + 1) == []
    assert slots.take(SEGMENT) == [BASE]


def test_freed_slots_are_used_before_new_ones():
    slots = Slots(4 * SEGMENT)
    first, second, third = slots.take(4096, 3)
    slots.free(first)
    slots.free(second)
    *again, new = slots.take(4096, 3)
    assert set(again) == {first, second}
    assert (third, new) == (BASE + 2 * 4096, BASE + 3 * 4096)


def test_segments_of_many_sizes_come_and_go():
    """Each size for itself, in an order of chance; never two blocks in one place."""
    dice, slots = random.Random(1), Slots(8 * SEGMENT)
    held: list[int] = []
    for _ in range(600):
        if held and dice.random() < 0.5:
            slots.free(held.pop(dice.randrange(len(held))))
        else:
            held += slots.take(dice.choice((1, 4096, 4097, 8192, 12_288, SEGMENT // 2, SEGMENT)))
    while held:
        slots.free(held.pop())
    assert slots.index.statistics().used_bytes == 0
    assert len(slots.take(SEGMENT, 9)) == 8


@pytest.mark.parametrize(("capacity", "segment"), [(SEGMENT - 1, SEGMENT), (MIB, 0), (MIB, 4097)])
def test_impossible_segments_are_refused_by_name(capacity: int, segment: int):
    with pytest.raises(ConfigError, match="segment"):
        Slab(BASE, capacity, segment)


@pytest.mark.parametrize(
    ("capacity", "segment"), [(16 * MIB, 2 * MIB), (100 * MIB, 6 * MIB), (8 << 30, 64 * MIB), (MIB, 2 * MIB)]
)
def test_default_segment_is_a_sixteenth_in_huge_pages(capacity: int, segment: int):
    assert default_segment_bytes(capacity) == segment


def test_prefault_backs_memory_and_keeps_its_content():
    memory = SlabMemory(8 * MIB)
    try:
        ctypes.memmove(memory.base_address + MIB, b"payload", 7)
        memory.prefault(threading.Event(), step_bytes=3 * MIB)
        assert ctypes.string_at(memory.base_address + MIB, 7) == b"payload"
        assert _mapping_fields(memory.base_address)["Rss"] == "8192 kB"
    finally:
        memory.close()


def test_others_can_map_the_memory_and_keep_it():
    memory = SlabMemory(4 * MIB)
    ctypes.memmove(memory.base_address + MIB, b"payload", 7)
    with mmap.mmap(memory.fd, memory.capacity_bytes) as other:
        assert other[MIB : MIB + 7] == b"payload"
        other[:5] = b"reply"
        assert ctypes.string_at(memory.base_address, 5) == b"reply"
        memory.close()
        assert other[MIB : MIB + 7] == b"payload"
    with pytest.raises(OSError):
        os.fstat(memory.fd)


@pytest.mark.parametrize("length", [0, 2 * MIB, 8 * MIB])
def test_nobody_can_change_the_size_of_the_memory(length: int):
    memory = SlabMemory(4 * MIB)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, length)
        assert os.fstat(memory.fd).st_size == memory.capacity_bytes == 4 * MIB
    finally:
        memory.close()


def test_kind_of_pages_is_what_the_kernel_says():
    memory = SlabMemory(4 * MIB)
    try:
        fields = _mapping_fields(memory.base_address)
        if memory.pages == "hugetlb":
            assert fields["KernelPageSize"] == "2048 kB"
        else:
            assert fields["KernelPageSize"] == f"{mmap.PAGESIZE >> 10} kB"
            assert memory.pages == ("transparent" if fields["THPeligible"] == "1" else "4 KiB pages")
    finally:
        memory.close()


def test_more_than_the_system_has_is_a_config_error():
    descriptors = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r"more than the memory and swap of this host, .*; give less"):
        SlabMemory(1 << 60)
    with pytest.raises(ConfigError, match="cannot be mapped"):
        SlabMemory(0)
    assert set(os.listdir("/proc/self/fd")) == descriptors


def _mapping_fields(address: int) -> dict[str, str]:
    """What the kernel says of the mapping at an address."""
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)[1:]:
        head, *lines = mapping.splitlines()
        start, end = (int(bound, 16) for bound in head.split()[0].split("-"))
        if start <= address < end:
            return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}
    raise AssertionError("not mapped")
