"""Pages scattered over a pool's layers <-> contiguous blocks.

Both directions exist in the layout that ``layout.py`` states, for whole blocks or a range of their layers, so
that a block can come in group by group while earlier layers are already computed with.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from polarkv_sglang.kernels.dispatch import require_device, require_vector, uses_triton
from polarkv_sglang.kernels.layout import LayerRange, PagedPool

_Bytes = npt.NDArray[np.uint8]


def pack_blocks(
    pool: PagedPool,
    starts: torch.Tensor,
    blocks: torch.Tensor,
    layers: tuple[int, int] | None = None,
) -> None:
    """Copy the page that begins at slot ``starts[i]``, or its ``layers`` [start, end), into ``blocks[i]``.

    ``starts`` is int32 or int64 [blocks]; ``blocks`` is uint8 [blocks, pool.block_bytes], rows contiguous and
    any distance apart. Bytes of other layers stay as they are. On a GPU this is one launch on the current
    stream, and slots outside the pool are undefined behaviour; on a CPU they raise IndexError.
    Raises ValueError for operands that do not fit each other.
    """
    span = _checked(pool, starts, blocks, layers)
    if len(starts) == 0 or len(span) == 0:
        return
    if uses_triton(blocks):
        from polarkv_sglang.kernels.gpu import pack as gpu

        gpu.move(pool, starts, blocks, span, into_blocks=True)
    else:
        pack_reference(pool, starts, blocks, span)


def unpack_blocks(
    pool: PagedPool,
    starts: torch.Tensor,
    blocks: torch.Tensor,
    layers: tuple[int, int] | None = None,
) -> None:
    """The reverse of ``pack_blocks``: copy ``blocks[i]`` into the page that begins at slot ``starts[i]``.

    Pages must not overlap. Slots of no page, and other layers, stay as they are.
    """
    span = _checked(pool, starts, blocks, layers)
    if len(starts) == 0 or len(span) == 0:
        return
    if uses_triton(blocks):
        from polarkv_sglang.kernels.gpu import pack as gpu

        gpu.move(pool, starts, blocks, span, into_blocks=False)
    else:
        unpack_reference(pool, starts, blocks, span)


def pack_reference(pool: PagedPool, starts: torch.Tensor, blocks: torch.Tensor, layers: LayerRange) -> None:
    """``pack_blocks`` on a CPU."""
    for page, run in _pages_and_runs(pool, starts, blocks, layers):
        run[:] = page


def unpack_reference(pool: PagedPool, starts: torch.Tensor, blocks: torch.Tensor, layers: LayerRange) -> None:
    """``unpack_blocks`` on a CPU."""
    for page, run in _pages_and_runs(pool, starts, blocks, layers):
        page[:] = run


def _pages_and_runs(
    pool: PagedPool, starts: torch.Tensor, blocks: torch.Tensor, layers: LayerRange
) -> Iterator[tuple[_Bytes, _Bytes]]:
    """Views of the same bytes in the pool and in the blocks, both [page_size, bytes of a token].

    By numpy: torch splits every small copy over all threads, which takes several times as long.
    """
    slots = starts.tolist()
    if min(slots) < 0 or max(slots) + pool.page_size > pool.slots:
        raise IndexError(
            f"pages of {pool.page_size} tokens begin at slots {min(slots)} to {max(slots)}, "
            f"but the pool has slots 0 to {pool.slots - 1}"
        )
    target = blocks.numpy()
    for part, tensors in enumerate(pool.parts):
        size = pool.layer_bytes(part)
        shape = (len(slots), pool.page_size, pool.token_bytes(part))
        for layer in range(layers.start, layers.end):
            source = tensors[layer].numpy()
            offset = pool.part_start(part) + layer * size
            runs = target[:, offset : offset + size].reshape(shape)
            for slot, run in zip(slots, runs):
                yield source[slot : slot + pool.page_size], run


def _checked(
    pool: PagedPool, starts: torch.Tensor, blocks: torch.Tensor, layers: tuple[int, int] | None
) -> LayerRange:
    require_vector(len(blocks), starts=starts)
    require_device(pool.device, starts=starts, blocks=blocks)
    if blocks.dtype != torch.uint8 or blocks.shape[1:] != (pool.block_bytes,) or blocks.stride(1) != 1:
        raise ValueError(
            f"blocks are {blocks.dtype} {list(blocks.shape)} with strides {list(blocks.stride())}; "
            f"uint8 [blocks, {pool.block_bytes}] with contiguous rows is needed"
        )
    return pool.checked_range(layers)
