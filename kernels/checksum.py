"""The checksum of a block, computed where the block lies.

A block is cut into chunks of 4096 bytes, the last one shorter if need be. A chunk's digest is its XXH3_64
without a seed; the block's checksum is the XXH3_64 of its digests, as little-endian 64-bit numbers. Chunks
are independent of each other, so a GPU can digest all of them at once; the digests themselves are a five
hundredth of the bytes, and their hash is left to the host.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from polarkv_sglang.kernels.dispatch import uses_triton

CHUNK_BYTES: Final = 4096


def checksum_blocks(blocks: torch.Tensor) -> npt.NDArray[np.uint64]:
    """The checksum of each row of ``blocks``, uint8 [blocks, bytes]; rows are contiguous, any distance apart.

    From a GPU this waits for the digests and everything before them on the current stream. To overlap them
    with other work, call ``chunk_digests`` and, later, ``checksums_of_digests``. Raises ValueError for
    another dtype or shape.
    """
    return checksums_of_digests(chunk_digests(blocks))


def chunk_digests(blocks: torch.Tensor) -> torch.Tensor:
    """The digest of each chunk: int64 [blocks, chunks] on the same device, the bits of XXH3_64."""
    if blocks.dtype != torch.uint8 or blocks.dim() != 2 or (blocks.shape[1] > 1 and blocks.stride(1) != 1):
        raise ValueError(
            f"blocks are {blocks.dtype} {list(blocks.shape)} with strides {list(blocks.stride())}; "
            "uint8 [blocks, bytes] with contiguous rows is needed"
        )
    count, size = blocks.shape
    digests = torch.empty(count, -(-size // CHUNK_BYTES), dtype=torch.int64, device=blocks.device)
    if digests.numel() == 0:
        return digests
    if uses_triton(blocks):
        from polarkv_sglang.kernels.gpu import checksum as gpu

        gpu.chunk_digests(blocks, digests)
    else:
        chunk_digests_reference(blocks, digests)
    return digests


def checksums_of_digests(digests: torch.Tensor) -> npt.NDArray[np.uint64]:
    """The checksums of blocks from the digests of their chunks; brings them to the host first."""
    rows = np.ascontiguousarray(digests.cpu().numpy().astype("<i8", copy=False))
    return np.array([xxhash.xxh3_64_intdigest(row) for row in rows], dtype=np.uint64)


def chunk_digests_reference(blocks: torch.Tensor, digests: torch.Tensor) -> None:
    """``chunk_digests`` on a CPU, by the xxhash package."""
    target = digests.numpy().view(np.uint64)
    for row, block in enumerate(blocks.numpy()):
        for chunk in range(target.shape[1]):
            piece = block[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]
            target[row, chunk] = xxhash.xxh3_64_intdigest(piece)
