"""Blocks of memory nodes on this host, read without asking: see directory.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from cffi import FFI

from polarkv_sglang.errors import TransportError
from polarkv_sglang.transport.library import Library
from polarkv_sglang.transport.shared import Mapped, SharedHandle, attach

ENTRY_BYTES: Final = 64
WAYS_BYTES: Final = 4 * ENTRY_BYTES  # a directory is whole multiples of it long
UNKNOWN, READ, WRONG = 0, 1, 2  # what became of a block, as one byte: see POLAR_READ
_KEY_BYTES = 16


class Looked(NamedTuple):
    """What became of blocks."""

    states: bytes  # one byte per block
    generations: npt.NDArray[np.uint64]


class Directory:
    """A memory node's directory and slab, as this process has them mapped."""

    def __init__(self, library: Library, mapped: Mapped, slab: Mapped) -> None:
        """Raises TransportError if ``mapped`` is no directory. ``slab`` is not closed with it."""
        if not mapped.length or mapped.length % WAYS_BYTES:
            raise TransportError(f"{mapped.length} bytes are not whole {WAYS_BYTES} of a directory")
        self._mapped = mapped
        self.state: FFI.CData = library.ffi.new(
            "polar_directory *",
            {
                "entries": mapped.address,
                "entry_count": mapped.length // ENTRY_BYTES,
                "slab": {"mapping": slab.address, "remote": slab.remote, "length": slab.length},
            },
        )

    @property
    def address(self) -> int:
        """Where it is mapped; 0 once closed."""
        return self._mapped.address

    def close(self) -> None:
        """Unmap the directory; no read may be under way, or follow."""
        self._mapped.close()


class LookUp:
    """Reads of blocks whose nodes' directories are mapped. For one thread at a time."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._lookup = library.ffi.new("polar_lookup *", {"hash": library.xxh3})

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
        ``directories[directory[i]]``; None: all in the first. Bytes of what is not READ are undefined. Raises
        TransportError if there is no memory for it or a directory is closed, ValueError if keys, directories
        and addresses are not of as many blocks.
        """
        blocks, pieces = local.shape
        if len(keys) != blocks * _KEY_BYTES or (directory is not None and len(directory) != blocks):
            raise ValueError(f"{len(keys)} bytes of keys for {blocks} blocks, or as few directories")
        if not all(opened.address for opened in directories):
            raise TransportError("a directory is closed")
        states, generations = bytearray(blocks), np.empty(blocks, np.uint64)
        ffi, batch, lookup = self._library.ffi, self._library.batch, self._lookup
        kept = (
            ffi.new("polar_directory *[]", [opened.state for opened in directories]),
            ffi.NULL if directory is None else ffi.from_buffer("uint32_t[]", directory),
            ffi.from_buffer("uint8_t[]", keys),
            ffi.from_buffer("uint64_t[]", local),
            ffi.from_buffer("uint8_t[]", states),
            ffi.from_buffer("uint64_t[]", generations),
        )
        lookup.directories, lookup.directory, lookup.keys, lookup.local = kept[:4]
        lookup.states, lookup.generations = kept[4:]
        lookup.block_count, lookup.pieces, lookup.piece_bytes = blocks, pieces, piece_bytes
        lookup.timeout_ns = max(0, int(timeout_s * 1e9))
        result = batch.polar_look_up(lookup)
        if result == batch.POLAR_NOT_THERE:
            return None
        if result != batch.POLAR_DONE:
            raise TransportError(f"no memory to look up {blocks} blocks")
        return Looked(bytes(states), generations)


def open_directory(library: Library, handle: SharedHandle, slab: Mapped) -> Directory | None:
    """The directory that a node shares, of a slab that is mapped; None if this process cannot map it."""
    mapped = attach(handle, 0, writable=False)
    if mapped is None:
        return None
    try:
        return Directory(library, mapped, slab)
    except TransportError:
        mapped.close()
        return None
