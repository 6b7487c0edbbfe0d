"""Rotation of cached keys in Triton: one program per few tokens, all heads."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from polarkv_sglang.kernels.rotate import Moves, Rotary

# Elements of a program's tile [tokens, heads, dim]: 32 a thread with four warps.
_TILE_ELEMENTS: Final = 4096


@triton.jit
def _rotate(
    source,
    target,
    source_rows,
    target_rows,
    old_positions,
    new_positions,
    frequencies,
    tokens,
    heads,
    source_row,
    source_head,
    target_row,
    target_head,
    first,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    known = token < tokens
    head = tl.arange(0, HEADS)[None, :, None]
    dim = tl.arange(0, DIMS)

    # Each rotated dimension has a partner, and the pair a frequency.
    at = dim - first
    rotated = (at >= 0) & (at < 2 * PAIRS)
    if INTERLEAVED:
        pair = at // 2
        leads = at % 2 == 0
    else:
        pair = at % PAIRS
        leads = at < PAIRS

    frequency = tl.load(frequencies + pair, mask=rotated, other=0.0)[None, :]
    old = tl.load(old_positions + token, mask=known, other=0).to(tl.float32)[:, None]
    new = tl.load(new_positions + token, mask=known, other=0).to(tl.float32)[:, None]
    angle = new * frequency - old * frequency
    cos = tl.cos(angle)[:, None, :]
    sin = tl.where(leads[None, :], -tl.sin(angle), tl.sin(angle))[:, None, :]

    inside = known[:, None, None] & (head < heads) & (dim < DIM)[None, None, :]
    row = tl.load(source_rows + token, mask=known, other=0).to(tl.int64)[:, None, None]
    key = source + row * source_row + head * source_head
    x = tl.load(key + dim[None, None, :], mask=inside)
    if INTERLEAVED:
        one, other = tl.split(tl.reshape(x, [TOKENS, HEADS, DIMS // 2, 2]))
        y = tl.reshape(tl.join(other, one), [TOKENS, HEADS, DIMS])
    else:
        partner = tl.where(leads, dim + PAIRS, dim - PAIRS)[None, None, :]
        y = tl.load(key + partner, mask=inside & rotated[None, None, :], other=0.0)
    turned = (x.to(tl.float32) * cos + y.to(tl.float32) * sin).to(x.dtype)
    # Also where nothing turns the bits stay: x * 1 + y * 0 would lose the sign of zero and spread infinities.
    result = tl.where((angle == 0)[:, None, :], x, turned)

    row = tl.load(target_rows + token, mask=known, other=0).to(tl.int64)[:, None, None]
    tl.store(target + row * target_row + head * target_head + dim[None, None, :], result, mask=inside)


def rotate_keys(source: torch.Tensor, target: torch.Tensor, moves: Moves, rotary: Rotary) -> None:
    """Launch ``rotate_keys`` for operands that were checked; none is empty."""
    tokens = len(moves.source_rows)
    _, heads, dim = target.shape
    padded_heads, padded_dim = triton.next_power_of_2(heads), triton.next_power_of_2(max(dim, 2))
    tile = max(1, _TILE_ELEMENTS // (padded_heads * padded_dim))
    _rotate[(triton.cdiv(tokens, tile),)](
        source,
        target,
        *moves,
        rotary.frequencies,
        tokens,
        heads,
        source.stride(0),
        source.stride(1),
        target.stride(0),
        target.stride(1),
        rotary.first,
        PAIRS=len(rotary.frequencies),
        INTERLEAVED=rotary.interleaved,
        DIM=dim,
        TOKENS=tile,
        HEADS=padded_heads,
        DIMS=padded_dim,
        # A fused multiply-add would not round one of the two angles.
        enable_fp_fusion=False,
    )
