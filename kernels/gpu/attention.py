"""Sparse-query attention in Triton: online softmax over tiles of keys, as in FlashAttention.

A tile's rows are (query, head) pairs of one request and one KV head, so the heads that share a KV head read
its keys once, however many they are.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl

from polarkv_sglang.kernels.attention import SparseQueries

_LOG2_E: Final = 1.4426950408889634
_NARROWEST: Final = 16  # what tl.dot takes


class _Tiles(NamedTuple):
    rows: int  # (query, head) pairs
    keys: int
    warps: int
    stages: int


@triton.jit
def _attend(
    query,
    keys,
    values,
    out,
    positions,
    bounds,
    request_rows,
    slots,
    scale,
    query_token,
    query_head,
    key_slot,
    key_head,
    value_slot,
    value_head,
    out_token,
    out_head,
    slots_row,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_DIMS: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    kv_head = tl.program_id(1)
    request = tl.program_id(2)
    first = tl.load(bounds + request)
    count = (tl.load(bounds + request + 1) - first) * GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= count:
        return

    real = row < count
    token = (first + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    position = tl.load(positions + token, mask=real, other=-1).to(tl.int32)
    key_dim = tl.arange(0, KEY_DIMS)
    value_dim = tl.arange(0, VALUE_DIMS)
    q_at = query + token[:, None] * query_token + head[:, None] * query_head + key_dim[None, :]
    q = tl.load(q_at, mask=real[:, None] & (key_dim < KEY_DIM)[None, :], other=0.0)

    slot_at = slots + tl.load(request_rows + request).to(tl.int64) * slots_row
    greatest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUE_DIMS], tl.float32)
    end = tl.max(position, 0) + 1
    for start in range(0, end, KEYS):
        at = start + tl.arange(0, KEYS)
        slot = tl.load(slot_at + at, mask=at < end, other=0).to(tl.int64)
        k_at = keys + slot[None, :] * key_slot + kv_head * key_head + key_dim[:, None]
        k = tl.load(k_at, mask=(at < end)[None, :] & (key_dim < KEY_DIM)[:, None], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * scale
        score = tl.where(at[None, :] <= position[:, None], score, float("-inf"))

        peak = tl.maximum(greatest, tl.max(score, 1))
        # Rows past the last query see nothing, and -inf minus -inf is no number.
        level = tl.where(peak == float("-inf"), 0.0, peak)
        weight = tl.exp2(score - level[:, None])
        fade = tl.exp2(greatest - level)
        v_at = values + slot[:, None] * value_slot + kv_head * value_head + value_dim[None, :]
        v = tl.load(v_at, mask=(at < end)[:, None] & (value_dim < VALUE_DIM)[None, :], other=0.0)
        mixed = mixed * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(weight, 1)
        greatest = peak

    result = mixed / tl.where(real, total, 1.0)[:, None]
    out_at = out + token[:, None] * out_token + head[:, None] * out_head + value_dim[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=real[:, None] & (value_dim < VALUE_DIM)[None, :])


def sparse_query_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: SparseQueries,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Launch ``sparse_query_attention`` for operands that were checked; there is a query."""
    _, heads, dim = query.shape
    _, kv_heads, value_dim = values.shape
    group = heads // kv_heads
    tiles = _tiles(max(dim, value_dim), query.dtype)
    _attend[(triton.cdiv(queries.most * group, tiles.rows), kv_heads, len(queries.rows))](
        query,
        keys,
        values,
        out,
        queries.positions,
        queries.bounds,
        queries.rows,
        queries.slots,
        scale * _LOG2_E,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        out.stride(0),
        out.stride(1),
        queries.slots.stride(0),
        GROUP=group,
        KEY_DIM=dim,
        VALUE_DIM=value_dim,
        KEY_DIMS=max(_NARROWEST, triton.next_power_of_2(dim)),
        VALUE_DIMS=max(_NARROWEST, triton.next_power_of_2(value_dim)),
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _tiles(widest: int, dtype: torch.dtype) -> _Tiles:
    """Tiles that leave room for a second program in a multiprocessor's shared memory where they can."""
    if dtype == torch.float32:
        return _Tiles(rows=16, keys=16 if widest > 64 else 32, warps=4, stages=1)
    if widest <= 128:
        return _Tiles(rows=64, keys=64, warps=4, stages=2)
    return _Tiles(rows=64, keys=32, warps=8, stages=2)
