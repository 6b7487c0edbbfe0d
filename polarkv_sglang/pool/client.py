"""The pool as one rank uses it: look blocks up, get them, put them."""

from __future__ import annotations

import contextlib
import functools
import ssl
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polarkv_sglang.config import parse_address
from polarkv_sglang.pool.blocks import Chain, Pieces, Stages, blob, leading
from polarkv_sglang.pool.link import Lane
from polarkv_sglang.pool.membership import Membership
from polarkv_sglang.pool.memory import LocalMemory
from polarkv_sglang.pool.nodes import NodeList, is_loopback
from polarkv_sglang.pool.reader import Reader
from polarkv_sglang.pool.requests import Requests, Route
from polarkv_sglang.pool.routes import route_blocks, usable_nodes
from polarkv_sglang.pool.trial import Trials
from polarkv_sglang.pool.writer import Writer
from polarkv_sglang.transport import Context, load_library
from polarkv_sglang.transport.messages import MAX_KEYS, Peek, Peeked


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
    that is absent, frozen, dead or wrong is a miss, and out until it answers again. ``peek``, ``get``
    and ``put`` have lanes of their own and may be called by three threads at once; calls of one kind
    wait for each other, at most as long again. One ``get`` or ``put`` takes up to MAX_KEYS blocks.
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
    ) -> None:
        """Start connecting to ``nodes``, or those listed in ``nodes_file``, in the background.

        With ``copies`` above 1, stripes that are read often are copied to the next nodes of their ranking,
        and read there when their home is out or has lost them. Raises TransportError if UCX cannot be
        loaded, ConfigError if the file cannot be used.
        """
        self.deadline_s = deadline_s
        self._copies = copies
        node_list = NodeList(nodes, nodes_file)
        self.library = load_library(ucx_library)
        local = nodes_file is None and all(is_loopback(parse_address(node)[0]) for node in nodes)
        new_context = functools.partial(Context, self.library, tls=ucx_tls, loopback=local)
        self._context = new_context()
        self._memory = LocalMemory(self._context)
        self._peek_lane = Lane(None, reads=True)
        self._get_lane = Lane(self._context, reads=True)
        self._put_lane = Lane(self._context, reads=False)
        self._trials = Trials(new_context)
        self._counters = dict.fromkeys(PoolStatistics._fields, 0.0)
        self._requests = Requests(self._failed)
        self.membership = Membership(
            node_list,
            (self._peek_lane, self._get_lane, self._put_lane),
            self._trials,
            token=token,
            tls=tls,
            client=client,
            deadline_s=deadline_s,
        )
        self._reader = Reader(
            self._get_lane,
            self.membership,
            self._requests,
            self._memory,
            self.library,
            deadline_s=deadline_s,
            copies=copies,
            on_corrupt=lambda blocks: self._count(corrupt_blocks=blocks),
        )
        self._writer = Writer(
            self._put_lane, self.membership, self._requests, self._memory, deadline_s=deadline_s
        )

    def register(self, address: int, length: int) -> None:
        """Let the pool read and write ``length`` bytes at ``address``; blocks may only lie in such memory."""
        self._memory.register(address, length)

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
        present = np.zeros(len(chain), bool)
        with self._turn(self._peek_lane) as in_time:
            if not in_time:
                return 0
            started = time.monotonic()
            # A chain can be longer than a request may be; a part only matters if those before it are whole.
            for start in range(0, len(chain), MAX_KEYS):
                part = np.arange(start, min(start + MAX_KEYS, len(chain)))
                nodes = usable_nodes(self._peek_lane, self.membership.live)
                for place in range(self._copies):
                    routes = route_blocks(self._peek_lane, nodes, chain, part[~present[part]], place)
                    # A node that does not answer must not take the time of the next.
                    share = (place + 1) / self._copies
                    self._peek(chain, routes, started + share * self.deadline_s, present)
                if not present[part].all():
                    break
        return leading(present)

    def get(self, chain: Chain, pieces: Pieces, stages: Stages | None = None) -> npt.NDArray[np.bool_]:
        """Read blocks into ``pieces``; True where the bytes are there and their checksum is right.

        What comes after the first miss is not read: a prefix ends there. Where the answer is False the
        bytes of that block are undefined, and nothing will write to them after the call. With ``stages``
        all blocks come part by part, if all were found where they can be read in parts; otherwise no arrival
        is told. An arrival says nothing about the bytes: only the answer does, and it is for all parts.
        """
        started = time.monotonic()
        done = np.zeros(len(chain), bool)
        with self._turn(self._get_lane) as in_time:
            if in_time:
                done = self._reader.read(chain, pieces, stages)
        count = int(done.sum())
        self._count(got_blocks=count, got_bytes=count * pieces.block_bytes, missed_blocks=len(chain) - count)
        if count:
            self._count(get_s=time.monotonic() - started)
        return done

    def put(
        self, chain: Chain, pieces: Pieces, checksums: npt.NDArray[np.uint64] | None = None
    ) -> npt.NDArray[np.bool_]:
        """Write blocks from ``pieces``; True where the pool has the block, or is getting it from another.

        Where ``checksums`` are given, one per block, bytes that do not have theirs are not stored.
        """
        started = time.monotonic()
        with self._turn(self._put_lane) as in_time:
            if not in_time:
                return np.zeros(len(chain), bool)
            done = self._writer.write(chain, pieces, checksums)
        count, present = int(done.written.sum()), int(done.present.sum())
        self._count(put_blocks=count, put_bytes=count * pieces.block_bytes, present_blocks=present)
        if count:
            self._count(put_s=time.monotonic() - started)
        return done.present | done.written

    @contextlib.contextmanager
    def _turn(self, lane: Lane) -> Iterator[bool]:
        """Hold a lane's lock; False if others held it for a whole deadline, which is a miss."""
        in_time = lane.lock.acquire(timeout=self.deadline_s)
        try:
            yield in_time
        finally:
            if in_time:
                lane.lock.release()

    def _peek(
        self, chain: Chain, routes: list[Route], deadline: float, present: npt.NDArray[np.bool_]
    ) -> None:
        """Ask nodes, and mark what they have in ``present``."""
        lane = self._peek_lane
        sent = self._requests.send(
            lane,
            routes,
            lambda link, asked: Peek(link.control.next_id(), blob(chain.keys, asked)),
            deadline,
        )
        for route, reply in self._requests.collect(lane, sent, Peeked, deadline):
            present[route.blocks] = np.frombuffer(reply.present, np.uint8) == 1

    def _failed(self, address: str, reason: str) -> None:
        self._count(failed_batches=1)
        self.membership.down(address, reason)

    def _count(self, **increments: float) -> None:
        for name, value in increments.items():
            self._counters[name] += value
