"""A rank of an engine as the pool sees it: memory, a client, and timed, checked puts and gets."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polarkv_sglang.config import format_bytes
from polarkv_sglang.errors import NodeError
from polarkv_sglang.identity import KEY_BYTES
from polarkv_sglang.pool.blocks import Chain, Pieces, chain
from polarkv_sglang.pool.client import PoolClient

STRIPE_PAGES = 32  # as engines have it by default

_DEADLINE_S = 10.0  # of one batch: half a GiB over a slow link
_LIVE_DEADLINE_S = 20.0
_POLL_S = 0.05


class Batch(NamedTuple):
    """Blocks of one prompt with fresh keys, at ``offset`` of an arena's source and its target."""

    blocks: Chain
    block_bytes: int
    offset: int

    @property
    def bytes(self) -> int:
        return len(self.blocks) * self.block_bytes

    def __str__(self) -> str:
        return f"{len(self.blocks)} x {format_bytes(self.block_bytes)}"


class Arena:
    """``room_bytes`` of random bytes to put and as much to get them into, all of it touched.

    Batches walk through it, so that the processor's caches help no more than they do an engine.
    """

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes = room_bytes
        self._mapping = mmap.mmap(-1, 2 * room_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.memory = np.frombuffer(self._mapping, np.uint8)
        self.source, self.target = self.memory[:room_bytes], self.memory[room_bytes:]
        whole_words = self.source[: room_bytes // 8 * 8].view(np.uint64)
        whole_words[:] = np.random.default_rng().integers(0, 2**64, whole_words.size, np.uint64)
        self.target[:] = 0
        self._cursor = 0

    def batches(self, block_bytes: int, blocks: int, count: int) -> list[Batch]:
        """``count`` batches of ``blocks`` fresh blocks."""
        made = []
        for _ in range(count):
            length = block_bytes * blocks
            if self._cursor + length > self.room_bytes:
                self._cursor = 0
            blob = os.urandom(KEY_BYTES * blocks)
            keys = [blob[start : start + KEY_BYTES] for start in range(0, len(blob), KEY_BYTES)]
            made.append(Batch(chain([], keys, STRIPE_PAGES), block_bytes, self._cursor))
            self._cursor += length
        return made

    def copy(self, batches: Sequence[Batch]) -> float:
        """Seconds that memcpy takes from source to target, one call a batch."""
        source, target = self.source.ctypes.data, self.target.ctypes.data
        started = time.perf_counter()
        for batch in batches:
            ctypes.memmove(target + batch.offset, source + batch.offset, batch.bytes)
        return time.perf_counter() - started

    def wipe(self, batches: Sequence[Batch]) -> None:
        """Forget what was read."""
        for batch in batches:
            self.target[batch.offset : batch.offset + batch.bytes] = 0

    def verify(self, batches: Sequence[Batch]) -> None:
        """NodeError unless the target holds what the source does, byte for byte."""
        for batch in batches:
            part = slice(batch.offset, batch.offset + batch.bytes)
            if not np.array_equal(self.source[part], self.target[part]):
                raise NodeError(f"a get of {batch} brought other bytes than were put")


class Rank:
    """A pool client over an arena. Used by one thread; a batch that is not delivered whole is a NodeError."""

    def __init__(
        self,
        nodes: Sequence[str],
        arena: Arena,
        *,
        token: str | None,
        tls: ssl.SSLContext | None = None,
        ucx_tls: str | None = None,
        ucx_library: str | None = None,
    ) -> None:
        """Connect to ``nodes``; NodeError if one cannot be used, TransportError if UCX cannot."""
        self._arena = arena
        self._nodes = tuple(nodes)
        self.client = PoolClient(
            nodes,
            token=token,
            tls=tls,
            deadline_s=_DEADLINE_S,
            client=f"polarkv bench {os.getpid()}",
            ucx_library=ucx_library,
            ucx_tls=ucx_tls,
        )
        try:
            self.wait_live()
            self.client.register(arena.memory.ctypes.data, arena.memory.nbytes)
        except BaseException:
            self.client.close()
            raise

    def close(self) -> None:
        self.client.close()

    def wait_live(self) -> None:
        """Wait until every node can be used, after a failure too; NodeError that says why one cannot."""
        membership = self.client.membership
        membership.wait_tried(_LIVE_DEADLINE_S)
        deadline = time.monotonic() + _LIVE_DEADLINE_S
        while len(membership.live) < len(self._nodes):
            # A node that has never been up will not be in the seconds that we are here.
            reasons = membership.reasons()
            if self.client.statistics().failed_batches == 0 or time.monotonic() > deadline:
                raise NodeError("; ".join(reasons.values()) or "no memory node can be used")
            time.sleep(_POLL_S)

    def put(self, batches: Sequence[Batch]) -> list[float]:
        """Seconds of each put."""
        return [self._timed("put", batch, self._arena.source) for batch in batches]

    def look_up(self, batches: Sequence[Batch]) -> None:
        """Ask whether they are there, as engines do before they read; NodeError if they are not."""
        for batch in batches:
            found = self.client.peek(batch.blocks)
            if found < len(batch.blocks):
                raise NodeError(f"a look-up of {batch} blocks found {found} of them: {self._why()}")

    def get(self, batches: Sequence[Batch]) -> list[float]:
        """Seconds of each get; the arena's ``wipe`` before and ``verify`` after show what it brought."""
        return [self._timed("get", batch, self._arena.target) for batch in batches]

    def _timed(self, op: str, batch: Batch, memory: npt.NDArray[np.uint8]) -> float:
        start = memory.ctypes.data + batch.offset
        addresses = start + np.arange(len(batch.blocks), dtype=np.uint64) * np.uint64(batch.block_bytes)
        pieces = Pieces(addresses[:, None], batch.block_bytes)
        operate = self.client.put if op == "put" else self.client.get
        started = time.perf_counter()
        done = operate(batch.blocks, pieces)
        elapsed = time.perf_counter() - started
        if not done.all():
            raise NodeError(f"a {op} of {batch} blocks did {int(done.sum())} of them: {self._why()}")
        return elapsed

    def _why(self) -> str:
        """Why blocks may be missing."""
        reasons = "; ".join(self.client.membership.reasons().values())
        return reasons or "no node failed: one has no room, or lost the rest to others meanwhile"


@contextlib.contextmanager
def a_rank(
    nodes: Sequence[str],
    arena: Arena,
    *,
    token: str | None,
    tls: ssl.SSLContext | None = None,
    ucx_tls: str | None = None,
    ucx_library: str | None = None,
) -> Iterator[Rank]:
    """A Rank, closed with the block. Raises as Rank does."""
    rank = Rank(nodes, arena, token=token, tls=tls, ucx_tls=ucx_tls, ucx_library=ucx_library)
    try:
        yield rank
    finally:
        rank.close()


@contextlib.contextmanager
def busy_thread() -> Iterator[None]:
    """Another thread of this process runs plain Python all the while, as an engine's scheduler does."""
    spinning = True

    def spin() -> None:
        turns = 0
        while spinning:
            turns += 1

    # A daemon, and started under ``try``: Ctrl-C may come at any line, and the thread must not outlive it.
    thread = threading.Thread(target=spin, name="polarkv-bench-busy", daemon=True)
    try:
        thread.start()
        yield
    finally:
        spinning = False
    thread.join()
