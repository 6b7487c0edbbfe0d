from __future__ import annotations

import ctypes
import mmap
import os
import re
import threading
from pathlib import Path

import pytest

from polarkv_sglang.errors import ConfigError, PolarError
from polarkv_sglang.pool.slab import Slab, SlabMemory, default_segment_bytes

MIB = 1 << 20
SEGMENT = 16 * 4096
BASE = 1 << 40


def fill(slab: Slab, length: int, at_once: int = 1) -> list[int]:
    addresses: list[int] = []
    while some := slab.allocate(length, at_once):
        addresses += some
    return addresses


def one(slab: Slab, length: int) -> int:
    [address] = slab.allocate(length)
    return address


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_capacity_is_never_exceeded(at_once: int):
    slab = Slab(BASE, 4 * SEGMENT + 4096, SEGMENT)
    addresses = fill(slab, 5000, at_once)
    assert len(addresses) == 4 * 8
    assert slab.used_bytes == 4 * 8 * 8192 <= slab.capacity_bytes == 4 * SEGMENT
    assert not slab.has_room(5000)
    slab.check_integrity((address, 5000) for address in addresses)


def test_segment_serves_another_size_once_it_is_empty():
    slab = Slab(BASE, 2 * SEGMENT, SEGMENT)
    small = fill(slab, 4096)
    assert slab.allocate(SEGMENT) == []
    last = small.pop(3)
    first_segment = [address for address in small if address < BASE + SEGMENT]
    for address in first_segment:
        slab.free(address)
    assert not slab.has_room(SEGMENT)  # one slot of it is still in use
    slab.free(last)
    assert slab.allocate(SEGMENT) == [BASE]
    slab.check_integrity(
        [(BASE, SEGMENT), *((address, 4096) for address in small if address >= BASE + SEGMENT)]
    )


def test_block_longer_than_a_segment_never_fits():
    slab = Slab(BASE, 4 * SEGMENT, SEGMENT)
    assert slab.fits(SEGMENT)
    assert not slab.fits(SEGMENT + 1)
    assert slab.allocate(SEGMENT + 1) == []


def test_freeing_twice_is_an_error():
    slab = Slab(BASE, 4 * SEGMENT, SEGMENT)
    address = one(slab, 1)
    slab.free(address)
    with pytest.raises(KeyError):
        slab.free(address)


def test_only_the_start_of_a_slot_in_use_can_be_freed():
    slab = Slab(BASE, 4 * SEGMENT, SEGMENT)
    assert one(slab, 8192) == BASE
    for wrong in (BASE + 4096, BASE + 8192, BASE + SEGMENT):  # within it, never used, in another segment
        with pytest.raises(KeyError):
            slab.free(wrong)
    slab.check_integrity([(BASE, 8192)])


def test_freed_slots_are_used_before_new_ones():
    slab = Slab(BASE, 4 * SEGMENT, SEGMENT)
    first, second, third = slab.allocate(4096, 3)
    slab.free(first)
    slab.free(second)
    *again, new = slab.allocate(4096, 3)
    assert set(again) == {first, second}
    assert (third, new) == (BASE + 2 * 4096, BASE + 3 * 4096)


def test_integrity_check_notices_a_leaked_slot():
    slab = Slab(BASE, 4 * SEGMENT, SEGMENT)
    slab.allocate(1)
    with pytest.raises(PolarError, match="slots in use"):
        slab.check_integrity([])


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
