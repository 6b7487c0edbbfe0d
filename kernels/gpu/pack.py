"""Moving pages and blocks in Triton: one program per tile of one page in one layer of K or V."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from polarkv_sglang.kernels.layout import LayerRange, PagedPool, alignment

# A program's tile is its share of one page in one layer. With four warps, 8 KiB are four 16-byte accesses
# in flight per thread.
_TILE_BYTES: Final = 8192
_ELEMENTS: Final = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64, 16: tl.uint64}


@triton.jit
def _move(
    pointers,
    starts,
    blocks,
    block_stride,
    first_layer,
    layers,
    all_layers,
    page_size,
    k_token,
    v_token,
    k_stride,
    v_stride,
    tiles,
    INTO_BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    GAPS: tl.constexpr,
    ELEMENT: tl.constexpr,
    LANES: tl.constexpr,
    ACCESS: tl.constexpr,
    TILE: tl.constexpr,
):
    # Lengths and strides come in accesses, of LANES elements each. The products below tell the compiler that
    # a thread's elements are aligned neighbours, which it must know to make one access of them.
    program = tl.program_id(0)
    tile = program % tiles
    layer = first_layer + program // tiles % layers
    part = program // tiles // layers % PARTS
    block = (program // tiles // layers // PARTS).to(tl.int64)

    token = tl.where(part == 0, k_token, v_token)
    stride = tl.where(part == 0, k_stride, v_stride)
    run = page_size * token * LANES
    start = tl.load(starts + block).to(tl.int64)
    offset = (part * all_layers * page_size).to(tl.int64) * k_token + (layer * page_size).to(tl.int64) * token

    address = tl.load(pointers + part * all_layers + layer)
    page = address.to(tl.pointer_type(ELEMENT)) + start * stride * LANES
    packed = blocks.to(tl.pointer_type(ELEMENT)) + (block * block_stride + offset) * LANES
    page = tl.multiple_of(page, ACCESS)
    packed = tl.multiple_of(packed, ACCESS)

    at = tile * TILE + tl.arange(0, TILE)
    inside = at < run
    in_pool = at
    if GAPS:
        in_pool = at // (token * LANES) * (stride * LANES) + at % (token * LANES)
    if INTO_BLOCKS:
        tl.store(packed + at, tl.load(page + in_pool, mask=inside), mask=inside)
    else:
        tl.store(page + in_pool, tl.load(packed + at, mask=inside), mask=inside)


def move(
    pool: PagedPool, starts: torch.Tensor, blocks: torch.Tensor, layers: LayerRange, *, into_blocks: bool
) -> None:
    """Launch ``pack_blocks`` (or ``unpack_blocks``) for operands that were checked; none is empty."""
    access = alignment(pool.alignment, blocks.data_ptr(), blocks.stride(0))
    element = _ELEMENTS[access]
    lanes = 2 if access == 16 else 1
    last = len(pool.parts) - 1
    longest = max(pool.layer_bytes(0), pool.layer_bytes(last)) // access * lanes
    tile = min(triton.next_power_of_2(longest), _TILE_BYTES // access * lanes)
    tiles = triton.cdiv(longest, tile)
    _move[(len(starts) * len(pool.parts) * len(layers) * tiles,)](
        pool.pointers,
        starts,
        blocks,
        blocks.stride(0) // access,
        layers.start,
        len(layers),
        pool.layers,
        pool.page_size,
        pool.token_bytes(0) // access,
        pool.token_bytes(last) // access,
        pool.slot_stride(0) // access,
        pool.slot_stride(last) // access,
        tiles,
        INTO_BLOCKS=into_blocks,
        PARTS=len(pool.parts),
        GAPS=any(pool.slot_stride(part) != pool.token_bytes(part) for part in range(len(pool.parts))),
        ELEMENT=element,
        LANES=lanes,
        ACCESS=access,
        TILE=tile,
    )
