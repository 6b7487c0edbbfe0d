"""Checksums of blocks against the xxhash package, by their definition."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from polarkv_sglang.kernels.checksum import (
    checksum_blocks,
    checksums_of_digests,
    chunk_digests,
    chunk_digests_reference,
)
from polarkv_sglang.kernels.dispatch import uses_triton
from tests.kernels.support import INTERPRETED, examples, poisoned, random_bytes, too_slow_to_interpret

# Where XXH3 takes another path, and around the sizes of its stripes, its blocks and our chunks.
EDGES = [
    1,
    2,
    3,
    4,
    5,
    8,
    9,
    16,
    17,
    32,
    33,
    64,
    65,
    96,
    97,
    128,
    129,
    143,
    144,
    145,
    239,
    240,
    241,
    255,
    256,
]
EDGES += [257, 320, 1024, 1025, 1087, 1088, 1089, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193, 20_000]


def definition(block: bytes) -> int:
    digests = [xxhash.xxh3_64_intdigest(block[at : at + 4096]) for at in range(0, len(block), 4096)]
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(digests)}Q", *digests))


@pytest.mark.parametrize("size", EDGES)
def test_every_path_of_the_hash(device: torch.device, size: int) -> None:
    block = random_bytes(size, 1, size)
    assert checksum_blocks(block.to(device)).tolist() == [definition(block.numpy().tobytes())]


@examples
@given(
    count=st.integers(0, 3),
    size=st.integers(1, 20_000),
    offset=st.sampled_from([0, 0, 8, 3]),
    apart=st.sampled_from([0, 0, 8, 5]),
    seed=st.integers(0, 1 << 30),
)
def test_checksums_are_their_definition(
    device: torch.device, count: int, size: int, offset: int, apart: int, seed: int
) -> None:
    """Rows at any distance, at any address."""
    room = random_bytes(seed, offset + count * (size + apart)).to(device)
    blocks = room[offset:].view(count, size + apart)[:, :size]
    result = checksum_blocks(blocks)
    assert result.dtype == np.uint64
    assert result.tolist() == [definition(block.numpy().tobytes()) for block in blocks.cpu()]


@pytest.mark.parametrize("size", [100, 4096, 4097, 20_000])
def test_all_digests_are_written_and_nothing_beside_them(device: torch.device, size: int) -> None:
    blocks, chunks = random_bytes(size, 3, size).to(device), -(-size // 4096)
    room = poisoned(5, chunks + 2, dtype=torch.int64, device=device)
    expected = room.clone()
    expected[1:4, 1:-1] = chunk_digests(blocks)
    if uses_triton(blocks):
        from polarkv_sglang.kernels.gpu import checksum as gpu

        gpu.chunk_digests(blocks, room[1:4, 1:-1])
    else:
        chunk_digests_reference(blocks, room[1:4, 1:-1])
    assert torch.equal(room, expected)


# All sizes to the end of the first chunk of 4,096, and from where the last of several begins.
SIZES = [*range(1, 4200), *(chunks * 4096 + size for chunks in (2, 3, 4) for size in range(-10, 300))]


@too_slow_to_interpret
@pytest.mark.parametrize(
    "sizes", [SIZES, pytest.param(range(1, 20_001), marks=pytest.mark.slow)], ids=["some", "to 20,000"]
)
def test_every_size(device: torch.device, sizes: Sequence[int]) -> None:
    data = random_bytes(0, 20_000)
    on_device, exact = data.to(device), data.numpy().tobytes()
    for size in sizes:
        assert checksum_blocks(on_device[None, :size])[0] == definition(exact[:size]), size


def test_whole_blocks(device: torch.device) -> None:
    """A page of GLM-4.5 of one rank of eight, or two of its layers where Triton is interpreted."""
    size = (2 if INTERPRETED else 92) * 2 * 64 * 128 * 2
    blocks = random_bytes(1, 3, size)
    expected = [definition(block.numpy().tobytes()) for block in blocks]
    assert checksum_blocks(blocks.to(device)).tolist() == expected


@examples
@given(size=st.integers(1, 9000), data=st.data())
def test_one_flipped_bit_changes_the_checksum(device: torch.device, size: int, data: st.DataObject) -> None:
    block = random_bytes(size, 1, size)
    before = checksum_blocks(block.to(device))
    block[0, data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum_blocks(block.to(device)) != before


def test_digests_stay_on_the_device_until_they_are_wanted(device: torch.device) -> None:
    blocks = random_bytes(2, 2, 4096 + 100)
    digests = chunk_digests(blocks.to(device))
    assert digests.device.type == device.type
    expected = [[xxhash.xxh3_64_intdigest(part.numpy()) for part in block.split(4096)] for block in blocks]
    assert digests.cpu().numpy().view(np.uint64).tolist() == expected
    assert checksums_of_digests(digests).tolist() == checksum_blocks(blocks.to(device)).tolist()


def test_an_empty_block_has_a_checksum(device: torch.device) -> None:
    assert (
        checksum_blocks(torch.empty(2, 0, dtype=torch.uint8, device=device)).tolist() == [definition(b"")] * 2
    )


def test_what_is_not_rows_of_bytes_is_refused(device: torch.device) -> None:
    blocks = torch.zeros(2, 64, dtype=torch.uint8, device=device)
    for wrong in (blocks.view(torch.int8), blocks[0], blocks[:, ::2], blocks.t()):
        with pytest.raises(ValueError, match="uint8 \\[blocks, bytes\\]"):
            checksum_blocks(wrong)
