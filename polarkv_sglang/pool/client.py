"""The pool as one rank uses it: look blocks up, get them, put them."""

from __future__ import annotations

import contextlib
import functools
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polarkv_sglang.config import parse_address
from polarkv_sglang.errors import ConfigError, TransportError
from polarkv_sglang.pool.blocks import Chain, Pieces, Stages, blob
from polarkv_sglang.pool.finder import NOTHING_KEPT, Finder, Kept
from polarkv_sglang.pool.link import Lane
from polarkv_sglang.pool.membership import Membership
from polarkv_sglang.pool.memory import LocalMemory
from polarkv_sglang.pool.nodes import NodeList, is_loopback
from polarkv_sglang.pool.reader import Reader
from polarkv_sglang.pool.requests import Requests, Route
from polarkv_sglang.pool.routes import route_blocks, usable_nodes
from polarkv_sglang.pool.trial import Trials
from polarkv_sglang.pool.writer import PRESENT, WRITTEN, Writer
from polarkv_sglang.transport import DRAIN_S, Context, load_library
from polarkv_sglang.transport.messages import MAX_LEASE_S, NotesRead, ReadNotes, WriteNotes

# A lease is twice as long as its batch, drain included (reader.py), so none ends in a transfer.
MAX_DEADLINE_S = MAX_LEASE_S / 2 - DRAIN_S
_IN_THE_POOL = bytes(outcome > 0 for outcome in range(256))


class PoolStatistics(NamedTuple):
    """Counters of one rank since its start; all but the seconds are whole numbers."""

    got_blocks: float
    got_bytes: float
    get_s: float  # time inside get batches that moved data
    missed_blocks: float  # asked for in get, not delivered
    corrupt_blocks: float  # delivered with a wrong checksum, and therefore missed
    put_blocks: float
    put_bytes: float
    put_s: float
    present_blocks: float  # offered in put, in the pool already
    failed_batches: float  # batches in which a memory node failed


