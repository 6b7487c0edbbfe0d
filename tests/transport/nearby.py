"""What a memory node on this host shares, made by hand."""

from __future__ import annotations

import os

import numpy as np

from polarkv_sglang.transport import Mapped, attach, load_library, share
from polarkv_sglang.transport.directory import ENTRY_BYTES, RING_BYTES, Directory, open_directory
from tests.transport.conftest import checksum

LENGTH = 12_300  # of a block
SETS, WAYS = 16, 4
NOTICES = 1022  # that a ring has room for
BASE = 1 << 40  # of the slab in the node that there might be
VERSION, KEY, ADDRESS, BYTES, CHECKSUM, GENERATION = 0, slice(1, 3), 3, 4, 5, 6  # words of an entry


class Node:
    """What a memory node shares: a directory, a slab of random bytes, and a ring."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.words = self._memory(SETS * WAYS * ENTRY_BYTES).view(np.uint64).reshape(SETS, WAYS, -1)
        self.slab = self._memory(16 * 16_384)
        self.ring = self._memory(RING_BYTES).view(np.uint64)
        self.slab[:] = np.random.default_rng(0).integers(0, 256, len(self.slab), np.uint8)

    def _memory(self, length: int) -> np.ndarray:
        fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(fd, length)
        self.fds.append(fd)
        return np.memmap(os.fdopen(os.dup(fd), "r+b"), np.uint8, "r+", shape=(length,))

    def block(self, place: int) -> bytes:
        return self.slab[place * 16_384 :][:LENGTH].tobytes()

    def publish(self, key: int, place: int, way: int = 0) -> np.ndarray:
        """The entry of a block, as the node would write it."""
        entry = self.words[key % SETS, way]
        entry[VERSION] += 2
        entry[KEY] = key, 7
        entry[ADDRESS], entry[BYTES] = BASE + place * 16_384, LENGTH
        entry[CHECKSUM], entry[GENERATION] = checksum(self.block(place)), key + 100
        return entry

    def share(self) -> tuple[Directory, Mapped]:
        directory, slab, ring = (share(fd, os.fstat(fd).st_size) for fd in self.fds)
        mapped = attach(slab, BASE)
        assert mapped is not None
        opened = open_directory(load_library(), directory, mapped, ring)
        assert opened is not None
        return opened, mapped


def keys(*numbers: int) -> bytes:
    return b"".join(np.array([number, 7], np.uint64).tobytes() for number in numbers)
