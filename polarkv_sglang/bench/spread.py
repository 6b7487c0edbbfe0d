"""One client of 1 to N memory nodes on this host: a get's latency, and throughput of all of them together."""

from __future__ import annotations

import secrets
import statistics
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from polarkv_sglang.bench.figures import Figure
from polarkv_sglang.bench.nodes import local_node
from polarkv_sglang.bench.rank import Arena, Batch, Rank, a_rank
from polarkv_sglang.bench.throughput import TRANSPORTS
from polarkv_sglang.pool.blocks import Chain

BLOCK_BYTES = 64 << 10
LATENCY_BLOCKS = 128  # four stripes, so up to four nodes: what SGLang asks its storage for at once

_GETS_A_SAMPLE = 10


class SpreadRow(NamedTuple):
    transport: str
    nodes: int
    get_latency_ms: Figure | None  # of LATENCY_BLOCKS blocks
    gbps: Figure | None  # of one get of all blocks


def node_counts(most: int) -> list[int]:
    """1, 2, 4, ... and ``most``."""
    return sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})


def measure(
    transport: str, counts: Sequence[int], repeats: int, memory_bytes: int, ucx_library: str | None = None
) -> list[SpreadRow]:
    """One row per count. Raises NodeError and TransportError.

    The same nodes serve all counts, each with blocks of its own and the client of its own, which take turns.
    """
    ucx_tls = TRANSPORTS[transport]
    # Each count has its blocks in the nodes, and there are a source and a target here.
    blocks = max(LATENCY_BLOCKS, memory_bytes // (len(counts) + 2) // BLOCK_BYTES)
    room_bytes = blocks * BLOCK_BYTES
    with ExitStack() as stack:
        # The first holds all blocks of count 1, half of those of count 2, and so on; placement is not even.
        token = secrets.token_hex(16)
        nodes = [
            stack.enter_context(
                local_node(
                    3 * room_bytes, "--no-prefault", token=token, ucx_tls=ucx_tls, ucx_library=ucx_library
                )
            )
            for _ in range(max(counts))
        ]
        arena = Arena(room_bytes)
        ranks: dict[int, tuple[Rank, Batch]] = {}
        for count in counts:
            addresses = [node.address for node in nodes[:count]]
            rank = stack.enter_context(
                a_rank(addresses, arena, token=token, ucx_tls=ucx_tls, ucx_library=ucx_library)
            )
            [batch] = arena.batches(BLOCK_BYTES, blocks, 1)
            rank.put([batch])
            ranks[count] = (rank, batch)
        latencies: dict[int, list[float]] = defaultdict(list)
        rates: dict[int, list[float]] = defaultdict(list)
        for _ in range(repeats):
            for count, (rank, batch) in ranks.items():
                arena.wipe([batch])
                rates[count].append(batch.bytes / sum(rank.get([batch])) / 1e9)
                arena.verify([batch])
                head = Chain(*(column[:LATENCY_BLOCKS] for column in batch.blocks))
                gets = [Batch(head, BLOCK_BYTES, batch.offset)] * _GETS_A_SAMPLE
                latencies[count].append(1e3 * statistics.median(rank.get(gets)))
    return [
        SpreadRow(transport, count, Figure.of(latencies[count]), Figure.of(rates[count])) for count in counts
    ]
