"""The rank's own memory that the pool reads and writes."""

from __future__ import annotations

import contextlib
import mmap
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polarkv_sglang.errors import TransportError
from polarkv_sglang.pool.pages import advise_huge_pages, populate
from polarkv_sglang.transport import Context, RegisteredMemory


class Regions(NamedTuple):
    """Registered memory, by address; replaced as a whole, so that its parts belong together."""

    memories: tuple[RegisteredMemory, ...] = ()
    rkeys: tuple[bytes, ...] = ()  # by which a memory node may put into each
    starts: npt.NDArray[np.uint64] = np.empty(0, np.uint64)

    def locate(self, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
        """Index of the region of each address; TransportError for one that lies before all regions."""
        found = np.searchsorted(self.starts, addresses, side="right") - 1
        if found.size and found.min() < 0:
            raise TransportError("KV lies in memory that was not registered with the pool")
        return found


class LocalMemory:
    """Regions of this process that UCX may touch; kept registered until ``close``.

    HiCache makes a new storage object at every attach, over host pools that keep their addresses:
    registering the same region again is free. Registration is called by one thread at a time; ``regions`` is
    read by all storage threads.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.regions = Regions()

    def register(self, address: int, length: int, *, cuda: bool = False, populate: bool = True) -> None:
        """Register ``length`` bytes at ``address``, of a GPU if ``cuda``, and ``populate`` what has no pages.

        TransportError if UCX or the memlock limit refuses.
        """
        for known in self.regions.memories:
            inside = known.address <= address and address + length <= known.address + known.length
            if inside and known.cuda == cuda:
                return
        if populate and not cuda:
            _back_by_pages(address, length)
        memory = self._context.register(address, length, cuda=cuda)
        memories = tuple(sorted((*self.regions.memories, memory), key=lambda item: item.address))
        try:
            rkeys = tuple(region.packed_rkey() for region in memories)
        except TransportError:
            memory.close()
            raise
        starts = np.array([region.address for region in memories], np.uint64)
        self.regions = Regions(memories, rkeys, starts)

    def close(self) -> None:
        """Unregister all; no transfer may be under way."""
        for region in self.regions.memories:
            region.close()
        self.regions = Regions()


def _back_by_pages(address: int, length: int) -> None:
    """Have the memory backed now, by huge pages where the kernel has some; harmless to memory in use.

    A host pool that is not pinned has no pages yet, and the first reads into it would wait for them: they
    come at 0.5 to 2 GB/s.
    """
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    with contextlib.suppress(OSError):  # Linux before 5.14
        advise_huge_pages(address, length)
        populate(first, address + length - first)
