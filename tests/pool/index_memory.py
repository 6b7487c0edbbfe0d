"""Fills an index with blocks of one page each and prints how much memory each took, as one JSON line.

    python -m tests.pool.index_memory BLOCKS CHAIN_BLOCKS [TURNOVERS]

Blocks are in chains of CHAIN_BLOCKS. The full index is then written anew TURNOVERS times. Also printed: the
microseconds that requests of 128 keys take, as a median.
"""

from __future__ import annotations

import gc
import hashlib
import json
import random
import sys
import time
from statistics import median

import psutil

from polarkv_sglang.identity import KEY_BYTES, NO_PARENT
from polarkv_sglang.pool.index import Index
from polarkv_sglang.pool.slab import PAGE_BYTES, Slab
from polarkv_sglang.transport.columns import pack_u64

BATCH = 128
SEGMENT_BYTES = 64 << 20


def key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "big"), digest_size=KEY_BYTES).digest()


def batch(first: int, chain_blocks: int) -> tuple[bytes, bytes]:
    """Keys and parents, as a request brings them."""
    numbers = range(first, first + BATCH)
    parents = (key(number - 1) if number % chain_blocks else NO_PARENT for number in numbers)
    return b"".join(map(key, numbers)), b"".join(parents)


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    blocks, chain_blocks = int(sys.argv[1]), int(sys.argv[2])
    turnovers = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    capacity_bytes = -(-blocks * PAGE_BYTES // SEGMENT_BYTES) * SEGMENT_BYTES
    if turnovers:
        blocks = capacity_bytes // PAGE_BYTES  # it is full before it is written anew
    times: dict[str, list[float]] = {"reserve": [], "commit": [], "locate": [], "release": [], "peek": []}

    def lap(name: str) -> None:
        nonlocal started
        now = time.perf_counter()
        times[name].append(now - started)
        started = now

    before = resident_bytes()
    index = Index(Slab(1 << 40, capacity_bytes, SEGMENT_BYTES))
    written = blocks * (1 + turnovers) // BATCH * BATCH
    for first in range(0, written, BATCH):
        keys, parents = batch(first, chain_blocks)
        checksums = pack_u64([2**64 - 1 - first - position for position in range(BATCH)])
        started = time.perf_counter()
        reservation = index.reserve(1, keys, parents, PAGE_BYTES)
        lap("reserve")
        assert index.commit(1, reservation.number, b"\1" * BATCH, checksums) == BATCH
        lap("commit")
    grown = resident_bytes() - before

    rng = random.Random(1)
    for _ in range(1000):
        keys, _ = batch(rng.randrange(written - blocks // 2, written - BATCH), chain_blocks)
        started = time.perf_counter()
        lease = index.locate(1, keys, 1.0)
        lap("locate")
        assert lease.number
        started = time.perf_counter()
        index.release(1, lease.number)
        lap("release")
        index.peek(keys)
        lap("peek")
    result = {
        "blocks": index.statistics().blocks,
        "bytes_per_block": round(grown / index.statistics().blocks, 1),
    }
    print(json.dumps(result | {f"{name}_us": round(median(laps) * 1e6, 1) for name, laps in times.items()}))


if __name__ == "__main__":
    main()
