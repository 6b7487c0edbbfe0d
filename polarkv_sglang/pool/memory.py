"""The rank's own memory that the pool reads and writes: registered regions and checksums over them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from polarkv_sglang.errors import TransportError
from polarkv_sglang.pool.blocks import Pieces
from polarkv_sglang.transport import Context, RegisteredMemory

_HUGE_PAGE_BYTES = 2 << 20


class Region(NamedTuple):
    """Registered memory and a view of its bytes."""

    memory: RegisteredMemory
    view: memoryview


class LocalMemory:
    """Regions of this process that UCX may touch; kept registered until the process ends.

    HiCache makes a new storage object at every attach, over host pools that keep their addresses:
    registering the same region again is free. Registration is called by one thread at a time; the
    look-ups are read-only and called by all storage threads.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._regions: tuple[Region, ...] = ()
        self._starts = np.empty(0, np.uint64)

    @property
    def memories(self) -> tuple[RegisteredMemory, ...]:
        """In the order that ``locate`` counts them."""
        return tuple(region.memory for region in self._regions)

    def register(self, address: int, length: int) -> None:
        """Register ``length`` bytes at ``address``; TransportError if UCX or the memlock limit refuses."""
        for region in self._regions:
            known = region.memory
            if known.address <= address and address + length <= known.address + known.length:
                return
        _advise_huge_pages(address, length)
        memory = self._context.register(address, length)
        view = memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")
        regions = sorted((*self._regions, Region(memory, view)), key=lambda item: item.memory.address)
        self._starts = np.array([region.memory.address for region in regions], np.uint64)
        self._regions = tuple(regions)

    def locate(self, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
        """Index of the region of each address; TransportError for one that lies before all regions."""
        found = np.searchsorted(self._starts, addresses, side="right") - 1
        if found.size and found.min() < 0:
            raise TransportError("KV lies in memory that was not registered with the pool")
        return found

    def checksums(self, pieces: Pieces, blocks: Iterable[int]) -> list[int]:
        """xxh3-64 of the given blocks, each piece seeded with the checksum of the one before it.

        One-shot xxh3 keeps the GIL, and that is wanted: giving it up and taking it back for every
        block would cost a switch interval (5 ms) each beside a busy scheduler, hashing costs microseconds.
        """
        regions = self.locate(pieces.addresses)
        length = pieces.piece_bytes
        digest = xxhash.xxh3_64_intdigest
        sums = []
        for block in blocks:
            total = 0
            for address, index in zip(pieces.addresses[block].tolist(), regions[block].tolist()):
                region = self._regions[index]
                start = address - region.memory.address
                total = digest(region.view[start : start + length], seed=total)
            sums.append(total)
        return sums

    def close(self) -> None:
        """Unregister all; no transfer may be under way."""
        for region in self._regions:
            region.memory.close()
        self._regions = ()


def _advise_huge_pages(address: int, length: int) -> None:
    """Ask for huge pages in memory that may not have been touched yet; a hint, and harmless elsewhere.

    Without them the first touch of a host pool runs at 0.5 GB/s, and CMA pins four KiB at a time.
    """
    start = -(-address // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    end = (address + length) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
