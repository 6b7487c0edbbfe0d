"""Pool put and get by block size and batch, beside memcpy and raw UCX of the same sizes in the same run."""

from __future__ import annotations

import contextlib
import ssl
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from polarkv_sglang.bench.figures import Figure
from polarkv_sglang.bench.nodes import local_node
from polarkv_sglang.bench.perftest import MAX_WINDOW, PerfTest
from polarkv_sglang.bench.rank import Arena, Batch, Rank, a_rank, busy_thread
from polarkv_sglang.bench.raw import RawPuts, raw_puts
from polarkv_sglang.config import format_bytes
from polarkv_sglang.errors import NodeError, TransportError
from polarkv_sglang.pool.slab import PAGE_BYTES, default_segment_bytes
from polarkv_sglang.transport import load_library

# What client and node are given as UCX's list of transports; None leaves the choice to PolarKV and UCX, which
# on one host is shared memory.
TRANSPORTS: dict[str, str | None] = {"shm": None, "cma": "cma,tcp", "tcp": "tcp", "rdma": "ib,tcp"}

_OPS: tuple[Literal["put"], Literal["get"]] = ("put", "get")
# One sample: as many batches as make this many bytes, so that a short batch is not one chance.
_SAMPLE_BYTES = 64 << 20
_MAX_CALLS = 64
_MAX_BUSY_CALLS = 4  # each waits some switch intervals for the GIL


class Pool(NamedTuple):
    """Memory nodes that are there already."""

    nodes: Sequence[str]
    token: str | None
    tls: ssl.SSLContext | None = None  # to nodes that are not ours


class Plan(NamedTuple):
    """What to measure."""

    transports: Sequence[str]  # keys of TRANSPORTS
    block_bytes: Sequence[int]
    batch_blocks: Sequence[int]
    repeats: int
    memory_bytes: int  # for blocks, ours and the memory node's together
    ucx_library: str | None = None

    @property
    def room_bytes(self) -> int:
        """Of the largest batch: source, target and, twice, the node."""
        return self.memory_bytes // 4

    def fits(self, block_bytes: int, blocks: int) -> bool:
        return block_bytes * blocks <= self.room_bytes


class Row(NamedTuple):
    """One line of the result; None where there is no figure. GB/s, GB = 10^9 bytes."""

    transport: str
    op: Literal["put", "get"]
    block_bytes: int
    batch_blocks: int
    gbps: Figure | None
    memcpy_gbps: Figure | None
    ucx_gbps: Figure | None  # ``ucx_perftest``: one buffer over and over
    ucx_put_gbps: Figure | None  # UCX's puts of the same batches
    busy_gbps: Figure | None  # the same beside a thread that spins in Python


Say = Callable[[str], None]


def measure(plan: Plan, pool: Pool | None, say: Say) -> Iterator[Row]:
    """Rows in order of transport and size, each as soon as its size is done.

    Without ``pool`` a fresh memory node is started for every transport and size. What cannot be measured is
    told to ``say`` and has no figure.
    """
    for block_bytes in plan.block_bytes:
        for blocks in plan.batch_blocks:
            if not plan.fits(block_bytes, blocks):
                say(
                    f"skipped {blocks} x {format_bytes(block_bytes)}: one batch is over a quarter of "
                    f"{format_bytes(plan.memory_bytes)}; raise --memory"
                )
    arena = Arena(plan.room_bytes)
    for transport in plan.transports:
        raw = _raw_ucx(plan, transport, say)
        for block_bytes in plan.block_bytes:
            batches = [blocks for blocks in plan.batch_blocks if plan.fits(block_bytes, blocks)]
            size = _Size(transport, block_bytes, batches, arena, raw, say)
            if batches:
                try:
                    with _ranked(plan, pool, transport, block_bytes, arena, say) as (rank, raw_puts):
                        size.measure(
                            rank, raw_puts, plan.repeats, plan.memory_bytes // 2 if pool is None else 0
                        )
                except (NodeError, TransportError) as error:
                    size.give_up(batches, str(error))
            yield from size.rows()


