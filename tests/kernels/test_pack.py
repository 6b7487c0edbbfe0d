"""Pages of a pool <-> blocks, byte by byte against the layout written down as a formula."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polarkv_sglang.kernels.layout import PagedPool
from polarkv_sglang.kernels.pack import pack_blocks, pack_reference, unpack_blocks
from tests.kernels.support import (
    POISON,
    examples,
    permutation,
    poisoned,
    random_bytes,
    too_slow_to_interpret,
)

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
]


class Shape(NamedTuple):
    """A pool: K and V, or for MLA one part, each of (heads, dim)."""

    parts: tuple[tuple[int, int], ...]
    layers: int
    page_size: int
    dtype: torch.dtype = torch.bfloat16
    gap: int = 0  # bytes between slots


class Memory:
    """A pool full of random bytes. ``raw`` are all its bytes, gaps too: per part and layer [slots, bytes]."""

    def __init__(self, shape: Shape, pages: int, device: torch.device, seed: int = 0) -> None:
        self.shape = shape
        slots = pages * shape.page_size
        self.raw: list[list[torch.Tensor]] = []
        parts = []
        for part, (heads, dim) in enumerate(shape.parts):
            width = heads * dim * shape.dtype.itemsize
            raw = [
                random_bytes(seed + 100 * part + layer, slots, width + shape.gap).to(device)
                for layer in range(shape.layers)
            ]
            self.raw.append(raw)
            parts.append([bytes_[:, :width].view(shape.dtype).unflatten(1, (heads, dim)) for bytes_ in raw])
        self.pool = PagedPool.of(parts, shape.page_size)

    def token(self, part: int, layer: int, slot: int) -> torch.Tensor:
        heads, dim = self.shape.parts[part]
        return self.raw[part][layer][slot, : heads * dim * self.shape.dtype.itemsize].cpu()

    def block(self, start: int) -> torch.Tensor:
        """The block of the page at slot ``start``: [K|V][layer][token][head][dim]."""
        return torch.cat(
            [
                self.token(part, layer, start + token)
                for part in range(len(self.shape.parts))
                for layer in range(self.shape.layers)
                for token in range(self.shape.page_size)
            ]
        )

    def layer_mask(self, start: int, end: int) -> torch.Tensor:
        """Which bytes of a block belong to layers [start, end)."""
        runs = []
        for heads, dim in self.shape.parts:
            size = self.shape.page_size * heads * dim * self.shape.dtype.itemsize
            runs += [torch.full((size,), start <= layer < end) for layer in range(self.shape.layers)]
        return torch.cat(runs)

    def bytes(self) -> torch.Tensor:
        return torch.stack([torch.stack(part) for part in self.raw]).cpu().clone()


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    part = (draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8, 24])))
    return Shape(
        parts=draw(st.sampled_from([(part,), (part, part)])),
        layers=draw(st.integers(1, 3)),
        page_size=draw(st.sampled_from([1, 3, 4])),
        dtype=draw(st.sampled_from(DTYPES)),
        gap=draw(st.sampled_from([0, 0, 16, 20])),
    )


@st.composite
def layer_ranges(draw: st.DrawFn) -> tuple[Shape, tuple[int, int]]:
    shape = draw(shapes())
    start = draw(st.integers(0, shape.layers))
    return shape, (start, draw(st.integers(start, shape.layers)))


SHAPE = Shape(parts=((2, 8), (2, 8)), layers=3, page_size=4)


@examples
@given(shapes(), st.integers(0, 3), st.sampled_from([0, 1, 16]))
def test_a_block_is_its_page_in_the_documented_layout(
    device: torch.device, shape: Shape, count: int, padding: int
) -> None:
    memory = Memory(shape, 6, device)
    size = memory.pool.block_bytes
    starts = permutation(1, 6)[:count] * shape.page_size
    room = poisoned(count, size + padding, dtype=torch.uint8, device=device)

    pack_blocks(memory.pool, starts.to(device), room[:, :size])

    for block, start in zip(room.cpu(), starts.tolist()):
        assert torch.equal(block[:size], memory.block(start))
        assert (block[size:] == POISON).all()


@examples
@given(layer_ranges())
def test_packing_a_range_of_layers_leaves_the_rest_of_the_block(
    device: torch.device, case: tuple[Shape, tuple[int, int]]
) -> None:
    shape, layers = case
    memory = Memory(shape, 4, device)
    blocks = poisoned(2, memory.pool.block_bytes, dtype=torch.uint8, device=device)

    pack_blocks(memory.pool, torch.tensor([2, 0], device=device) * shape.page_size, blocks, layers)

    inside = memory.layer_mask(*layers)
    for block, page in zip(blocks.cpu(), (2, 0)):
        assert torch.equal(block, torch.where(inside, memory.block(page * shape.page_size), POISON))


@examples
@given(layer_ranges(), st.integers(0, 3))
def test_unpacking_writes_its_pages_and_layers_and_nothing_else(
    device: torch.device, case: tuple[Shape, tuple[int, int]], count: int
) -> None:
    shape, layers = case
    source, target = Memory(shape, 5, device), Memory(shape, 5, device, seed=7)
    pages = permutation(2, 5)[:count]
    blocks = torch.stack([source.block(page * shape.page_size) for page in range(count)] or [torch.empty(0)])
    blocks = blocks.to(torch.uint8).view(count, source.pool.block_bytes)
    expected = target.bytes()
    for part, (heads, dim) in enumerate(shape.parts):
        width = heads * dim * shape.dtype.itemsize
        for i, page in enumerate(pages.tolist()):
            to, of = (slice(at * shape.page_size, (at + 1) * shape.page_size) for at in (page, i))
            expected[part, slice(*layers), to, :width] = source.bytes()[part, slice(*layers), of, :width]

    unpack_blocks(target.pool, (pages * shape.page_size).to(device), blocks.to(device), layers)

    assert torch.equal(target.bytes(), expected)


def test_layers_that_come_in_one_by_one_make_the_whole_page(device: torch.device) -> None:
    source, target = Memory(SHAPE, 2, device), Memory(SHAPE, 2, device, seed=7)
    starts = torch.tensor([4, 0], device=device)
    blocks = torch.empty(2, source.pool.block_bytes, dtype=torch.uint8, device=device)
    pack_blocks(source.pool, starts, blocks)
    for layer in range(SHAPE.layers):
        unpack_blocks(target.pool, starts, blocks, (layer, layer + 1))
    assert torch.equal(target.bytes(), source.bytes())


def test_a_pool_of_some_layers_has_blocks_of_these_layers_alone(device: torch.device) -> None:
    memory = Memory(SHAPE, 2, device)
    some = memory.pool.layer_range(1, 3)
    blocks = torch.empty(1, some.block_bytes, dtype=torch.uint8, device=device)
    pack_blocks(some, torch.tensor([4], device=device), blocks)
    assert torch.equal(blocks[0].cpu(), memory.block(4)[memory.layer_mask(1, 3)])


def test_k_and_v_may_differ_in_width(device: torch.device) -> None:
    memory = Memory(Shape(parts=((2, 24), (2, 16)), layers=2, page_size=3), 2, device)
    blocks = torch.empty(1, memory.pool.block_bytes, dtype=torch.uint8, device=device)
    pack_blocks(memory.pool, torch.tensor([3], device=device), blocks)
    assert torch.equal(blocks[0].cpu(), memory.block(3))


def test_pages_may_begin_anywhere(device: torch.device) -> None:
    memory = Memory(SHAPE, 3, device)
    blocks = torch.empty(2, memory.pool.block_bytes, dtype=torch.uint8, device=device)
    pack_blocks(memory.pool, torch.tensor([7, 1], dtype=torch.int32, device=device), blocks)
    assert torch.equal(blocks.cpu(), torch.stack([memory.block(7), memory.block(1)]))


def test_memory_that_is_aligned_to_nothing(device: torch.device) -> None:
    memory = Memory(SHAPE, 2, device)
    size = memory.pool.block_bytes
    room = poisoned(2 * size + 3, dtype=torch.uint8, device=device)
    pack_blocks(memory.pool, torch.tensor([4, 0], device=device), room[1 : 2 * size + 1].view(2, size))
    assert torch.equal(room[1 : 2 * size + 1].cpu(), torch.cat([memory.block(4), memory.block(0)]))
    assert [room[0].item(), room[-2].item(), room[-1].item()] == [POISON] * 3


@too_slow_to_interpret
@pytest.mark.parametrize(
    "shape",
    [
        Shape(parts=((8, 128), (8, 128)), layers=46, page_size=64),  # GLM-4.5-Air
        Shape(parts=((1, 576),), layers=61, page_size=64),  # DeepSeek-V3
        Shape(parts=((3, 64), (3, 64)), layers=30, page_size=16),  # SmolLM2-135M
    ],
    ids=["glm", "deepseek", "smollm2"],
)
def test_blocks_of_real_models_come_back(device: torch.device, shape: Shape) -> None:
    source, target = Memory(shape, 3, device), Memory(shape, 3, device, seed=7)
    starts = torch.tensor([2, 0, 1], device=device) * shape.page_size
    blocks = torch.empty(3, source.pool.block_bytes, dtype=torch.uint8, device=device)
    pack_blocks(source.pool, starts, blocks)
    unpack_blocks(target.pool, starts, blocks)
    assert torch.equal(target.bytes(), source.bytes())


@pytest.mark.parametrize("start", [-1, 5])
def test_a_page_that_leaves_the_pool_is_refused_on_a_cpu(start: int) -> None:
    memory = Memory(SHAPE, 2, torch.device("cpu"))
    blocks = poisoned(2, memory.pool.block_bytes, dtype=torch.uint8, device=torch.device("cpu"))
    with pytest.raises(IndexError, match="slots 0 to 7"):
        pack_reference(memory.pool, torch.tensor([0, start]), blocks, memory.pool.checked_range(None))
    assert (blocks == POISON).all()


def test_operands_that_do_not_fit_are_refused_and_nothing_is_written(device: torch.device) -> None:
    memory = Memory(SHAPE, 2, device)
    pool, size = memory.pool, memory.pool.block_bytes
    before = memory.bytes()
    starts = torch.zeros(1, dtype=torch.int64, device=device)
    blocks = torch.zeros(1, size, dtype=torch.uint8, device=device)
    for call in (pack_blocks, unpack_blocks):
        with pytest.raises(ValueError, match="layers \\[1, 4\\)"):
            call(pool, starts, blocks, (1, 4))
        with pytest.raises(ValueError, match="layers \\[2, 1\\)"):
            call(pool, starts, blocks, (2, 1))
        with pytest.raises(ValueError, match=f"uint8 \\[blocks, {size}\\]"):
            call(pool, starts, blocks[:, 1:])
        with pytest.raises(ValueError, match="int8"):
            call(pool, starts, blocks.view(torch.int8))
        with pytest.raises(ValueError, match="starts is"):
            call(pool, starts.float(), blocks)
        with pytest.raises(ValueError, match="vector of 1"):
            call(pool, starts.repeat(2), blocks)
        with pytest.raises(ValueError, match="blocks is on meta"):
            call(pool, starts, blocks.to("meta"))
    assert torch.equal(memory.bytes(), before)
    assert not blocks.any()
