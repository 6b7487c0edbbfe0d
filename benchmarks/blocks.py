"""The memory that all stores under comparison read and write."""

from __future__ import annotations

import mmap
import os

import numpy as np
import numpy.typing as npt

_FILL_BYTES = 64 << 20


class Blocks:
    """Shared memory of two halves: blocks are put from the first and got into the second.

    Every client maps this same memory, so that none has pages or caches of its own to gain from.
    ``source`` and ``target`` are the halves, as bytes.
    """

    def __init__(self, half_bytes: int) -> None:
        self.half_bytes = half_bytes
        self.length = 2 * half_bytes
        self.descriptor = os.memfd_create("blocks")
        os.ftruncate(self.descriptor, self.length)
        self._mapping = mmap.mmap(self.descriptor, self.length)
        everything = np.frombuffer(self._mapping, np.uint8)
        self.address = int(everything.ctypes.data)
        self.source, self.target = everything[:half_bytes], everything[half_bytes:]
        self.target[:] = 0
        generator = np.random.default_rng(0)
        for start in range(0, half_bytes, _FILL_BYTES):
            part = self.source[start : start + _FILL_BYTES]
            part[:] = np.frombuffer(generator.bytes(len(part)), np.uint8)
        self._stamp = 0

    def renew(self, count: int, block_bytes: int) -> None:
        """Make ``count`` blocks at the head of the source unlike all before, and clear the target there."""
        length = count * block_bytes
        stamps = np.arange(self._stamp, self._stamp + count, dtype=np.uint64)
        self.source[:length].view(np.uint64).reshape(count, -1)[:, 0] = stamps
        self._stamp += count
        self.target[:length] = 0

    def arrived(self, count: int, block_bytes: int) -> bool:
        """Whether the first ``count`` blocks of the target are those of the source, to the byte."""
        length = count * block_bytes
        return np.array_equal(self._words(self.source[:length]), self._words(self.target[:length]))

    @staticmethod
    def _words(part: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
        return part.view(np.uint64)
