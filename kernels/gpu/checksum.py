"""Digests of chunks in Triton: whole chunks many to a program, odd ones one to a program."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from polarkv_sglang.kernels.checksum import CHUNK_BYTES
from polarkv_sglang.kernels.gpu import xxh3
from polarkv_sglang.kernels.layout import alignment

_CHUNKS: Final = 8  # per program of the fast kernel; at once a thread then holds 8 words of 1024
_WORD_BYTES: Final = 8
_CHUNK: Final = tl.constexpr(CHUNK_BYTES)
_CHUNK_WORDS: Final = tl.constexpr(CHUNK_BYTES // _WORD_BYTES)


@triton.jit
def _digest_whole(blocks, block_words, digests, digests_row, table, count, chunks, CHUNKS: tl.constexpr):
    item = tl.program_id(0).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)
    known = item < count
    block = item // chunks
    chunk = item % chunks
    first = (
        blocks.to(tl.pointer_type(tl.uint64)) + (block * block_words + chunk * _CHUNK_WORDS)[:, None, None]
    )

    stripe = tl.arange(0, 16)[None, :, None]
    lane = tl.arange(0, 8)[None, None, :]
    even, odd = xxh3.initial(table, CHUNKS)
    for part in tl.static_range(4):
        words = tl.load(first + part * 128 + stripe * 8 + lane, mask=known[:, None, None], other=0)
        offset = 8 * (stripe + lane)
        if part == 3:
            # The last stripe of an input has a key of its own.
            offset = tl.where(stripe == 15, 121 + 8 * lane, offset)
        even, odd = xxh3.accumulate(even, odd, words, xxh3.constant(table, offset), CHUNKS)
        if part < 3:
            even, odd = xxh3.scramble(even, odd, table)
    digest = xxh3.merge(even, odd, tl.full([], _CHUNK, tl.int32), table)
    tl.store(digests + block * digests_row + chunk, digest.to(tl.int64, bitcast=True), mask=known)


@triton.jit
def _digest_any(blocks, block_bytes, digests, digests_row, table, first_chunk, size):
    block = tl.program_id(0).to(tl.int64)
    chunk = (first_chunk + tl.program_id(1)).to(tl.int64)
    length = tl.minimum(_CHUNK, size - chunk * _CHUNK).to(tl.int32)
    at = blocks + block * block_bytes + chunk * _CHUNK
    if length <= 240:
        digest = xxh3.of_at_most_240(at, length, table)
    else:
        stripe = tl.arange(0, 16)[None, :, None]
        lane = tl.arange(0, 8)[None, None, :]
        even, odd = xxh3.initial(table, 1)
        full = (length - 1) // 1024
        for part in range(0, full):
            words = xxh3.read(at + part * 1024 + stripe * 64 + lane * 8, 8)
            keys = xxh3.constant(table, 8 * (stripe + lane))
            even, odd = xxh3.accumulate(even, odd, words, keys, 1)
            even, odd = xxh3.scramble(even, odd, table)
        # Less than 1024 bytes more, and then the last 64 once more as a stripe with a key of its own.
        more = (length - 1 - full * 1024) // 64
        there = stripe <= more
        start = tl.where(stripe < more, full * 1024 + stripe * 64, length - 64)
        offset = tl.where(stripe < more, 8 * stripe, 121) + 8 * lane
        words = tl.where(there, xxh3.read(at + start + lane * 8, 8), 0)
        keys = tl.where(there, xxh3.constant(table, offset), 0)
        even, odd = xxh3.accumulate(even, odd, words, keys, 1)
        digest = tl.sum(xxh3.merge(even, odd, length, table), 0)
    tl.store(digests + block * digests_row + chunk, digest.to(tl.int64, bitcast=True))


def chunk_digests(blocks: torch.Tensor, digests: torch.Tensor) -> None:
    """Launch ``chunk_digests``; there is a chunk."""
    count, size = blocks.shape
    table = xxh3.constants(blocks.device)
    whole = size // CHUNK_BYTES if alignment(blocks.data_ptr(), blocks.stride(0)) >= _WORD_BYTES else 0
    if whole:
        _digest_whole[(triton.cdiv(count * whole, _CHUNKS),)](
            blocks,
            blocks.stride(0) // _WORD_BYTES,
            digests,
            digests.stride(0),
            table,
            count * whole,
            whole,
            CHUNKS=_CHUNKS,
        )
    if whole < digests.shape[1]:
        _digest_any[(count, digests.shape[1] - whole)](
            blocks, blocks.stride(0), digests, digests.stride(0), table, whole, size
        )
