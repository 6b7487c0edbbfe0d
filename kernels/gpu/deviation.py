"""Deviation of K and V rows in Triton: one program per few tokens, V and K in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl

from polarkv_sglang.kernels.deviation import Norm, Rows

# Elements of a program's tile [tokens, numbers of a row]: 32 a thread with four warps.
_TILE_ELEMENTS: Final = 4096
_WIDEST: Final = 1024


@triton.jit
def _add(
    sums,
    fresh,
    cached,
    width,
    fresh_row,
    cached_row,
    token,
    slot,
    known,
    SQUARED: tl.constexpr,
    DIMS: tl.constexpr,
):
    difference, reference = sums
    for start in range(0, width, DIMS):
        at = (start + tl.arange(0, DIMS))[None, :]
        inside = known[:, None] & (at < width)
        x = tl.load(fresh + token[:, None] * fresh_row + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(cached + slot[:, None] * cached_row + at, mask=inside, other=0.0).to(tl.float32)
        off = x - y
        if SQUARED:
            difference += tl.sum(off * off, 1)
            reference += tl.sum(x * x, 1)
        else:
            difference += tl.sum(tl.abs(off), 1)
            reference += tl.sum(tl.abs(x), 1)
    return difference, reference


@triton.jit
def _deviate(
    out,
    slots,
    tokens,
    fresh,
    cached,
    width,
    fresh_row,
    cached_row,
    other_fresh,
    other_cached,
    other_width,
    other_fresh_row,
    other_cached_row,
    BOTH: tl.constexpr,
    SQUARED: tl.constexpr,
    TOKENS: tl.constexpr,
    DIMS: tl.constexpr,
):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    known = token < tokens
    slot = tl.load(slots + token, mask=known, other=0).to(tl.int64)
    sums = (tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32))
    sums = _add(sums, fresh, cached, width, fresh_row, cached_row, token, slot, known, SQUARED, DIMS)
    if BOTH:
        sums = _add(
            sums,
            other_fresh,
            other_cached,
            other_width,
            other_fresh_row,
            other_cached_row,
            token,
            slot,
            known,
            SQUARED,
            DIMS,
        )
    difference, reference = sums
    tl.store(out + token, difference, mask=known)
    tl.store(out + tokens + token, reference, mask=known)


def deviation_sums(rows: Sequence[Rows], slots: torch.Tensor, norm: Norm, sums: torch.Tensor) -> None:
    """Launch ``deviation_sums`` for operands that were checked; there is a token."""
    operands: list[torch.Tensor | int] = []
    for fresh, cached in (rows[0], rows[-1]):
        operands += [fresh, cached, fresh[0].numel(), fresh.stride(0), cached.stride(0)]
    dims = min(_WIDEST, max(triton.next_power_of_2(fresh[0].numel()) for fresh, _ in rows))
    tokens = _TILE_ELEMENTS // dims
    _deviate[(triton.cdiv(len(slots), tokens),)](
        sums,
        slots,
        len(slots),
        *operands,
        BOTH=len(rows) == 2,
        SQUARED=norm == "l2",
        TOKENS=tokens,
        DIMS=dims,
    )
