"""What a rank asks of the pool: which blocks, where their bytes lie, and which belong together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polarkv_sglang.identity import NO_PARENT

Blocks = npt.NDArray[np.intp]  # positions in a chain


class Chain(NamedTuple):
    """Consecutive blocks of one prefix, heads first."""

    keys: Sequence[bytes]  # 16 bytes each
    parents: Sequence[bytes]  # key of the page before; NO_PARENT for the first page of a prefix
    anchors: Sequence[bytes]  # key of the first page of the stripe that the block belongs to

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, blocks: slice) -> Chain:
        """Some consecutive blocks of it."""
        return Chain(self.keys[blocks], self.parents[blocks], self.anchors[blocks])


class Pieces(NamedTuple):
    """Where the bytes of each block of a chain lie in registered memory.

    A block is the concatenation of its pieces, all of one length: one piece for MLA, K and V for MHA.
    """

    addresses: npt.NDArray[np.uint64]  # [blocks, pieces]
    piece_bytes: int
    # Where the processor cannot read the bytes (a GPU's memory): computes the checksums of some blocks.
    checksums: Callable[[Blocks], npt.NDArray[np.uint64]] | None = None

    @property
    def block_bytes(self) -> int:
        return int(self.addresses.shape[1]) * self.piece_bytes

    def of(self, blocks: Blocks) -> npt.NDArray[np.uint64]:
        """Addresses of different blocks, in the chain's order; ``[len(blocks), pieces]``, contiguous."""
        if len(blocks) == len(self.addresses) and self.addresses.flags.c_contiguous:
            return self.addresses
        return self.addresses[blocks]


class Stages(NamedTuple):
    """Blocks that are read part by part, so that the first parts can be used while the others come."""

    columns: Sequence[
        Sequence[slice]
    ]  # of each part, the pieces of a block that it has, from start to stop; together all of them
    on_arrival: Callable[[int], None]  # called with a part's number once it has come, before it is checked


def chain(prefix: Sequence[bytes], keys: Sequence[bytes], stripe_pages: int) -> Chain:
    """The chain of ``keys`` that follow ``prefix``, the keys of all pages before them.

    A stripe is ``stripe_pages`` consecutive pages counted from the start of the prefix. It is the
    unit of placement: single pages would scatter a prefix over all memory nodes, so that one dead
    node cuts nearly every long prefix; whole prompts would use one node's bandwidth only.
    """
    first = len(prefix)
    anchors = []
    for page in range(first, first + len(keys)):
        anchor = page - page % stripe_pages
        anchors.append(prefix[anchor] if anchor < first else keys[anchor - first])
    before = prefix[-1] if prefix else NO_PARENT
    return Chain(keys=keys, parents=[before, *keys[:-1]], anchors=anchors)


@functools.lru_cache(maxsize=16)
def positions(count: int) -> Blocks:
    """All of a chain of ``count`` blocks; not to be written to."""
    every = np.arange(count)
    every.flags.writeable = False
    return every


def blob(keys: Sequence[bytes], blocks: Blocks) -> bytes:
    """The keys of different blocks, in the chain's order, end to end, as messages carry them."""
    if len(blocks) == len(keys):
        return b"".join(keys)
    return b"".join([keys[block] for block in blocks.tolist()])


def spread(values: bytes, blocks: Blocks, over: bytearray) -> None:
    """Put one byte for each of some blocks, in the chain's order, to its place among those of all blocks."""
    if len(values) == len(over):
        over[:] = values
    else:
        np.frombuffer(over, np.uint8)[blocks] = np.frombuffer(values, np.uint8)


def leading(mask: npt.NDArray[np.bool_]) -> int:
    """How many True the mask begins with."""
    return len(mask) if mask.all() else int(mask.argmin())
