"""Blocks of memory nodes on this host, read and written without asking: see directory.h and ring.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from cffi import FFI

from polarkv_sglang.errors import TransportError
from polarkv_sglang.transport.library import Library
from polarkv_sglang.transport.shared import Mapped, SharedHandle, attach

ENTRY_BYTES: Final = 64
WAYS_BYTES: Final = 4 * ENTRY_BYTES  # a directory is whole multiples of it long
RING_BYTES: Final = 64 << 10
UNKNOWN, READ, WRONG = 0, 1, 2  # what became of a block that was read, as one byte: see POLAR_READ
KEY_BYTES = 16


class Looked(msgspec.Struct, frozen=True):  # made in a third of a NamedTuple's time
    """What became of blocks."""

    states: bytes  # one byte per block
    generations: npt.NDArray[np.uint64]  # until the next read


class Directory:
    """A memory node's directory, slab and, if it has one for us, ring, as this process has them mapped."""

    def __init__(self, library: Library, mapped: Mapped, slab: Mapped, ring: Mapped | None = None) -> None:
        """Raises TransportError if ``mapped`` is no directory, or ``ring`` no ring.

        ``slab`` is not closed with it.
        """
        if not mapped.length or mapped.length % WAYS_BYTES:
            raise TransportError(f"{mapped.length} bytes are not whole {WAYS_BYTES} of a directory")
        if ring is not None and ring.length != RING_BYTES:
            raise TransportError(f"{ring.length} bytes are no ring of {RING_BYTES}")
        self.library = library
        self._mapped = mapped
        self._ring = ring
        self.state: FFI.CData = library.ffi.new(
            "polar_directory *",
            {
                "entries": mapped.address,
                "entry_count": mapped.length // ENTRY_BYTES,
                "slab": {"mapping": slab.address, "remote": slab.remote, "length": slab.length},
                "ring": ring.address if ring is not None else 0,
            },
        )

    @property
    def address(self) -> int:
        """Where it is mapped; 0 once closed."""
        return self._mapped.address

    @property
    def has_ring(self) -> bool:
        return self._ring is not None

    @property
    def untold(self) -> bool:
        """Whether the node does not know of the last read of blocks of it: it has to be told otherwise."""
        return bool(self.state.untold)

    def close(self) -> None:
        """Unmap the directory and the ring; no call may be under way, or follow."""
        self._mapped.close()
        if self._ring is not None:
            self._ring.close()


class LookUp:
    """Reads of blocks whose nodes' directories are mapped. For one thread at a time.

    What the call in C works with is kept from one to the next: making it anew would take a quarter of the
    time that a block of 1 MiB needs.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._ffi, self._batch = library.ffi, library.batch
        self._bytes, self._words = library.ffi.typeof("uint8_t[]"), library.ffi.typeof("uint64_t[]")
        self._lookup = library.ffi.new("polar_lookup *", {"hash": library.xxh3})
        self._directories: list[Directory] = []
        self._make_room(64)

    def _make_room(self, blocks: int) -> None:
        self._room = blocks
        self._states = self._ffi.new(self._bytes, blocks)
        self._generations = np.empty(blocks, np.uint64)
        self._lookup.states = self._states
        self._generations_there = self._ffi.from_buffer(self._words, self._generations)
        self._lookup.generations = self._generations_there

    def _look_into(self, directories: list[Directory]) -> None:
        self._directories = directories
        self._pointers = self._ffi.new("polar_directory *[]", [opened.state for opened in directories])
        self._lookup.directories, self._lookup.directory_count = self._pointers, len(directories)

    def read(
        self,
        directories: Sequence[Directory],
        directory: npt.NDArray[np.uint32] | None,
        keys: bytes,
        local: npt.NDArray[np.uint64],
        piece_bytes: int,
        timeout_s: float,
    ) -> Looked | None:
        """Read blocks into memory at ``local`` (shape [blocks, pieces]).

        If one is missing nothing is read, and the answer is None. One GIL-free call. Block i is looked for in
        ``directories[directory[i]]``; None: all in the first. Bytes of what is not READ are undefined. The
        nodes learn what was read, but for those whose directory is ``untold`` then. Raises TransportError if
        there is no memory for it or a directory is closed, ValueError if keys, directories and addresses are
        not of as many blocks.
        """
        blocks, pieces = local.shape
        if len(keys) != blocks * KEY_BYTES or (directory is not None and len(directory) != blocks):
            raise ValueError(f"{len(keys)} bytes of keys for {blocks} blocks, or as few directories")
        for opened in directories:
            if not opened.address:
                raise TransportError("a directory is closed")
        if directories != self._directories:
            self._look_into(list(directories))
        if blocks > self._room:
            self._make_room(blocks)
        ffi, batch, lookup = self._ffi, self._batch, self._lookup
        which = ffi.NULL if directory is None else ffi.from_buffer("uint32_t[]", directory)
        wanted, where = ffi.from_buffer(self._bytes, keys), ffi.from_buffer(self._words, local)
        lookup.directory, lookup.keys, lookup.local = which, wanted, where
        lookup.block_count, lookup.pieces, lookup.piece_bytes = blocks, pieces, piece_bytes
        lookup.timeout_ns = max(0, int(timeout_s * 1e9))
        result = batch.polar_look_up(lookup)
        if result == batch.POLAR_NOT_THERE:
            return None
        if result != batch.POLAR_DONE:
            raise TransportError(f"no memory to look up {blocks} blocks")
        return Looked(ffi.buffer(self._states, blocks)[:], self._generations[:blocks])


def open_directory(
    library: Library, handle: SharedHandle, slab: Mapped, ring: SharedHandle | None = None
) -> Directory | None:
    """The directory that a node shares, of a slab that is mapped; None if this process cannot map it.

    It has the ring if that can be mapped too.
    """
    mapped = attach(handle, 0, writable=False)
    if mapped is None:
        return None
    mapped_ring = attach(ring, 0) if ring is not None else None
    try:
        return Directory(library, mapped, slab, mapped_ring)
    except TransportError:
        mapped.close()
        if mapped_ring is not None:
            mapped_ring.close()
        return None
