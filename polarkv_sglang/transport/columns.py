"""Columns of numbers and of keys in one blob each, as messages carry them, and what is hashed of columns."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from polarkv_sglang.identity import KEY_BYTES


def pack_u64(values: Sequence[int]) -> bytes:
    """Little-endian u64 blob of the values."""
    return struct.pack(f"<{len(values)}Q", *values)


def unpack_u64(blob: bytes) -> npt.NDArray[np.uint64]:
    """Read-only uint64 array over a blob."""
    return np.frombuffer(blob, dtype="<u8")


def seal(worker_address: bytes, rkeys: Sequence[bytes]) -> int:
    """XXH3-64 over what UCX is to trust: it aborts the whole process on an address that is not one.

    Guards against garbage, not against a client that means harm: that one has the slab's rkey already.
    """
    digest = xxhash.xxh3_64()
    for part in (worker_address, *rkeys):
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(part)
    return digest.intdigest()


def checksums_from(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Checksums of blocks from the digests of all their chunks, [blocks, chunks] in the block's order."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, digests), np.uint64, len(digests))


def split_keys(blob: bytes) -> list[bytes]:
    """The keys of a blob, in order."""
    return list(struct.unpack(f"{KEY_BYTES}s" * (len(blob) // KEY_BYTES), blob))
