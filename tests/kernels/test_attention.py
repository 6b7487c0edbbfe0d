"""Attention of sparse queries against the formula, in double precision."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polarkv_sglang.kernels.attention import SparseQueries, sparse_query_attention
from tests.kernels.support import (
    INTERPRETED,
    bits,
    examples,
    permutation,
    poisoned,
    random_numbers,
    too_slow_to_interpret,
)

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
if not INTERPRETED:  # the interpreter's tl.dot multiplies the bits of bf16 as integers
    TOLERANCE[torch.bfloat16] = 1.5e-2
NOWHERE = 1 << 30  # what lies past a request's tokens in the table of slots


class Shape(NamedTuple):
    kv_heads: int
    group: int
    dim: int
    value_dim: int
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        return self.dim**-0.5


class Batch:
    """Requests of so many tokens on scattered slots, and the positions that ask, request by request."""

    def __init__(
        self, shape: Shape, lengths: list[int], asking: list[list[int]], device: torch.device, seed: int = 0
    ) -> None:
        self.shape, self.asking = shape, asking
        slots = sum(lengths) + 3
        self.keys = random_numbers(seed, (slots, shape.kv_heads, shape.dim), shape.dtype, device)
        self.values = random_numbers(seed + 1, (slots, shape.kv_heads, shape.value_dim), shape.dtype, device)
        count = sum(map(len, asking))
        self.query = random_numbers(
            seed + 2, (count, shape.kv_heads * shape.group, shape.dim), shape.dtype, device
        )

        order = permutation(seed, slots).tolist()
        rows = permutation(seed, len(lengths) + 1)[: len(lengths)]
        table = torch.full((len(lengths) + 1, max(lengths, default=0) + 2), NOWHERE, dtype=torch.int32)
        self.slots = []  # per request
        for row, length in zip(rows.tolist(), lengths):
            own, order = order[:length], order[length:]
            table[row, :length] = torch.tensor(own)
            self.slots.append(own)
        bounds = torch.tensor([0, *map(len, asking)]).cumsum(0)
        self.queries = SparseQueries(
            positions=torch.tensor([at for own in asking for at in own], dtype=torch.int64, device=device),
            bounds=bounds.to(torch.int32).to(device),
            rows=rows.to(device),
            slots=table.to(device),
            most=max(map(len, asking), default=0),
        )

    def attend(self, out: torch.Tensor | None = None) -> torch.Tensor:
        return sparse_query_attention(self.query, self.keys, self.values, self.queries, self.shape.scale, out)

    def formula(self) -> torch.Tensor:
        """softmax(scale q k) v over the keys up to each query's position, request by request."""
        query, keys, values = (tensor.cpu().double() for tensor in (self.query, self.keys, self.values))
        out = [query.new_empty(0, query.shape[1], self.shape.value_dim)]
        for own, slots, asking in zip(query.split([*map(len, self.asking)]), self.slots, self.asking):
            grouped = own.unflatten(1, (self.shape.kv_heads, self.shape.group))
            scores = self.shape.scale * torch.einsum("qngd,knd->qngk", grouped, keys[slots])
            unseen = torch.arange(len(slots)) > torch.tensor(asking, dtype=torch.int64)[:, None]
            weights = scores.masked_fill(unseen[:, None, None], -torch.inf).softmax(-1)
            out.append(torch.einsum("qngk,knd->qngd", weights, values[slots]).flatten(1, 2))
        return torch.cat(out)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Shape, list[int], list[list[int]]]:
    dim = draw(st.sampled_from([8, 24, 64]))
    shape = Shape(
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 3, 4])),
        dim=dim,
        value_dim=draw(st.sampled_from([dim, 16, 40])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
    )
    lengths = draw(st.lists(st.integers(1, 90), max_size=3))
    asking = [draw(st.lists(st.integers(0, length - 1), max_size=20)) for length in lengths]
    return shape, lengths, asking


@examples
@given(batches())
def test_each_query_sees_the_keys_up_to_its_position(
    device: torch.device, case: tuple[Shape, list[int], list[list[int]]]
) -> None:
    batch = Batch(*case, device)
    result = batch.attend()
    assert result.dtype == batch.shape.dtype
    torch.testing.assert_close(
        result.cpu().double(), batch.formula(), atol=TOLERANCE[batch.shape.dtype], rtol=0
    )


def test_no_query_sees_a_later_token(device: torch.device) -> None:
    """A prefill kernel aligns its mask to the last token: there the fifth query would see all of them."""
    shape = Shape(kv_heads=1, group=2, dim=16, value_dim=16)
    batch = Batch(shape, [40], [[3, 11, 12, 20, 30]], device)
    before = batch.attend()
    later = torch.tensor(batch.slots[0][13:], device=device)
    batch.keys[later] = 1e4
    batch.values[later] = -1e4
    after = batch.attend()
    assert torch.equal(bits(after[:3]), bits(before[:3]))
    assert not (after[3:] == before[3:]).any()


