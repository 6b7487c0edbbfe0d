"""Attention of chosen tokens, wherever they stand, over their requests' paged KV.

Causal masks of ordinary prefill kernels assume that queries are the last tokens of a request. For a sparse
choice they let a query see the tokens after it, which is worse than recomputing nothing; here the mask is by
position.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from polarkv_sglang.kernels.dispatch import require_device, require_rows, require_vector, uses_triton
from polarkv_sglang.kernels.rows import take_rows

_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
# Wider heads would not fit a GPU's shared memory with the tile sizes in use.
_MAX_HEAD_DIM: Final = 256
# Queries per call on a CPU: bounds the mask, and how many keys a query meets that it must not see.
_CPU_QUERIES: Final = 256


class SparseQueries(NamedTuple):
    """Which tokens of which requests ask. The same for all layers of a forward pass."""

    positions: torch.Tensor  # int32 or int64 [queries]: place in its request; any order, ascending is fastest
    bounds: torch.Tensor  # int32 or int64 [requests + 1]: request r has queries [bounds[r], bounds[r + 1])
    rows: torch.Tensor  # int32 or int64 [requests]: the request's row in ``slots``
    slots: torch.Tensor  # int32 or int64 [rows, context]: pool slot of each position (SGLang's req_to_token)
    most: int  # queries of the request that has most; with fewer a GPU would leave queries out


def sparse_query_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: SparseQueries,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each query at position p over the keys at positions 0 to p of its own request.

    ``query`` is [queries, heads, dim]; ``keys`` [slots, KV heads, dim] and ``values`` [slots, KV heads, value
    dim] are one layer of the pool; heads are a multiple of KV heads (GQA: consecutive heads share one). All
    are fp32, fp16 or bf16 alike, dims at most 256. Scores are multiplied by ``scale``. Sums are in fp32.
    Returns ``out``, [queries, heads, value dim], made here if None.
    Raises ValueError for operands that do not fit each other.
    """
    if out is None:
        out = query.new_empty(*query.shape[:2], values.shape[2])
    _check(query, keys, values, queries, out)
    if len(query) == 0:
        return out
    if uses_triton(query):
        from polarkv_sglang.kernels.gpu import attention as gpu

        gpu.sparse_query_attention(query, keys, values, queries, scale, out)
    else:
        sparse_query_attention_reference(query, keys, values, queries, scale, out)
    return out


def sparse_query_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: SparseQueries,
    scale: float,
    out: torch.Tensor,
) -> None:
    """``sparse_query_attention`` in PyTorch, request by request."""
    grouped = query.shape[1] > keys.shape[1]
    missing = keys.shape[2] - values.shape[2]
    bounds = queries.bounds.tolist()
    for row, first, last in zip(queries.rows.tolist(), bounds, bounds[1:]):
        if first == last:
            continue
        total = int(queries.positions[first:last].max()) + 1
        slots = queries.slots[row, :total]
        # PyTorch's flash kernel wants keys and values of one width.
        own_keys = pad(take_rows(keys, slots), (0, max(0, -missing))).movedim(0, 1)
        own_values = pad(take_rows(values, slots), (0, max(0, missing))).movedim(0, 1)
        for start in range(first, last, _CPU_QUERIES):
            end = min(start + _CPU_QUERIES, last)
            positions = queries.positions[start:end, None]
            visible = int(positions.max()) + 1
            hidden = torch.arange(visible, device=query.device) > positions
            # As it is added to scores: of a bool mask the same is made, more slowly.
            mask = query.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            result = scaled_dot_product_attention(
                pad(query[start:end], (0, max(0, -missing))).movedim(0, 1)[None],
                own_keys[None, :, :visible],
                own_values[None, :, :visible],
                attn_mask=mask,
                scale=scale,
                enable_gqa=grouped,
            )
            out[start:end] = result[0].movedim(1, 0)[..., : values.shape[2]]


def _check(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, queries: SparseQueries, out: torch.Tensor
) -> None:
    require_rows(query=query, keys=keys, values=values, out=out)
    require_vector(len(query), positions=queries.positions)
    require_vector(len(queries.rows), rows=queries.rows)
    require_vector(len(queries.rows) + 1, bounds=queries.bounds)
    require_device(
        query.device,
        keys=keys,
        values=values,
        out=out,
        positions=queries.positions,
        bounds=queries.bounds,
        rows=queries.rows,
        slots=queries.slots,
    )
    if queries.slots.dim() != 2 or queries.slots.stride(1) != 1 or queries.slots.is_floating_point():
        raise ValueError(
            f"slots are {queries.slots.dtype} {list(queries.slots.shape)}; integers [rows, context] with "
            "contiguous rows are needed"
        )
    dtypes = [tensor.dtype for tensor in (query, keys, values, out)]
    if len(set(dtypes)) != 1 or dtypes[0] not in _DTYPES:
        raise ValueError(f"query, keys, values, out are {dtypes}; one of fp32, fp16, bf16 is needed for all")
    _, heads, dim = query.shape
    _, kv_heads, value_dim = values.shape
    if keys.shape[1:] != (kv_heads, dim) or heads % kv_heads or out.shape != (len(query), heads, value_dim):
        raise ValueError(
            f"query is {list(query.shape)}, keys {list(keys.shape)}, values {list(values.shape)}, "
            f"out {list(out.shape)}; [queries, heads, dim], [slots, KV heads, dim], [slots, KV heads, value "
            "dim], [queries, heads, value dim] with heads a multiple of KV heads are needed"
        )
    if max(dim, value_dim) > _MAX_HEAD_DIM:
        raise ValueError(f"head dims are {dim} and {value_dim}; at most {_MAX_HEAD_DIM} are supported")
