"""Blocks written to memory nodes on this host without asking: see ring.h."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polarkv_sglang.errors import NodeError, TransportError
from polarkv_sglang.transport.directory import KEY_BYTES, Directory
from polarkv_sglang.transport.library import Library

WRITTEN, WAS_THERE = 1, 2  # what became of a block, as one byte; else 0: see POLAR_WRITTEN
_NO_SLOTS = np.zeros(0, np.uint64)


class Slots:
    """Slots of a memory node that may be written to without asking, all for blocks of one length."""

    def __init__(self, library: Library, directory: Directory, fd: int) -> None:
        """``fd``: of the connection to the node. Raises TransportError if ``directory`` has no ring."""
        if not directory.has_ring:
            raise TransportError("a directory has no ring: its node cannot be told of blocks")
        self._ffi = library.ffi
        self.directory = directory
        self.state = library.ffi.new("polar_granted *", {"directory": directory.state, "fd": fd})
        self.replace(_NO_SLOTS)

    def replace(self, addresses: npt.NDArray[np.uint64]) -> None:
        """These, at addresses in the node, may be written to, and no others any more."""
        self._addresses = self._ffi.from_buffer("uint64_t[]", addresses)
        self.state.addresses, self.state.count, self.state.taken = self._addresses, len(addresses), 0

    @property
    def left(self) -> int:
        """How many have not been written to."""
        return int(self.state.count - self.state.taken)


class Publish:
    """Writes of blocks to slots that nodes on this host have granted. For one thread at a time.

    What the call in C works with is kept from one to the next, as in ``LookUp``.
    """

    def __init__(self, library: Library) -> None:
        self._ffi, self._batch = library.ffi, library.batch
        self._bytes, self._words = library.ffi.typeof("uint8_t[]"), library.ffi.typeof("uint64_t[]")
        self._publication = library.ffi.new("polar_publication *", {"hash": library.xxh3})
        self._make_room(64)

    def _make_room(self, blocks: int) -> None:
        self._room = blocks
        self._publication.states = self._states = self._ffi.new(self._bytes, blocks)

    def write(
        self,
        slots: Slots,
        keys: bytes,
        parents: bytes,
        local: npt.NDArray[np.uint64],
        piece_bytes: int,
        expected: npt.NDArray[np.uint64] | None,
        timeout_s: float,
    ) -> bytes | None:
        """Write blocks that are not there yet from ``local`` (shape [blocks, pieces]), and tell the node.

        What became of them, one byte per block. None, and nothing is written, if there are too few slots, or
        the ring is full. One GIL-free call. Blocks whose checksums are not the ``expected`` ones are not
        stored. Raises NodeError if the connection has ended, TransportError if there is no memory for it or
        the directory is closed, ValueError if keys, parents, addresses and checksums are not of as many
        blocks.
        """
        blocks, pieces = local.shape
        if len(keys) != blocks * KEY_BYTES or len(parents) != len(keys):
            raise ValueError(f"{len(keys)} bytes of keys and {len(parents)} of parents for {blocks} blocks")
        if expected is not None and len(expected) != blocks:
            raise ValueError(f"{len(expected)} checksums for {blocks} blocks")
        if not slots.directory.address:
            raise TransportError("a directory is closed")
        if blocks > self._room:
            self._make_room(blocks)
        ffi, batch, publication = self._ffi, self._batch, self._publication
        wanted, where = ffi.from_buffer(self._bytes, keys), ffi.from_buffer(self._words, local)
        before = ffi.from_buffer(self._bytes, parents)
        sums = ffi.NULL if expected is None else ffi.from_buffer(self._words, expected)
        publication.granted, publication.keys, publication.parents = slots.state, wanted, before
        publication.local, publication.expected = where, sums
        publication.block_count, publication.pieces, publication.piece_bytes = blocks, pieces, piece_bytes
        publication.timeout_ns = max(0, int(timeout_s * 1e9))
        result = batch.polar_publish(publication)
        if result == batch.POLAR_DONE:
            return bytes(ffi.buffer(self._states, blocks))
        if result == batch.POLAR_NO_SLOTS:
            return None
        if result == batch.POLAR_GONE:
            raise NodeError("closed the connection")
        raise TransportError(f"no memory to write {blocks} blocks")