def test_a_query_sees_itself_and_everything_before(device: torch.device) -> None:
    shape = Shape(kv_heads=1, group=1, dim=16, value_dim=16)
    batch = Batch(shape, [40], [[0, 39, 39]], device)
    batch.keys.zero_()
    result = batch.attend().cpu()
    values = batch.values.cpu()[batch.slots[0], 0]
    torch.testing.assert_close(result[0, 0], values[0])
    torch.testing.assert_close(result[1, 0], values.mean(0))
    assert torch.equal(result[2], result[1])


def test_requests_do_not_see_each_other(device: torch.device) -> None:
    shape = Shape(kv_heads=2, group=2, dim=16, value_dim=16)
    together = Batch(shape, [30, 1, 50], [[29, 4], [], [0, 49]], device)
    before = together.attend()
    own = torch.tensor(together.slots[2], device=device)
    together.keys[own], together.values[own] = 7.0, 7.0
    after = together.attend()
    assert torch.equal(bits(after[:2]), bits(before[:2]))
    assert not (after[2:] == before[2:]).any()


def test_the_result_goes_where_it_should_and_nowhere_else(device: torch.device) -> None:
    shape = Shape(kv_heads=2, group=3, dim=24, value_dim=20)
    batch = Batch(shape, [30], [[29, 4, 17]], device)
    room = poisoned(5, 8, 24, dtype=torch.float32, device=device)
    expected = room.clone()
    expected[1:4, 1:7, 2:22] = batch.attend()
    out = room[1:4, 1:7, 2:22]
    assert batch.attend(out) is out
    assert torch.equal(bits(room), bits(expected))


def test_operands_may_be_views(device: torch.device) -> None:
    """Query out of a projection that also holds K and V; keys and values out of one fused pool."""
    shape = Shape(kv_heads=2, group=2, dim=16, value_dim=16)
    batch = Batch(shape, [30], [[29, 4, 17]], device)
    expected = batch.attend()
    projection = torch.zeros(3, 8, 16, device=device)
    projection[:, 1:5] = batch.query
    fused = torch.stack([batch.keys, batch.values], dim=1)
    batch.query, batch.keys, batch.values = projection[:, 1:5], fused[:, 0], fused[:, 1]
    assert torch.equal(bits(batch.attend()), bits(expected))


@pytest.mark.parametrize("dim", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_head_dims_of_real_models(device: torch.device, dim: int, dtype: torch.dtype) -> None:
    shape = Shape(kv_heads=1, group=2, dim=dim, value_dim=128 if dim == 192 else dim, dtype=dtype)
    batch = Batch(shape, [37], [[36, 0, 21]], device)
    torch.testing.assert_close(batch.attend().cpu().double(), batch.formula(), atol=TOLERANCE[dtype], rtol=0)


@too_slow_to_interpret
def test_many_queries_of_long_requests(device: torch.device) -> None:
    shape = Shape(kv_heads=1, group=12, dim=64, value_dim=64)
    asking = [permutation(length, length)[: length // 2].tolist() for length in (300, 1200)]
    batch = Batch(shape, [300, 1200], asking, device)
    torch.testing.assert_close(batch.attend().cpu().double(), batch.formula(), atol=2e-6, rtol=0)


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    shape = Shape(kv_heads=1, group=1, dim=16, value_dim=16)
    batch = Batch(shape, [70], [[69, 5]], device)
    batch.query *= 1e3
    torch.testing.assert_close(batch.attend().cpu().double(), batch.formula(), atol=1e-3, rtol=0)


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    batch = Batch(Shape(kv_heads=2, group=2, dim=16, value_dim=16), [30], [[29, 4, 17]], device)
    good = batch.query, batch.keys, batch.values, batch.queries

    def refused(message: str, **wrong: object) -> None:
        operands = dict(zip(("query", "keys", "values", "queries"), good)) | wrong
        with pytest.raises(ValueError, match=message):
            sparse_query_attention(**operands, scale=1.0)  # type: ignore[arg-type]

    refused("multiple of KV heads", query=batch.query[:, :3])
    refused("multiple of KV heads", keys=batch.keys[:, :1])
    refused("one of fp32, fp16, bf16", keys=batch.keys.half())
    wide = torch.zeros(3, 4, 257, device=device)
    refused("at most 256", query=wide, keys=wide[:, :2])
    refused("values is on meta", values=batch.values.to("meta"))
    refused("last dimension contiguous", query=batch.query.transpose(1, 2).contiguous().transpose(1, 2))
    refused("positions is", queries=batch.queries._replace(positions=batch.queries.positions[:2]))
    refused("bounds is", queries=batch.queries._replace(bounds=batch.queries.bounds[:1]))
    refused("slots are", queries=batch.queries._replace(slots=batch.queries.slots.float()))
