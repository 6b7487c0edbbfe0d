"""A rank of an engine for tests: a PoolClient with memory of its own."""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from polarkv_sglang.pool.blocks import Chain, Pieces, chain
from polarkv_sglang.pool.client import PoolClient
from polarkv_sglang.transport.columns import unpack_u64
from polarkv_sglang.transport.messages import Locate
from tests.support import RunningNode

DEADLINE_S = 0.5
PIECE_BYTES = 24 << 10
STRIPE_PAGES = 4


class Rank:
    """A client with memory of its own: blocks of two pieces, K and V."""

    def __init__(
        self,
        *nodes: str,
        nodes_file: Path | None = None,
        blocks: int = 64,
        token: str | None = None,
        deadline_s: float = DEADLINE_S,
        copies: int = 1,
        ucx_tls: str | None = None,
        tls: ssl.SSLContext | None = None,
        seed: int = 0,
    ) -> None:
        self.memory = np.random.default_rng(seed).integers(0, 256, (2, blocks, PIECE_BYTES), np.uint8)
        self.client = PoolClient(
            nodes,
            nodes_file=nodes_file,
            token=token,
            tls=tls,
            deadline_s=deadline_s,
            copies=copies,
            client="test rank",
            ucx_tls=ucx_tls,
        )
        self.client.register(self.memory.ctypes.data, self.memory.nbytes)
        assert self.client.membership.wait_tried(10)

    def pieces(self, count: int) -> Pieces:
        start = self.memory.ctypes.data
        block = np.arange(count, dtype=np.uint64)
        return Pieces(
            np.stack(
                [start + block * PIECE_BYTES, start + (block + self.memory.shape[1]) * PIECE_BYTES], axis=1
            ),
            PIECE_BYTES,
        )

    def put(self, blocks: Chain) -> list[bool]:
        return self.client.put(blocks, self.pieces(len(blocks))).tolist()

    def get(self, blocks: Chain) -> list[bool]:
        """Read over wiped memory."""
        self.memory[:, : len(blocks)] = 0
        return self.client.get(blocks, self.pieces(len(blocks))).tolist()


@contextlib.contextmanager
def a_rank(
    *nodes: str,
    nodes_file: Path | None = None,
    token: str | None = None,
    deadline_s: float = DEADLINE_S,
    copies: int = 1,
    ucx_tls: str | None = None,
    tls: ssl.SSLContext | None = None,
    seed: int = 0,
) -> Iterator[Rank]:
    rank = Rank(
        *nodes,
        nodes_file=nodes_file,
        token=token,
        deadline_s=deadline_s,
        copies=copies,
        ucx_tls=ucx_tls,
        tls=tls,
        seed=seed,
    )
    try:
        yield rank
    finally:
        rank.client.close()


def prompt(name: str, pages: int, *, before: int = 0) -> Chain:
    """The blocks of pages ``before`` to ``pages`` of a prompt."""
    keys = [hashlib.sha256(f"{name} {page}".encode()).digest()[:16] for page in range(pages)]
    return chain(keys[:before], keys[before:], STRIPE_PAGES)


def wait_until_live(rank: Rank, count: int, timeout_s: float = 15) -> None:
    end = time.monotonic() + timeout_s
    while len(rank.client.membership.live) != count:
        assert time.monotonic() < end, rank.client.membership.reasons()
        time.sleep(0.02)


def flip_a_byte(node: RunningNode, key: bytes, at: int = 1000) -> None:
    """Change one byte of a block in the slab of a memory node's process."""
    with node.connect() as control:
        located = control.request(Locate(control.next_id(), key, 0.01), 5)
    address = int(unpack_u64(located.address_blob)[0]) + at
    with open(f"/proc/{node.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        byte = memory.read(1)[0]
        memory.seek(address)
        memory.write(bytes([byte ^ 0x40]))
