from __future__ import annotations

import ctypes
import threading

import pytest

from polarkv_sglang.errors import ConfigError, PolarError
from polarkv_sglang.pool.slab import Slab, SlabMemory, default_segment_bytes

MIB = 1 << 20
SEGMENT = 16 * 4096
BASE = 1 << 40


def fill(slab: Slab, length: int) -> list[int]:
    addresses = []
    while (address := slab.allocate(length)) is not None:
        addresses.append(address)
    return addresses


def test_capacity_is_never_exceeded():
    slab = Slab(BASE, 4 * SEGMENT + 4096, SEGMENT)
    addresses = fill(slab, 5000)
    assert len(addresses) == 4 * 8
    assert slab.used_bytes == 4 * 8 * 8192 <= slab.capacity_bytes == 4 * SEGMENT
    assert not slab.has_room(5000)
    slab.check_integrity((address, 5000) for address in addresses)


def test_segment_serves_another_size_once_it_is_empty():
    slab = Slab(BASE, 2 * SEGMENT, SEGMENT)
    small = fill(slab, 4096)
    assert slab.allocate(SEGMENT) is None
    last = small.pop(3)
    first_segment = [address for address in small if address < BASE + SEGMENT]
    for address in first_segment:
        slab.free(address)
    assert not slab.has_room(SEGMENT)  # one slot of it is still in use
    slab.free(last)
    assert slab.allocate(SEGMENT) == BASE
    slab.check_integrity(
        [(BASE, SEGMENT), *((address, 4096) for address in small if address >= BASE + SEGMENT)]
    )


def test_block_longer_than_a_segment_never_fits():
    slab = Slab(BASE, 4 * SEGMENT, SEGMENT)
    assert slab.fits(SEGMENT)
    assert not slab.fits(SEGMENT + 1)
    assert slab.allocate(SEGMENT + 1) is None


def test_freeing_twice_is_an_error():
    slab = Slab(BASE, 4 * SEGMENT, SEGMENT)
    address = slab.allocate(1)
    assert address is not None
    slab.free(address)
    with pytest.raises(KeyError):
        slab.free(address)


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
        assert _resident_bytes(memory.base_address) == 8 * MIB
    finally:
        memory.close()


def test_more_than_the_system_has_is_a_config_error():
    with pytest.raises(ConfigError, match="give less"):
        SlabMemory(1 << 60)


def _resident_bytes(address: int) -> int:
    with open("/proc/self/smaps", encoding="utf-8") as file:
        lines = iter(file)
        for line in lines:
            start, _, rest = line.partition("-")
            end = rest.partition(" ")[0]
            try:
                inside = int(start, 16) <= address < int(end, 16)
            except ValueError:
                continue
            if inside:
                fields = dict(next(lines).split(":") for _ in range(4))
                return int(fields["Rss"].split()[0]) << 10
    raise AssertionError("not mapped")