@contextlib.contextmanager
def _ranked(
    plan: Plan, pool: Pool | None, transport: str, block_bytes: int, arena: Arena, say: Say
) -> Iterator[tuple[Rank, RawPuts | None]]:
    """A client, of a node that is started for it unless there is a pool, and raw puts to that node."""
    ucx_tls = TRANSPORTS[transport]
    raw = None
    with contextlib.ExitStack() as stack:
        if pool is None:
            capacity = plan.memory_bytes // 2
            segment = max(default_segment_bytes(capacity), -(-block_bytes // PAGE_BYTES) * PAGE_BYTES)
            flags = ["--segment", str(segment)]
            node = stack.enter_context(
                local_node(capacity, *flags, ucx_tls=ucx_tls, ucx_library=plan.ucx_library)
            )
            node.wait_settled()
            pool = Pool([node.address], node.token)
            raw_to = raw_puts(node, arena, ucx_tls=ucx_tls, ucx_library=plan.ucx_library)
            try:
                raw = stack.enter_context(raw_to)
            except (NodeError, TransportError) as error:
                say(f"{transport}: no figures of UCX's puts: {error}")
        rank = stack.enter_context(
            a_rank(
                pool.nodes,
                arena,
                token=pool.token,
                tls=pool.tls,
                ucx_tls=ucx_tls,
                ucx_library=plan.ucx_library,
            )
        )
        yield rank, raw


def _raw_ucx(plan: Plan, transport: str, say: Say) -> PerfTest | None:
    try:
        return PerfTest(load_library(plan.ucx_library), TRANSPORTS[transport])
    except TransportError as error:
        say(f"{transport}: no figures of raw UCX: {error}")
        return None


class _Size:
    """One transport and block size: everything is measured in turn, again and again."""

    def __init__(
        self,
        transport: str,
        block_bytes: int,
        batches: Sequence[int],
        arena: Arena,
        raw: PerfTest | None,
        say: Say,
    ) -> None:
        self._transport, self._block_bytes, self._batches = transport, block_bytes, tuple(batches)
        self._arena, self._raw, self._say = arena, raw, say
        self._raw_puts: RawPuts | None = None
        self._given_up: set[int] = set()
        # GB/s by what was measured and the batch's blocks.
        self._samples: dict[tuple[str, int], list[float]] = defaultdict(list)

    def measure(self, rank: Rank, raw_puts: RawPuts | None, repeats: int, fill_bytes: int) -> None:
        """Raises NodeError if the pool cannot be used any more.

        ``fill_bytes`` are written and read before: a node that has been in use is full, and mapped.
        """
        self._raw_puts = raw_puts
        blocks = max(1, min(MAX_WINDOW, self._arena.room_bytes // self._block_bytes))
        for _ in range(-(-fill_bytes // (blocks * self._block_bytes))):
            batches = self._arena.batches(self._block_bytes, blocks, 1)
            rank.put(batches)
            rank.get(batches)
        for _ in range(repeats):
            left = [blocks for blocks in self._batches if blocks not in self._given_up]
            for window in sorted({min(blocks, MAX_WINDOW) for blocks in left}):
                self._run_raw(window)
            for blocks in left:
                try:
                    self._run_pool(rank, blocks)
                except NodeError as error:
                    self.give_up([blocks], str(error))
                    rank.wait_live()

    def give_up(self, batches: Sequence[int], reason: str) -> None:
        """Say so; these batches have no figures."""
        new = [blocks for blocks in batches if blocks not in self._given_up]
        self._given_up.update(new)
        spelled = ", ".join(f"{blocks} x {format_bytes(self._block_bytes)}" for blocks in new)
        self._say(f"{self._transport}: gave up {spelled}: {reason}")

    def rows(self) -> Iterator[Row]:
        for blocks in self._batches:
            for op in _OPS:
                pool_figures = (self._figure(op, blocks), self._figure(f"busy {op}", blocks))
                gbps, busy_gbps = (None, None) if blocks in self._given_up else pool_figures
                yield Row(
                    self._transport,
                    op,
                    self._block_bytes,
                    blocks,
                    gbps,
                    self._figure("memcpy", blocks),
                    self._figure(f"ucx {op}", min(blocks, MAX_WINDOW)),
                    self._figure("raw put", blocks),
                    busy_gbps,
                )

    def _figure(self, what: str, blocks: int) -> Figure | None:
        return Figure.of(self._samples[what, blocks])

    def _run_raw(self, window: int) -> None:
        if self._raw is None:
            return
        try:
            for op in _OPS:
                figure = self._raw.gbps(op, self._block_bytes, window)
                self._samples[f"ucx {op}", window].append(figure)
        except TransportError as error:
            self._say(f"{self._transport}: no more figures of raw UCX: {error}")
            self._raw = None

    def _run_pool(self, rank: Rank, blocks: int) -> None:
        arena = self._arena
        # Not more than the arena has room for, of which a node has twice as much.
        sample_bytes = min(_SAMPLE_BYTES, arena.room_bytes)
        calls = max(1, min(_MAX_CALLS, sample_bytes // (blocks * self._block_bytes)))
        # Of their own, so that memcpy does not bring what is put next into the caches.
        copied, raw, batches = (arena.batches(self._block_bytes, blocks, calls) for _ in range(3))
        total = sum(batch.bytes for batch in batches)
        self._samples["memcpy", blocks].append(total / arena.copy(copied) / 1e9)
        self._run_raw_puts(raw, blocks)
        arena.wipe(batches)
        self._samples["put", blocks].append(total / sum(rank.put(batches)) / 1e9)
        rank.look_up(batches)
        self._samples["get", blocks].append(total / sum(rank.get(batches)) / 1e9)
        arena.verify(batches)

        batches = arena.batches(self._block_bytes, blocks, min(calls, _MAX_BUSY_CALLS))
        total = sum(batch.bytes for batch in batches)
        arena.wipe(batches)
        with busy_thread():
            put_s = sum(rank.put(batches))
            rank.look_up(batches)
            get_s = sum(rank.get(batches))
        self._samples["busy put", blocks].append(total / put_s / 1e9)
        self._samples["busy get", blocks].append(total / get_s / 1e9)
        arena.verify(batches)

    def _run_raw_puts(self, batches: list[Batch], blocks: int) -> None:
        if self._raw_puts is None:
            return
        try:
            seconds = sum(self._raw_puts.put(batches))
        except TransportError as error:
            self._say(f"{self._transport}: no more figures of UCX's puts: {error}")
            self._raw_puts = None
        else:
            self._samples["raw put", blocks].append(sum(batch.bytes for batch in batches) / seconds / 1e9)
