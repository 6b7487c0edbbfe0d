"""What UCX's puts do with the same batches, from and to as much memory: no index, no lease, no checksum."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import numpy as np

from polarkv_sglang.bench.nodes import LocalNode
from polarkv_sglang.bench.rank import Arena, Batch
from polarkv_sglang.errors import TransportError
from polarkv_sglang.pool.slab import PAGE_BYTES
from polarkv_sglang.transport import Context, Direction, RegisteredMemory, RemoteKey, Worker, load_library
from polarkv_sglang.transport.control import ControlConnection

_DEADLINE_S = 10.0


class RawPuts:
    """Puts from an arena's source into a memory node's slab, whatever lies there."""

    def __init__(
        self, arena: Arena, memory: RegisteredMemory, worker: Worker, key: RemoteKey, base_address: int
    ) -> None:
        """Internal: use ``raw_puts``."""
        self._arena = arena
        self._memory = memory
        self._worker = worker
        self._key = key
        self._base_address = base_address

    def put(self, batches: Sequence[Batch]) -> list[float]:
        """Seconds of each. Raises TransportError if one does not arrive."""
        return [self._timed(batch) for batch in batches]

    def _timed(self, batch: Batch) -> float:
        count = len(batch.blocks)
        places = batch.offset + np.arange(count, dtype=np.uint64) * np.uint64(batch.block_bytes)
        local = np.uint64(self._arena.source.ctypes.data) + places
        remote = np.uint64(self._base_address) + places
        started = time.perf_counter()
        done = self._worker.transfer(
            Direction.PUT,
            [self._key],
            np.zeros(count, np.uint32),
            remote,
            local[:, None],
            batch.block_bytes,
            [self._memory],
            _DEADLINE_S,
            digest=False,
        )
        elapsed = time.perf_counter() - started
        if done.status.any():
            raise TransportError(f"a raw put of {batch} did not arrive")
        return elapsed


@contextlib.contextmanager
def raw_puts(
    node: LocalNode, arena: Arena, *, ucx_tls: str | None, ucx_library: str | None
) -> Iterator[RawPuts]:
    """Puts to a node that nobody needs the content of, at least as large as the arena's room.

    Raises NodeError, and TransportError if UCX does not reach it.
    """
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(
            ControlConnection.connect(
                node.address, token=node.token, role="rank", client="raw puts", deadline_s=_DEADLINE_S
            )
        )
        context = Context(load_library(ucx_library), tls=ucx_tls, loopback=True)
        stack.callback(context.close)
        memory = context.register(arena.memory.ctypes.data, arena.memory.nbytes)
        worker = Worker(context)
        stack.callback(worker.close)
        key = worker.connect(control.welcome.worker_address).unpack(control.welcome.rkey)
        puts = RawPuts(arena, memory, worker, key, control.welcome.base_address)
        puts.put(arena.batches(PAGE_BYTES, 1, 1))  # UCX sets an endpoint up at its first operation
        yield puts
