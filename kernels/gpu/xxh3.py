"""XXH3_64 in Triton, without a seed, written after the specification in the xxHash project's doc folder.

Functions read the constants from ``table`` (see ``constants``): XXH3 takes 64-bit words from its secret at
any byte offset, so the table has the word at each of them.
"""

from __future__ import annotations

import functools
import struct
from typing import Final

import torch
import triton
import triton.language as tl

_SECRET: Final = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIME32_1: Final = tl.constexpr(0x9E3779B1)
_PRIME32_2: Final = 0x85EBCA77
_PRIME32_3: Final = 0xC2B2AE3D
_PRIME64_1: Final = tl.constexpr(0x9E3779B185EBCA87)
_PRIME64_2: Final = tl.constexpr(0xC2B2AE3D27D4EB4F)
_PRIME64_3: Final = tl.constexpr(0x165667B19E3779F9)
_PRIME64_4: Final = 0x85EBCA77C2B2AE63
_PRIME64_5: Final = 0x27D4EB2F165667C5
_PRIME_MX1: Final = tl.constexpr(0x165667919E3779F9)
_PRIME_MX2: Final = tl.constexpr(0x9FB21C651E98DF25)

# Accumulators 0 to 7 as (even ones, odd ones): each adds its neighbour's data, so the two halves swap.
_INITIAL: Final = (
    *(_PRIME32_3, _PRIME64_2.value, _PRIME64_4, _PRIME64_5),
    *(_PRIME64_1.value, _PRIME64_3.value, _PRIME32_2, _PRIME32_1.value),
)
_WORDS: Final = len(_SECRET) - 7
_EVEN: Final = tl.constexpr(_WORDS)
_ODD: Final = tl.constexpr(_WORDS + 4)


@functools.cache
def constants(device: torch.device) -> torch.Tensor:
    """The table that the functions take: int64, the secret's word at each byte offset, then accumulators."""
    words = [struct.unpack_from("<Q", _SECRET, offset)[0] for offset in range(_WORDS)]
    table = struct.pack(f"<{_WORDS + 8}Q", *words, *_INITIAL)
    return torch.frombuffer(bytearray(table), dtype=torch.int64).to(device)


@triton.jit
def constant(table, offset):
    """The secret's word at byte ``offset``, or an initial accumulator."""
    return tl.load(table + offset).to(tl.uint64, bitcast=True)


@triton.jit
def read(at, BYTES: tl.constexpr):
    """The little-endian number of ``BYTES`` bytes at pointer ``at``, of any alignment."""
    word = tl.load(at).to(tl.uint64)
    for i in tl.static_range(1, BYTES):
        word |= tl.load(at + i).to(tl.uint64) << (8 * i)
    return word


@triton.jit
def avalanche(h):
    h ^= h >> 37
    h *= _PRIME_MX1
    return h ^ (h >> 32)


@triton.jit
def _fold(a, b):
    return (a * b) ^ tl.umulhi(a, b)


@triton.jit
def _mix16(at, table, offset):
    low = read(at, 8) ^ constant(table, offset)
    high = read(at + 8, 8) ^ constant(table, offset + 8)
    return _fold(low, high)


@triton.jit
def _swap_bytes(x):
    x = ((x & 0x00FF00FF00FF00FF) << 8) | ((x >> 8) & 0x00FF00FF00FF00FF)
    x = ((x & 0x0000FFFF0000FFFF) << 16) | ((x >> 16) & 0x0000FFFF0000FFFF)
    return (x << 32) | (x >> 32)


