"""Reads by put: the node writes blocks into a client's memory, where the client's gets would be emulated.

UCX emulates a get over TCP by asking the peer's CPU for it; a put of the same bytes is two to five times
faster.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from polarkv_sglang.errors import TransportError
from polarkv_sglang.pool.blocks import leading
from polarkv_sglang.pool.index import Index
from polarkv_sglang.transport import Context, Direction, RegisteredMemory, RemoteKey, Worker
from polarkv_sglang.transport.columns import unpack_u64
from polarkv_sglang.transport.messages import (
    MAX_FETCH_REGIONS,
    MAX_FETCH_S,
    MAX_LEASE_S,
    Fetch,
    Fetched,
    FetchState,
)

_MAX_KEYS_HELD = 4 * MAX_FETCH_REGIONS  # of one client's regions, old ones included

_logger = logging.getLogger(__name__)


class Pushers:
    """What a node's pushers share, and what they did. Used on the event loop's thread only."""

    def __init__(self, index: Index, context: Context, slab: RegisteredMemory) -> None:
        self.index = index
        self.context = context
        self.slab = slab
        self.sent_blocks = self.sent_bytes = self.failed_blocks = 0
        self.open: set[Pusher] = set()
        self.ending: set[asyncio.Future[None]] = set()

    async def close(self) -> None:
        """End all pushers; returns once no put is under way, at most about MAX_FETCH_S seconds later."""
        for pusher in tuple(self.open):
            pusher.close()
        await asyncio.gather(*self.ending)


class Pusher:
    """Answers one client's fetches, one at a time, with a UCX worker and a thread of its own.

    So a client that freezes while it is written to holds up nobody else. Worker and endpoint belong to
    the thread, everything else to the event loop.
    """

    def __init__(self, shared: Pushers, owner: int) -> None:
        """``owner``: of leases, see ``Index``."""
        self._shared = shared
        self._owner = owner
        self._thread: ThreadPoolExecutor | None = None  # until the first block is put
        self._worker: Worker | None = None
        self._client: _Client | None = None
        shared.open.add(self)

    async def fetch(self, request: Fetch) -> Fetched:
        """Put what is here; the blocks stay leased until the puts have really ended."""
        deadline = time.monotonic() + min(request.timeout_s, MAX_FETCH_S)
        shared = self._shared
        # The longest put and its drain end well within the longest lease.
        lease = shared.index.locate(self._owner, request.keys, MAX_LEASE_S)
        try:
            length = request.pieces * request.piece_bytes
            run = leading(unpack_u64(lease.lengths) == length)
            sent = np.zeros(len(lease.lengths) // 8, bool)
            if run and self in shared.open:
                if self._thread is None:
                    self._thread = ThreadPoolExecutor(1, thread_name_prefix="polarkv-push")
                sent[:run] = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._put, request, unpack_u64(lease.addresses)[:run], deadline
                )
        finally:
            shared.index.release(self._owner, lease.number)
        count = int(sent.sum())
        shared.sent_blocks += count
        shared.sent_bytes += count * length
        shared.failed_blocks += run - count
        states = np.full(len(sent), FetchState.MISS, np.uint8)
        states[:run] = np.where(sent[:run], FetchState.SENT, FetchState.FAILED)
        columns = [(unpack_u64(column) * sent).tobytes() for column in (lease.checksums, lease.generations)]
        return Fetched(request.request_id, states.tobytes(), *columns)

    def close(self) -> None:
        """End it once the fetch under way has ended; ``Pushers.close`` waits for that."""
        if self not in self._shared.open:
            return
        self._shared.open.discard(self)
        if self._thread is None:
            return
        ending = asyncio.get_running_loop().run_in_executor(self._thread, self._close_worker)
        self._thread.shutdown(wait=False)
        self._shared.ending.add(ending)
        ending.add_done_callback(self._shared.ending.discard)

    def _put(
        self, request: Fetch, addresses: npt.NDArray[np.uint64], deadline: float
    ) -> npt.NDArray[np.bool_]:
        """Which of the leading blocks arrived; ``addresses`` are theirs in the slab."""
        count, pieces = len(addresses), request.pieces
        # To the transport each piece is a block: it lies in one run at the client, as the slab's part of it.
        offsets = np.arange(pieces, dtype=np.uint64) * np.uint64(request.piece_bytes)
        local = addresses[:, None] + offsets
        regions = unpack_u64(request.region_blob)[: local.size].astype(np.uint32)
        try:
            worker = self._usable_worker()
            status, _ = worker.transfer(
                Direction.PUT,
                self._reach(worker, request),
                regions,
                unpack_u64(request.target_blob)[: local.size],
                local.reshape(-1, 1),
                request.piece_bytes,
                [self._shared.slab],
                max(0.0, deadline - time.monotonic()),
            )
        except TransportError as error:
            _logger.warning("could not put %d blocks into a client's memory: %s", count, error)
            return np.zeros(count, bool)
        arrived: npt.NDArray[np.bool_] = (status.reshape(count, pieces) == 0).all(axis=1)
        return arrived

    def _usable_worker(self) -> Worker:
        if self._worker is not None and self._worker.statistics().poisoned:
            self._close_worker()
        if self._worker is None:
            self._worker = Worker(self._shared.context)
        return self._worker

    def _reach(self, worker: Worker, request: Fetch) -> list[RemoteKey]:
        """The client's regions, through an endpoint that is kept for as long as it can be used."""
        client = self._client
        if client is not None and not client.serves(request):
            client.endpoint.close(force=True)
            client = None
        if client is None:
            client = self._client = _Client(worker, request.worker_address)
        return [client.key(rkey) for rkey in request.rkeys]

    def _close_worker(self) -> None:
        self._client = None
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class _Client:
    """An endpoint to one worker of the client, and the keys that were unpacked on it."""

    def __init__(self, worker: Worker, address: bytes) -> None:
        self.endpoint = worker.connect(address)
        self._address = address
        self._keys: dict[bytes, RemoteKey] = {}

    def serves(self, request: Fetch) -> bool:
        """Whether this endpoint is to be used for the request; keys only go when it does."""
        return (
            self.endpoint.failed is None
            and self._address == request.worker_address
            and len(self._keys.keys() | set(request.rkeys)) <= _MAX_KEYS_HELD
        )

    def key(self, rkey: bytes) -> RemoteKey:
        """The usable form of a packed key."""
        if rkey not in self._keys:
            self._keys[rkey] = self.endpoint.unpack(rkey)
        return self._keys[rkey]
