"""The pool as one rank uses it: look blocks up, get them, put them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from polarkv_sglang.errors import NodeError, TransportError
from polarkv_sglang.pool.blocks import Chain, Pieces
from polarkv_sglang.pool.membership import Lane, Link, Membership
from polarkv_sglang.pool.memory import LocalMemory
from polarkv_sglang.pool.placement import place
from polarkv_sglang.transport import OPERATION, Context, Direction, load_library
from polarkv_sglang.transport.control import answers
from polarkv_sglang.transport.messages import (
    MAX_KEYS,
    Commit,
    Committed,
    KeyState,
    Locate,
    Located,
    Message,
    Peek,
    Peeked,
    Release,
    ReportCorrupt,
    Request,
    Reserve,
    Reserved,
    pack_u64,
    unpack_u64,
)

logger = logging.getLogger(__name__)

ReplyT = TypeVar("ReplyT", bound=Message)
Blocks = npt.NDArray[np.intp]  # positions in a chain

# Until a transfer that is given up at its deadline can touch nothing any more.
_LEASE_DEADLINES = 4
# Of a batch's deadline, when its steps have to have ended: a node that freezes in one of them must not take
# the time of the others for the next.
_FIND_BY = 0.5
_WRITE_BY = 0.8


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


class _Route(NamedTuple):
    link: Link
    blocks: Blocks  # of the chain, in order


class _Found(NamedTuple):
    """Blocks of one memory node that can be read."""

    link: Link
    lease: int
    blocks: Blocks
    addresses: npt.NDArray[np.uint64]
    checksums: list[int]
    generations: npt.NDArray[np.uint64]


class PoolClient:
    """One rank's client of all memory nodes.

    No method raises for what a memory node does, and none takes much longer than ``deadline_s``: a node
    that is absent, frozen, dead or wrong is a miss, and out until it answers again. ``peek``, ``get``
    and ``put`` have lanes of their own and may be called by three threads at once; calls of one kind
    wait for each other.
    """

    def __init__(
        self,
        nodes: Sequence[str],
        *,
        token: str | None = None,
        deadline_s: float = 1.0,
        client: str = "rank",
        ucx_library: str | None = None,
        ucx_tls: str | None = None,
    ) -> None:
        """Start connecting to ``nodes`` in the background. TransportError if UCX cannot be loaded."""
        self.deadline_s = deadline_s
        self.library = load_library(ucx_library)
        self._context = Context(self.library, tls=ucx_tls)
        self._memory = LocalMemory(self._context)
        self._peek_lane = Lane("peek", None)
        self._get_lane = Lane("get", self._context)
        self._put_lane = Lane("put", self._context)
        self._counters = dict.fromkeys(PoolStatistics._fields, 0.0)
        self.membership = Membership(
            nodes,
            (self._peek_lane, self._get_lane, self._put_lane),
            token=token,
            client=client,
            deadline_s=deadline_s,
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
        for lane in (self._peek_lane, self._get_lane, self._put_lane):
            lane.close()
        self._memory.close()
        self._context.close()

    def peek(self, chain: Chain) -> int:
        """How many blocks at the head of the chain are in the pool; they are neither touched nor leased."""
        deadline = time.monotonic() + self.deadline_s
        present = np.zeros(len(chain), bool)
        lane = self._peek_lane
        with lane.lock:
            # A chain can be longer than a request may be; a part only matters if those before it are whole.
            for start in range(0, len(chain), MAX_KEYS):
                part = np.arange(start, min(start + MAX_KEYS, len(chain)))
                replies = self._ask(
                    lane,
                    self._routes(lane, chain, part),
                    lambda link, blocks: Peek(link.control.next_id(), _blob(chain.keys, blocks)),
                    Peeked,
                    deadline,
                )
                for route, reply in replies:
                    present[route.blocks] = np.frombuffer(reply.present, np.uint8) == 1
                if not present[part].all():
                    break
        return _leading(present)

    def get(self, chain: Chain, pieces: Pieces) -> npt.NDArray[np.bool_]:
        """Read blocks into ``pieces``; True where the bytes are there and their checksum is right.

        What comes after the first miss is not read: a prefix ends there. Where the answer is False the
        bytes of that block are undefined, and nothing will write to them after the call.
        """
        started = time.monotonic()
        deadline = started + self.deadline_s
        done = np.zeros(len(chain), bool)
        lane = self._get_lane
        with lane.lock:
            found = self._locate(lane, chain, pieces.block_bytes, started + _FIND_BY * self.deadline_s)
            located = np.zeros(len(chain), bool)
            for part in found:
                located[part.blocks] = True
            wanted = _leading(located)
            found = [_head(part, wanted) for part in found]
            done = self._read(lane, chain, pieces, found, deadline)
            for part in found:
                self._tell(lane, part.link, Release(part.lease))
        count = int(done.sum())
        self._count(got_blocks=count, got_bytes=count * pieces.block_bytes, missed_blocks=len(chain) - count)
        if count:
            self._count(get_s=time.monotonic() - started)
        return done

    def put(self, chain: Chain, pieces: Pieces) -> npt.NDArray[np.bool_]:
        """Write blocks from ``pieces``; True where the pool has the block, or is getting it from another."""
        started = time.monotonic()
        deadline = started + self.deadline_s
        done = np.zeros(len(chain), bool)
        lane = self._put_lane
        with lane.lock:
            replies = self._ask(
                lane,
                self._routes(lane, chain, np.arange(len(chain))),
                lambda link, blocks: Reserve(
                    link.control.next_id(),
                    _blob(chain.keys, blocks),
                    _blob(chain.parents, blocks),
                    pieces.block_bytes,
                ),
                Reserved,
                started + _FIND_BY * self.deadline_s,
            )
            reserved: list[tuple[Link, int, Blocks, npt.NDArray[np.uint64]]] = []
            for route, reply in replies:
                states = np.frombuffer(reply.states, np.uint8)
                done[route.blocks] = (states == KeyState.PRESENT) | (states == KeyState.BUSY)
                ours = states == KeyState.RESERVED
                if ours.any():
                    addresses = unpack_u64(reply.address_blob)[ours]
                    reserved.append((route.link, reply.reservation, route.blocks[ours], addresses))
            present = int(done.sum())
            written = self._write(lane, pieces, reserved, started + _WRITE_BY * self.deadline_s, deadline)
            done |= written
        count = int(written.sum())
        self._count(put_blocks=count, put_bytes=count * pieces.block_bytes, present_blocks=present)
        if count:
            self._count(put_s=time.monotonic() - started)
        return done

    def _locate(self, lane: Lane, chain: Chain, block_bytes: int, deadline: float) -> list[_Found]:
        replies = self._ask(
            lane,
            self._routes(lane, chain, np.arange(len(chain))),
            lambda link, blocks: Locate(
                link.control.next_id(), _blob(chain.keys, blocks), _LEASE_DEADLINES * self.deadline_s
            ),
            Located,
            deadline,
        )
        found = []
        for route, reply in replies:
            hits = unpack_u64(reply.length_blob) == block_bytes
            if reply.lease:
                found.append(
                    _Found(
                        route.link,
                        reply.lease,
                        route.blocks[hits],
                        unpack_u64(reply.address_blob)[hits],
                        unpack_u64(reply.checksum_blob)[hits].tolist(),
                        unpack_u64(reply.generation_blob)[hits],
                    )
                )
        return found

    def _read(
        self, lane: Lane, chain: Chain, pieces: Pieces, found: list[_Found], deadline: float
    ) -> npt.NDArray[np.bool_]:
        arrived = self._transfer(
            lane,
            Direction.GET,
            pieces,
            [(part.link, part.blocks, part.addresses) for part in found],
            deadline,
        )
        done = np.zeros(len(chain), bool)
        for part in found:
            positions = np.flatnonzero(arrived[part.blocks]).tolist()
            sums = self._memory.checksums(pieces, part.blocks[positions])
            for position, checksum in zip(positions, sums):
                block = part.blocks[position]
                if checksum == part.checksums[position]:
                    done[block] = True
                else:
                    self._count(corrupt_blocks=1)
                    logger.error(
                        "PolarKV: block %s from %s has a wrong checksum; it is dropped from the pool",
                        chain.keys[block].hex(),
                        part.link.address,
                    )
                    generation = int(part.generations[position])
                    self._tell(lane, part.link, ReportCorrupt(chain.keys[block], pack_u64([generation])))
        return done

    def _write(
        self,
        lane: Lane,
        pieces: Pieces,
        reserved: list[tuple[Link, int, Blocks, npt.NDArray[np.uint64]]],
        put_deadline: float,
        deadline: float,
    ) -> npt.NDArray[np.bool_]:
        """Put and commit reserved blocks; a mask over the chain of those that are visible now."""
        sums = [self._memory.checksums(pieces, blocks) for _, _, blocks, _ in reserved]
        arrived = self._transfer(
            lane,
            Direction.PUT,
            pieces,
            [(link, blocks, addresses) for link, _, blocks, addresses in reserved],
            put_deadline,
        )
        commits = {
            link.address: (reservation, arrived[blocks], checksums)
            for (link, reservation, blocks, _), checksums in zip(reserved, sums)
        }
        written = np.zeros(len(pieces.addresses), bool)
        replies = self._ask(
            lane,
            # A link that failed in the transfer is gone from the lane: its reservation expires by itself,
            # since a late put may still reach the slots.
            [_Route(link, blocks) for link, _, blocks, _ in reserved if link.address in lane.links],
            lambda link, blocks: Commit(
                link.control.next_id(),
                commits[link.address][0],
                commits[link.address][1].astype(np.uint8).tobytes(),
                pack_u64(commits[link.address][2]),
            ),
            Committed,
            deadline,
        )
        for route, _ in replies:
            written[route.blocks] = arrived[route.blocks]
        return written

    def _transfer(
        self,
        lane: Lane,
        direction: Direction,
        pieces: Pieces,
        parts: Sequence[tuple[Link, Blocks, npt.NDArray[np.uint64]]],
        deadline: float,
    ) -> npt.NDArray[np.bool_]:
        """Move whole blocks between ``pieces`` and the memory nodes; a mask of the blocks that arrived."""
        arrived = np.zeros(len(pieces.addresses), bool)
        parts = [part for part in parts if len(part[1])]
        if not parts or lane.worker is None:
            return arrived
        count = pieces.addresses.shape[1]
        blocks = np.concatenate([part[1] for part in parts])
        operations = np.empty((len(blocks), count), OPERATION)
        operations["local"] = pieces.addresses[blocks]
        remote = np.concatenate([part[2] for part in parts])
        operations["remote"] = remote[:, None] + np.arange(count, dtype=np.uint64) * np.uint64(
            pieces.piece_bytes
        )
        operations["length"] = pieces.piece_bytes
        operations["endpoint"] = np.repeat(np.arange(len(parts)), [len(part[1]) for part in parts])[:, None]
        operations["memory"] = self._memory.locate(operations["local"])
        links = [part[0] for part in parts]
        try:
            status = lane.worker.transfer(
                direction,
                operations.reshape(-1),
                [link.endpoint for link in links if link.endpoint is not None],
                self._memory.memories,
                [link.remote_key for link in links if link.remote_key is not None],
                max(0.0, deadline - time.monotonic()),
            )
        except TransportError as error:
            if not lane.worker.statistics().poisoned:
                raise
            lane.replace_worker()
            for link in links:
                self._fail(lane, link, str(error))
            return arrived
        arrived[blocks] = (status.reshape(len(blocks), count) == 0).all(axis=1)
        for link in links:
            if link.endpoint is not None and link.endpoint.failed is not None:
                self._fail(lane, link, link.endpoint.failed)
        return arrived

    def _routes(self, lane: Lane, chain: Chain, blocks: Blocks) -> list[_Route]:
        """The given blocks of the chain by the link to the node where they belong."""
        live = self.membership.live
        usable = {address: size for address, size in live.items() if address in lane.links}
        if not usable or not len(blocks):
            return []
        if len(usable) == 1:
            return [_Route(lane.links[next(iter(usable))], blocks)]
        homes: dict[bytes, str] = {}
        by_node: dict[str, list[int]] = {}
        for block in blocks.tolist():
            anchor = chain.anchors[block]
            home = homes.get(anchor)
            if home is None:
                home = homes[anchor] = place(anchor, usable)
            by_node.setdefault(home, []).append(block)
        return [_Route(lane.links[node], np.array(positions)) for node, positions in by_node.items()]

    def _ask(
        self,
        lane: Lane,
        routes: Sequence[_Route],
        request: Callable[[Link, Blocks], Request],
        reply_type: type[ReplyT],
        deadline: float,
    ) -> list[tuple[_Route, ReplyT]]:
        """Send a request to each node, then collect: they work at once. Those that fail are left out."""
        sent: list[tuple[_Route, Request]] = []
        for route in routes:
            message = request(route.link, route.blocks)
            try:
                route.link.control.send(message, max(0.001, deadline - time.monotonic()))
            except NodeError as error:
                self._fail(lane, route.link, str(error))
            else:
                sent.append((route, message))
        replies: list[tuple[_Route, ReplyT]] = []
        for route, message in sent:
            try:
                reply = route.link.control.receive(deadline)
            except NodeError as error:
                self._fail(lane, route.link, str(error))
                continue
            if isinstance(reply, reply_type) and answers(reply, message):
                replies.append((route, reply))
            else:
                self._fail(lane, route.link, f"answered {type(message).__name__} with another message")
        return replies

    def _tell(self, lane: Lane, link: Link, message: Release | ReportCorrupt) -> None:
        """Send what has no reply, if the link still stands."""
        if lane.links.get(link.address) is not link:
            return
        try:
            link.control.send(message, self.deadline_s)
        except NodeError as error:
            self._fail(lane, link, str(error))

    def _fail(self, lane: Lane, link: Link, reason: str) -> None:
        self._count(failed_batches=1)
        if lane.links.get(link.address) is link:
            lane.drop(link.address)
        self.membership.down(link.address, reason)

    def _count(self, **increments: float) -> None:
        for name, value in increments.items():
            self._counters[name] += value


def _blob(keys: Sequence[bytes], blocks: Blocks) -> bytes:
    return b"".join([keys[block] for block in blocks.tolist()])


def _leading(mask: npt.NDArray[np.bool_]) -> int:
    """How many True the mask begins with."""
    return len(mask) if mask.all() else int(mask.argmin())


def _head(part: _Found, end: int) -> _Found:
    """The blocks of a part that lie before position ``end`` of the chain."""
    kept = part.blocks < end
    return part._replace(
        blocks=part.blocks[kept],
        addresses=part.addresses[kept],
        checksums=[checksum for checksum, keep in zip(part.checksums, kept.tolist()) if keep],
        generations=part.generations[kept],
    )