class PoolClient:
    """One rank's client of all memory nodes.

    No method raises for what a memory node does, and none takes much longer than ``deadline_s``: a node
    that is absent, frozen, dead or wrong is a miss, and out until it answers again. Looking up (``peek``,
    ``hold``, ``renew``, ``drop``), ``get`` and ``put`` have lanes of their own and may be called by three
    threads at once; calls of one kind wait for each other, at most as long again. One ``get`` or ``put``
    takes up to MAX_KEYS blocks.
    """

    def __init__(
        self,
        nodes: Sequence[str],
        *,
        nodes_file: Path | None = None,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        deadline_s: float = 1.0,
        copies: int = 1,
        client: str = "rank",
        ucx_library: str | None = None,
        ucx_tls: str | None = None,
        gpu_memory: bool = False,
    ) -> None:
        """Start connecting to ``nodes``, or those listed in ``nodes_file``, in the background.

        With ``copies`` above 1, stripes that are read often are copied to the next nodes of their ranking,
        and read there when their home is out or has lost them. ``gpu_memory``: blocks are to lie in a GPU's
        memory, where that can be done; see ``no_gpu_memory``. Raises TransportError if UCX cannot be loaded,
        ConfigError if the file cannot be used, or if transfers could outlast the longest lease.
        """
        if deadline_s > MAX_DEADLINE_S:
            raise ConfigError(
                f"a deadline of {deadline_s:g} s is over {MAX_DEADLINE_S:g} s: blocks are leased for "
                f"{MAX_LEASE_S:g} s at most, and have to last until every transfer has ended"
            )
        self.deadline_s = deadline_s
        node_list = NodeList(nodes, nodes_file)
        self.library = load_library(ucx_library)
        local = nodes_file is None and all(is_loopback(parse_address(node)[0]) for node in nodes)
        new_context = functools.partial(Context, self.library, tls=ucx_tls, loopback=local)
        self._counters = dict.fromkeys(PoolStatistics._fields, 0.0)
        self._requests = Requests(self._failed)
        with contextlib.ExitStack() as undo:
            self._context = new_context()
            undo.callback(self._context.close)  # and of all that is made of it
            self._memory = LocalMemory(self._context)
            # Why a GPU's memory cannot be registered here; None if it can.
            self.no_gpu_memory = _why_no_gpu_memory(self._context, gpu_memory, local)
            by_processor = self.no_gpu_memory is not None  # it cannot touch a GPU's
            self._peek_lane = Lane(None, reads=True)
            self._get_lane = Lane(self._context, reads=True, by_processor=by_processor)
            self._put_lane = Lane(self._context, reads=False, by_processor=by_processor)
            self._trials = Trials(new_context)
            self.membership = Membership(
                node_list,
                (self._peek_lane, self._get_lane, self._put_lane),
                self._trials,
                token=token,
                tls=tls,
                client=client,
                deadline_s=deadline_s,
            )
            undo.pop_all()
        self._finder = Finder(
            self._peek_lane, self.membership, self._requests, deadline_s=deadline_s, copies=copies
        )
        self._reader = Reader(
            self._get_lane,
            self.membership,
            self._requests,
            self._memory,
            self.library,
            deadline_s=deadline_s,
            copies=copies,
            on_corrupt=self._corrupt,
        )
        self._writer = Writer(
            self._put_lane,
            self.membership,
            self._requests,
            self._memory,
            self.library,
            deadline_s=deadline_s,
        )

    def register(self, address: int, length: int, *, cuda: bool = False, populate: bool = True) -> None:
        """Let the pool read and write ``length`` bytes at ``address``; blocks may only lie in such memory.

        ``cuda``: it is a GPU's. ``populate``: have memory that is not backed by pages yet backed by them, so
        that the first reads do not wait for it. Raises TransportError.
        """
        if cuda and self.no_gpu_memory is not None:
            raise TransportError(f"a GPU's memory cannot be registered: {self.no_gpu_memory}")
        self._memory.register(address, length, cuda=cuda, populate=populate)

    def statistics(self) -> PoolStatistics:
        """A snapshot of the counters."""
        return PoolStatistics(**self._counters)

    def close(self) -> None:
        """Leave the pool. No call may be under way."""
        self.membership.close()
        self._trials.close()
        for lane in (self._peek_lane, self._get_lane, self._put_lane):
            lane.close()
        self._memory.close()
        self._context.close()

    def peek(self, chain: Chain) -> int:
        """How many blocks at the head of the chain are in the pool; they are neither touched nor leased."""
        with self._turn(self._peek_lane) as in_time:
            return self._finder.peek(chain) if in_time else 0

    def hold(self, chain: Chain, lease_s: float) -> Kept:
        """As ``peek``, and what was found is not evicted for ``lease_s`` seconds, or until it is dropped.

        For requests that will read it later, at most MAX_LEASE_S at a time. A memory node keeps up to half of
        its memory like this; what is beyond is found, but not kept.
        """
        with self._turn(self._peek_lane) as in_time:
            return self._finder.hold(chain, lease_s) if in_time else NOTHING_KEPT

    def renew(self, kept: Kept, lease_s: float) -> bool:
        """Keep what a hold found for ``lease_s`` seconds from now; False if some of it is kept no more."""
        with self._turn(self._peek_lane) as in_time:
            return self._finder.renew(kept, lease_s) if in_time else False

    def drop(self, kept: Kept) -> None:
        """Let go of what a hold found."""
        with self._turn(self._peek_lane) as in_time:
            if in_time:  # else the leases end by themselves
                self._finder.drop(kept)

    def get(self, chain: Chain, pieces: Pieces, stages: Stages | None = None) -> npt.NDArray[np.bool_]:
        """Read blocks into ``pieces``; True where the bytes are there and their checksum is right.

        What comes after the first miss is not read: a prefix ends there. Where the answer is False the
        bytes of that block are undefined, and nothing will write to them after the call. With ``stages``
        all blocks come part by part, if all were found where they can be read in parts; otherwise no arrival
        is told. An arrival says nothing about the bytes: only the answer does, and it is for all parts.
        """
        lock = self._get_lane.lock
        in_time = lock.acquire(True, self.deadline_s)  # as ``_turn``, in fewer steps
        try:
            started = time.monotonic()  # waiting for others says nothing about the pool
            done = self._reader.read(chain, pieces, stages) if in_time else bytes(len(chain))
        finally:
            if in_time:
                lock.release()
        spent_s = time.monotonic() - started
        count, counters = done.count(1), self._counters
        counters["got_blocks"] += count
        counters["got_bytes"] += count * pieces.block_bytes
        counters["missed_blocks"] += len(done) - count
        counters["get_s"] += spent_s if count else 0.0
        return np.frombuffer(bytearray(done), np.bool_)

    def put(
        self, chain: Chain, pieces: Pieces, checksums: npt.NDArray[np.uint64] | None = None
    ) -> npt.NDArray[np.bool_]:
        """Write blocks from ``pieces``; True where the pool has the block, or is getting it from another.

        Where ``checksums`` are given, one per block, bytes that do not have theirs are not stored.
        """
        lock = self._put_lane.lock
        started = time.monotonic()
        if not lock.acquire(True, self.deadline_s):  # as ``_turn``, in fewer steps
            return np.zeros(len(chain), bool)
        try:
            outcomes = self._writer.write(chain, pieces, checksums)
        finally:
            lock.release()
        count, counters = outcomes.count(WRITTEN), self._counters
        counters["put_blocks"] += count
        counters["put_bytes"] += count * pieces.block_bytes
        counters["present_blocks"] += outcomes.count(PRESENT)
        counters["put_s"] += time.monotonic() - started if count else 0.0
        return np.frombuffer(bytearray(outcomes.translate(_IN_THE_POOL)), np.bool_)

    def write_notes(self, notes: Mapping[bytes, bytes]) -> None:
        """Leave small values, by 16-byte keys, on the memory nodes; best effort, the last one counts.

        Up to MAX_NOTES, each of 1 to MAX_NOTE_BYTES. Takes turns with ``peek``, and may be called beside it.
        """
        keys, values = list(notes), list(notes.values())
        with self._turn(self._peek_lane) as in_time:
            for route in self._note_routes(keys) if in_time else ():
                some = [values[position] for position in route.blocks.tolist()]
                self._requests.tell(self._peek_lane, route.link, WriteNotes(blob(keys, route.blocks), some))

    def read_notes(self, keys: Sequence[bytes]) -> list[bytes]:
        """The notes under up to MAX_NOTES keys, empty where there is none. Takes turns as ``write_notes``."""
        found = [b""] * len(keys)
        lane = self._peek_lane
        with self._turn(lane) as in_time:
            deadline = time.monotonic() + self.deadline_s  # no node is blamed for a wait for others
            sent = self._requests.send(
                lane,
                self._note_routes(keys) if in_time else (),
                lambda link, asked: ReadNotes(link.control.next_id(), blob(keys, asked)),
                deadline,
            )
            for route, reply in self._requests.collect(lane, sent, NotesRead, deadline):
                for position, note in zip(route.blocks.tolist(), reply.notes):
                    found[position] = note
        return found

    def _note_routes(self, keys: Sequence[bytes]) -> list[Route]:
        """A note is placed by its own key."""
        nodes = usable_nodes(self._peek_lane, self.membership.live)
        alone = Chain(keys, parents=(), anchors=keys)
        return route_blocks(self._peek_lane, nodes, alone, np.arange(len(keys)))

    @contextlib.contextmanager
    def _turn(self, lane: Lane) -> Iterator[bool]:
        """Hold a lane's lock; False if others held it for a whole deadline, which is a miss."""
        in_time = lane.lock.acquire(timeout=self.deadline_s)
        try:
            yield in_time
        finally:
            if in_time:
                lane.lock.release()

    def _failed(self, address: str, reason: str) -> None:
        self._counters["failed_batches"] += 1
        self.membership.down(address, reason)

    def _corrupt(self) -> None:
        self._counters["corrupt_blocks"] += 1


def _why_no_gpu_memory(context: Context, wanted: bool, local: bool) -> str | None:
    """Why blocks cannot, or had better not, lie in a GPU's memory; None: they can."""
    if not wanted:
        return "nobody asked for it"
    if local and context.shares_memory:
        return "all memory nodes are on this host, whose memory is mapped and copied"
    if not context.takes_cuda:
        version = ".".join(map(str, context.library.version))
        return f"UCX {version} ({context.library.source}) offers no CUDA memory with these transports"
    return None