@triton.jit
def _of_1_to_3(at, length, table):
    middle = tl.load(at + length // 2).to(tl.uint64)
    combined = (read(at, 1) << 16) | (middle << 24) | read(at + length - 1, 1) | (length.to(tl.uint64) << 8)
    word = constant(table, 0)
    h = combined ^ ((word ^ (word >> 32)) & 0xFFFFFFFF)
    h ^= h >> 33
    h *= _PRIME64_2
    h ^= h >> 29
    h *= _PRIME64_3
    return h ^ (h >> 32)


@triton.jit
def _of_4_to_8(at, length, table):
    h = (read(at + length - 4, 4) + (read(at, 4) << 32)) ^ constant(table, 8) ^ constant(table, 16)
    h ^= ((h << 49) | (h >> 15)) ^ ((h << 24) | (h >> 40))
    h *= _PRIME_MX2
    h ^= (h >> 35) + length.to(tl.uint64)
    h *= _PRIME_MX2
    return h ^ (h >> 28)


@triton.jit
def _of_9_to_16(at, length, table):
    low = read(at, 8) ^ constant(table, 24) ^ constant(table, 32)
    high = read(at + length - 8, 8) ^ constant(table, 40) ^ constant(table, 48)
    return avalanche(length.to(tl.uint64) + _swap_bytes(low) + high + _fold(low, high))


@triton.jit
def _of_17_to_128(at, length, table):
    h = length.to(tl.uint64) * _PRIME64_1
    # From both ends inwards, 16 bytes each, until they meet.
    for i in range(0, (length + 31) // 32):
        h += _mix16(at + 16 * i, table, 32 * i) + _mix16(at + length - 16 * (i + 1), table, 32 * i + 16)
    return avalanche(h)


@triton.jit
def _of_129_to_240(at, length, table):
    h = length.to(tl.uint64) * _PRIME64_1
    for i in range(0, 8):
        h += _mix16(at + 16 * i, table, 16 * i)
    h = avalanche(h)
    for i in range(8, length // 16):
        h += _mix16(at + 16 * i, table, 16 * (i - 8) + 3)
    return avalanche(h + _mix16(at + length - 16, table, 136 - 17))


@triton.jit
def of_at_most_240(at, length, table):
    """XXH3_64 of the ``length`` (1 to 240, a scalar) bytes at ``at``."""
    if length <= 3:
        h = _of_1_to_3(at, length, table)
    elif length <= 8:
        h = _of_4_to_8(at, length, table)
    elif length <= 16:
        h = _of_9_to_16(at, length, table)
    elif length <= 128:
        h = _of_17_to_128(at, length, table)
    else:
        h = _of_129_to_240(at, length, table)
    return h


# Longer inputs: stripes of 64 bytes, eight words, add to eight accumulators; after every 16 stripes these are
# scrambled. Sums do not depend on order, so the 16 stripes are summed at once. Words and keys are
# [inputs, 16, 8]; accumulators are [inputs, 4], even and odd ones apart.


@triton.jit
def accumulate(even, odd, words, keys, INPUTS: tl.constexpr):
    """The accumulators after 16 stripes; word and key 0 for a stripe that is not there add nothing."""
    keyed = words ^ keys
    products = tl.sum((keyed & 0xFFFFFFFF) * (keyed >> 32), 1)
    product_even, product_odd = tl.split(tl.reshape(products, [INPUTS, 4, 2]))
    word_even, word_odd = tl.split(tl.reshape(tl.sum(words, 1), [INPUTS, 4, 2]))
    return even + product_even + word_odd, odd + product_odd + word_even


@triton.jit
def scramble(even, odd, table):
    offset = 128 + 16 * tl.arange(0, 4)[None, :]
    even = (even ^ (even >> 47) ^ constant(table, offset)) * _PRIME32_1
    odd = (odd ^ (odd >> 47) ^ constant(table, offset + 8)) * _PRIME32_1
    return even, odd


@triton.jit
def initial(table, INPUTS: tl.constexpr):
    lane = tl.zeros([INPUTS, 1], tl.int32) + tl.arange(0, 4)[None, :]
    return constant(table, _EVEN + lane), constant(table, _ODD + lane)


@triton.jit
def merge(even, odd, length, table):
    """The hashes [inputs] of inputs of ``length`` bytes, a scalar, from their accumulators."""
    offset = 11 + 16 * tl.arange(0, 4)[None, :]
    folded = _fold(even ^ constant(table, offset), odd ^ constant(table, offset + 8))
    return avalanche(tl.sum(folded, 1) + length.to(tl.uint64) * _PRIME64_1)
