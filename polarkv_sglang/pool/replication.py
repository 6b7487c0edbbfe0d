"""A memory node copies blocks to other nodes when readers ask for it, off everybody's path."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polarkv_sglang.config import parse_address
from polarkv_sglang.identity import KEY_BYTES
from polarkv_sglang.pool.blocks import Chain, Pieces
from polarkv_sglang.pool.client import PoolClient
from polarkv_sglang.pool.index import Index, Lease
from polarkv_sglang.pool.slab import SlabMemory
from polarkv_sglang.transport.columns import split_keys, unpack_u64
from polarkv_sglang.transport.messages import MAX_LEASE_S

_QUEUED_BLOCKS = 16384  # asked for and not yet copied; more are dropped, and asked for again if they are hot
_TARGETS = 64  # memory nodes that we copy to
_CONNECT_S = 5.0
_BATCH_BYTES = 64 << 20  # one put: a link of 0.1 GB/s carries it within the client's deadline
_OWNER = (1 << 64) - 1  # of our leases; sessions count from 0

_logger = logging.getLogger(__name__)


class _Job(NamedTuple):
    target: str  # host:port
    keys: bytes


class _Group(NamedTuple):
    """Blocks of one length; they are copied only as they were written, whatever happened to them since."""

    blocks: Chain
    pieces: Pieces
    checksums: npt.NDArray[np.uint64]


class Replicator:
    """Copies blocks of one node to others, one batch at a time, on the event loop; any thread may ``submit``.

    A copy is an ordinary put of a client: the target skips what it has, and evicts by its own policy.
    """

    def __init__(self, index: Index, memory: SlabMemory, connect: Callable[[str], PoolClient]) -> None:
        """``connect`` makes a client of the node at an address, with our token and TLS."""
        self._index = index
        self._memory = memory
        self._connect = connect
        self._loop = asyncio.get_running_loop()
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._lock = threading.Lock()
        self._queued_blocks = 0  # under the lock
        self._clients: dict[str, PoolClient] = {}
        self._stopping = threading.Event()

    def submit(self, keys: bytes, target: str) -> None:
        """Copy these blocks to ``target`` some time; what we do not have or cannot queue is left out."""
        blocks = len(keys) // KEY_BYTES
        with self._lock:
            if not blocks or self._queued_blocks + blocks > _QUEUED_BLOCKS:
                return
            self._queued_blocks += blocks
        self._loop.call_soon_threadsafe(self._jobs.put_nowait, _Job(target, keys))

    async def run(self) -> None:
        """Work until cancelled; a put that is under way then is finished first."""
        try:
            while True:
                job = await self._jobs.get()
                with self._lock:
                    self._queued_blocks -= len(job.keys) // KEY_BYTES
                lease = self._index.locate(_OWNER, job.keys, MAX_LEASE_S)
                copying = asyncio.ensure_future(asyncio.to_thread(self._copy, job, self._groups(job, lease)))
                try:
                    await asyncio.shield(copying)
                except asyncio.CancelledError:
                    self._stopping.set()
                    await copying
                    raise
                except Exception:  # one bad target must not end the copying to others
                    _logger.exception("cannot copy blocks to %s", job.target)
                finally:
                    self._index.release(_OWNER, lease.number)
        finally:
            await asyncio.gather(
                *(asyncio.to_thread(client.close) for client in self._clients.values()),
                return_exceptions=True,
            )

    def _groups(self, job: _Job, lease: Lease) -> list[_Group]:
        """The blocks that are here, by length, in batches that a slow link carries in time."""
        keys, parents = split_keys(job.keys), split_keys(self._index.describe(job.keys).parents)
        addresses, lengths = unpack_u64(lease.addresses), unpack_u64(lease.lengths)
        groups = []
        for length in sorted(set(lengths.tolist()) - {0}):
            every = np.flatnonzero(lengths == length)
            count = max(1, _BATCH_BYTES // length)
            for start in range(0, len(every), count):
                places = every[start : start + count]
                names = [keys[place] for place in places]
                blocks = Chain(names, [parents[place] for place in places], names)
                pieces = Pieces(addresses[places][:, None], length)
                groups.append(_Group(blocks, pieces, unpack_u64(lease.checksums)[places]))
        return groups

    def _copy(self, job: _Job, groups: list[_Group]) -> None:
        """Put blocks to the target. Runs in a thread, one call at a time."""
        client = self._clients.get(job.target)
        if client is None:
            parse_address(job.target)
            if len(self._clients) == _TARGETS:
                self._clients.pop(next(iter(self._clients))).close()
            client = self._connect(job.target)
            try:
                # What is read from it has its pages; the rest is not for us to take.
                client.register(self._memory.base_address, self._memory.capacity_bytes, populate=False)
            except BaseException:
                client.close()
                raise
            self._clients[job.target] = client
            client.membership.wait_tried(_CONNECT_S)
        for group in groups:
            if self._stopping.is_set():
                return
            client.put(*group)
