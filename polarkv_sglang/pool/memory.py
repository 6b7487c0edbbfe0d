"""The rank's own memory that the pool reads and writes."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import numpy as np
import numpy.typing as npt

from polarkv_sglang.errors import TransportError
from polarkv_sglang.pool.pages import populate
from polarkv_sglang.transport import HUGE_PAGE_BYTES, Context, RegisteredMemory


class LocalMemory:
    """Regions of this process that UCX may touch; kept registered until the process ends.

    HiCache makes a new storage object at every attach, over host pools that keep their addresses:
    registering the same region again is free. Registration is called by one thread at a time; the
    look-ups are read-only and called by all storage threads.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._regions: tuple[RegisteredMemory, ...] = ()
        self._starts = np.empty(0, np.uint64)

    @property
    def memories(self) -> tuple[RegisteredMemory, ...]:
        """In the order that ``locate`` counts them."""
        return self._regions

    def register(self, address: int, length: int) -> None:
        """Register ``length`` bytes at ``address``; TransportError if UCX or the memlock limit refuses."""
        for known in self._regions:
            if known.address <= address and address + length <= known.address + known.length:
                return
        _back_by_pages(address, length)
        memory = self._context.register(address, length)
        regions = sorted((*self._regions, memory), key=lambda item: item.address)
        self._starts = np.array([region.address for region in regions], np.uint64)
        self._regions = tuple(regions)

    def locate(self, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
        """Index of the region of each address; TransportError for one that lies before all regions."""
        found = np.searchsorted(self._starts, addresses, side="right") - 1
        if found.size and found.min() < 0:
            raise TransportError("KV lies in memory that was not registered with the pool")
        return found

    def rkeys(self) -> list[bytes]:
        """Keys by which a memory node may put into each region, in the order that ``locate`` counts them."""
        return [region.packed_rkey() for region in self._regions]

    def close(self) -> None:
        """Unregister all; no transfer may be under way."""
        for region in self._regions:
            region.close()
        self._regions = ()


def _back_by_pages(address: int, length: int) -> None:
    """Have the memory backed now, by huge pages where the kernel has some; harmless to memory in use.

    A host pool that is not pinned has no pages yet, and the first reads into it would wait for them: they
    come at 0.5 to 2 GB/s.
    """
    start = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = (address + length) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    with contextlib.suppress(OSError):  # Linux before 5.14
        populate(first, address + length - first)
