"""A ring of notices as a client fills it, see ring.h."""

from __future__ import annotations

import numpy as np

from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.pool.pages import SharedMemory
from polarkv_sglang.transport.columns import unpack_u64
from polarkv_sglang.transport.directory import RING_BYTES

READ, OFFERED, WRITTEN = 0, 1, 2
NOTICES = 1022
_TOLD, _HEARD, _FIRST, _WORDS = 0, 8, 16, 8


class Ring:
    """The client's side of a ring that an index hears."""

    def __init__(self) -> None:
        self.memory = SharedMemory("ring", RING_BYTES)
        self.words = np.frombuffer(
            (np.ctypeslib.ctypes.c_char * RING_BYTES).from_address(self.memory.address), np.uint64
        )

    def tell(
        self, kind: int, key: bytes, parent: bytes = NO_PARENT, address: int = 0, checksum: int = 0
    ) -> None:
        told = int(self.words[_TOLD])
        at = _FIRST + told % NOTICES * _WORDS
        self.words[at : at + 7] = [kind, *unpack_u64(key), *unpack_u64(parent), address, checksum]
        self.words[_TOLD] = told + 1

    def jump(self, count: int) -> None:
        """Say that there are so many notices more than there are."""
        self.words[_TOLD] += np.uint64(count)

    @property
    def waiting(self) -> int:
        return int(self.words[_TOLD] - self.words[_HEARD])

    def close(self) -> None:
        self.memory.close()
