"""Reading blocks: find them, move them, check them.

What nodes on this host have in their directories is read without asking them; all else under leases.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from polarkv_sglang.pool.blocks import Blocks, Chain, Pieces, Stages, blob, leading, positions
from polarkv_sglang.pool.heat import HotStripes
from polarkv_sglang.pool.link import Lane, Link
from polarkv_sglang.pool.membership import Membership
from polarkv_sglang.pool.memory import LocalMemory
from polarkv_sglang.pool.parts import pull_parts
from polarkv_sglang.pool.placement import ranking
from polarkv_sglang.pool.requests import Requests, Route
from polarkv_sglang.pool.routes import Moved, Part, move, route_blocks, usable_nodes
from polarkv_sglang.transport import CHUNK_BYTES, DRAIN_S, Direction, Library, checksums
from polarkv_sglang.transport.columns import checksums_from, pack_u64, seal, unpack_u64
from polarkv_sglang.transport.directory import READ, UNKNOWN, Looked, LookUp
from polarkv_sglang.transport.messages import (
    Fetch,
    Fetched,
    FetchState,
    Locate,
    Located,
    Pull,
    Pulled,
    Release,
    Replicate,
    ReportCorrupt,
    Used,
)
from polarkv_sglang.transport.stream import Answer, Call

logger = logging.getLogger(__name__)

# Of a batch's deadline, when its steps have to have ended: a node that freezes in one of them must not take
# the time of the others for the next. Where there are copies to turn to, the first look ends sooner.
_FIND_BY = 0.5
_FIND_FIRST_BY = 0.25
_PULL_BY = 0.65  # where other nodes' blocks have to be got still
_FETCH_BY = 0.8
_FETCH_FIRST_BY = 0.4


class _Batch(msgspec.Struct, frozen=True):
    """What one call reads."""

    chain: Chain
    pieces: Pieces
    nodes: Mapping[str, int]  # over which its stripes are ranked, also when one of them fails meanwhile
    started: float  # time.monotonic
    staged: bool  # part by part, if that can be done

    def pulls(self, route: Route) -> bool:
        """Whether blocks come through their link's connection."""
        if self.staged:
            return route.link.streamed
        return route.link.carries(len(route.blocks) * self.pieces.block_bytes)


class _Found(NamedTuple):
    """Blocks of one memory node: leased and to be got, or here already."""

    link: Link
    lease: int  # 0: none of ours
    blocks: Blocks
    addresses: npt.NDArray[np.uint64] | None  # in the node; None: the bytes are here already
    checksums: npt.NDArray[np.uint64] | None  # None: they have been compared
    generations: npt.NDArray[np.uint64]
    right: npt.NDArray[np.bool_] | None = None  # whether the bytes that are here are, if it is known already


class Reader:
    """Reads over one lane; the caller holds its lock and is one thread at a time."""

    def __init__(
        self,
        lane: Lane,
        membership: Membership,
        requests: Requests,
        memory: LocalMemory,
        library: Library,
        *,
        deadline_s: float,
        copies: int,
        on_corrupt: Callable[[], None],
    ) -> None:
        self._lane = lane
        self._membership = membership
        self._requests = requests
        self._memory = memory
        self._library = library
        self._directories = LookUp(library)
        self._deadline_s = deadline_s
        # Until a transfer that is given up at its deadline can touch nothing any more.
        self._lease_s = 2 * (deadline_s + DRAIN_S)
        self._copies = copies
        self._heat = HotStripes()
        self._on_corrupt = on_corrupt

    def read(self, chain: Chain, pieces: Pieces, stages: Stages | None = None) -> bytes:
        """See ``PoolClient.get``; per block 1 or 0."""
        nodes = usable_nodes(self._lane, self._membership.live)
        batch = _Batch(chain, pieces, nodes, time.monotonic(), stages is not None)
        if stages is not None:
            routes = route_blocks(self._lane, nodes, chain, positions(len(chain.keys)))
            share = _FETCH_FIRST_BY if self._copies > 1 else _FETCH_BY
            by = batch.started + share * self._deadline_s
            answers = pull_parts(self._lane, self._requests, routes, chain, pieces, stages, by)
            if answers is not None:
                # Their checksums are those of whole blocks, which are here only now.
                pulled = [_pulled(*answer)._replace(right=None) for answer in answers]
                done = self._take(batch, pulled)
                if self._copies > 1:
                    self._spread(chain, pulled, done)
                return done.tobytes()
        routes = route_blocks(self._lane, nodes, chain, positions(len(chain.keys)))
        whole = len(routes) == 1 and len(routes[0].blocks) == len(chain.keys)
        looked = self._look_up(batch, routes) if stages is None else None
        if self._copies == 1:
            if looked is not None and looked.states.count(READ) == len(chain.keys):
                return looked.states  # READ is 1
            if looked is None and whole and batch.pulls(routes[0]):
                return self._pull_all(batch, routes[0])
        found = [_looked_up(route, looked) for route in routes] if looked is not None else []
        located = np.zeros(len(chain), bool)
        for part in found:
            located[part.blocks] = True
        for place in range(self._copies):
            for part in self._find(batch, np.flatnonzero(~located), place):
                located[part.blocks] = True
                found.append(part)
        end = leading(located)
        if end < len(chain) or any(part.addresses is None for part in found):
            stages = None
        done = self._take(batch, [_head(part, end) for part in found], stages)
        lost = np.flatnonzero(~done[:end])
        # Their node failed since. Stages that were told of have been used, so there it is too late.
        if len(lost) and self._copies > 1 and stages is None:
            again = self._find(batch, lost, 1)
            done |= self._take(batch, again)
            found += again
        for part in found:
            if part.lease:
                self._requests.tell(self._lane, part.link, Release(part.lease))
        if self._copies > 1:
            self._spread(chain, found, done)
        return done.tobytes()

    def _look_up(self, batch: _Batch, routes: list[Route]) -> Looked | None:
        """Read all blocks by their nodes' directories; nothing, and None, unless these have them all."""
        chain, pieces = batch.chain, batch.pieces
        directories = [route.link.directory for route in routes if route.link.directory is not None]
        if len(directories) < len(routes) or sum(len(route.blocks) for route in routes) < len(chain.keys):
            return None
        which = None
        if len(routes) > 1:
            which = np.empty(len(chain.keys), np.uint32)
            for number, route in enumerate(routes):
                which[route.blocks] = number
        looked = self._directories.read(
            directories,
            which,
            b"".join(chain.keys),
            pieces.of(positions(len(chain.keys))),
            pieces.piece_bytes,
            batch.started + self._deadline_s - time.monotonic(),
        )
        if looked is not None:
            for route, directory in zip(routes, directories):
                if directory.untold:
                    self._requests.tell(self._lane, route.link, Used(blob(chain.keys, route.blocks)))
        return looked

    def _find(self, batch: _Batch, blocks: Blocks, place: int) -> list[_Found]:
        """Blocks that the nodes at ``place`` of the rankings have; what they put has arrived by then."""
        routes = route_blocks(self._lane, batch.nodes, batch.chain, blocks, place)
        length = batch.pieces.block_bytes
        first_of_several = place == 0 and self._copies > 1
        fetch_by = batch.started + (_FETCH_FIRST_BY if first_of_several else _FETCH_BY) * self._deadline_s
        fetching = self._requests.send(
            self._lane,
            [route for route in routes if route.link.pushed],
            lambda link, wanted: self._fetch(batch, link, wanted, fetch_by),
            fetch_by,
        )
        share = _FIND_FIRST_BY if first_of_several else _FIND_BY
        find_by = batch.started + share * self._deadline_s
        locating = self._requests.send(
            self._lane,
            [route for route in routes if not (route.link.pushed or batch.pulls(route))],
            lambda link, wanted: Locate(
                link.control.next_id(), blob(batch.chain.keys, wanted), self._lease_s
            ),
            find_by,
        )
        located = self._requests.collect(self._lane, locating, Located, find_by)
        found = [_located(route, reply, length) for route, reply in located if reply.lease]
        pulling = [_pull(batch, route) for route in routes if batch.pulls(route)]
        pull_by = min(fetch_by, batch.started + _PULL_BY * self._deadline_s) if found else fetch_by
        pulled = self._requests.stream(self._lane, pulling, batch.pieces.piece_bytes, pull_by)
        found += [_pulled(route, answer) for route, answer in pulled]
        fetched = self._requests.collect_pushed(self._lane, fetching, Fetched, fetch_by)
        failed = [route.link for route, reply in fetched if FetchState.FAILED in reply.states]
        if failed and len(fetched) == len(fetching):
            self._requests.replace_worker(self._lane)  # what was put may still be under way
        for link in failed:
            self._requests.fail(self._lane, link, "it could not put what was read into this process's memory")
        return found + [_fetched(route, reply) for route, reply in fetched]

    def _pull_all(self, batch: _Batch, route: Route) -> bytes:
        """What ``read`` does, in fewer steps, where one connection leads to all blocks: the steps are half of
        the time that a small block takes."""
        by = batch.started + _FETCH_BY * self._deadline_s
        pulling = [_pull(batch, route)]
        done = b""
        for _, answer in self._requests.stream(self._lane, pulling, batch.pieces.piece_bytes, by):
            if 0 in answer.right:
                return self._take(batch, [_pulled(route, answer)]).tobytes()
            done = answer.right
        return done.ljust(len(batch.chain.keys), b"\0")

    def _fetch(self, batch: _Batch, link: Link, blocks: Blocks, by: float) -> Fetch:
        assert self._lane.worker is not None
        targets = batch.pieces.addresses[blocks]
        worker_address, regions = self._lane.worker.address, self._memory.regions
        rkeys = list(regions.rkeys)
        return Fetch(
            request_id=link.control.next_id(),
            keys=blob(batch.chain.keys, blocks),
            timeout_s=max(0.001, by - time.monotonic()),
            worker_address=worker_address,
            rkeys=rkeys,
            seal=seal(worker_address, rkeys),
            pieces=targets.shape[1],
            piece_bytes=batch.pieces.piece_bytes,
            target_blob=targets.astype("<u8").tobytes(),
            region_blob=regions.locate(targets).astype("<u8").tobytes(),
        )

    def _take(
        self, batch: _Batch, found: list[_Found], stages: Stages | None = None
    ) -> npt.NDArray[np.bool_]:
        """Get what has not arrived, check everything; a mask over the chain of what is right."""
        chain, pieces = batch.chain, batch.pieces
        leased = [
            Part(part.link, part.blocks, part.addresses) for part in found if part.addresses is not None
        ]
        deadline = batch.started + self._deadline_s
        if stages is None:
            moved = move(self._lane, Direction.GET, self._memory, pieces, leased, deadline, self._requests)
        else:
            moved = self._take_stages(pieces, leased, deadline, stages)
        done = np.zeros(len(chain), bool)
        for part in found:
            arrived = np.ones(len(part.blocks), bool)
            if part.right is not None:
                right = part.right
            elif part.addresses is None:
                right = self._checksums(pieces, part.blocks) == part.checksums
            else:
                arrived = moved.arrived[part.blocks]
                right = moved.checksums[part.blocks] == part.checksums
            done[part.blocks] = arrived & right
            for position in np.flatnonzero(arrived & ~right).tolist():
                self._report(chain.keys[part.blocks[position]], part.link, int(part.generations[position]))
        return done

    def _take_stages(self, pieces: Pieces, parts: list[Part], deadline: float, stages: Stages) -> Moved:
        """Get blocks stage by stage; their checksums, which are those of whole blocks, come at the end.

        Where no chunk lies in two pieces, each is digested as it comes, and the bytes are not read again.
        """
        arrived = np.ones(len(pieces.addresses), bool)
        chunks, rest = divmod(pieces.piece_bytes, CHUNK_BYTES)
        digested = pieces.checksums is None and rest == 0
        # Zeros: what no part has is wrong, and not what memory held of an earlier read.
        digests = np.zeros((len(arrived), pieces.addresses.shape[1] * chunks if digested else 0), np.uint64)
        for number, columns in enumerate(stages.columns):
            for run in columns:
                start = np.uint64(run.start * pieces.piece_bytes)
                its_chunks = slice(run.start * chunks, run.stop * chunks)
                moved = move(
                    self._lane,
                    Direction.GET,
                    self._memory,
                    pieces._replace(addresses=np.ascontiguousarray(pieces.addresses[:, run])),
                    [part._replace(addresses=part.addresses + start) for part in parts],
                    deadline,
                    self._requests,
                    digest=digested,
                    digests=digests[:, its_chunks] if digested else None,
                )
                arrived &= moved.arrived
            if not arrived.all():  # what the rest of these blocks is, nobody asks any more
                return Moved(np.zeros_like(arrived), np.zeros(len(arrived), np.uint64))
            stages.on_arrival(number)
        if digested:
            return Moved(arrived, checksums_from(digests))
        return Moved(arrived, self._checksums(pieces, np.arange(len(arrived))))

    def _checksums(self, pieces: Pieces, blocks: Blocks) -> npt.NDArray[np.uint64]:
        """Of blocks that are here."""
        if pieces.checksums is not None:
            return pieces.checksums(blocks)
        return checksums(self._library, pieces.addresses[blocks], pieces.piece_bytes)

    def _report(self, key: bytes, link: Link, generation: int) -> None:
        """A block is not what was written."""
        self._on_corrupt()
        logger.error(
            "PolarKV: block %s from %s has a wrong checksum; it is dropped from the pool",
            key.hex(),
            link.address,
        )
        self._requests.tell(self._lane, link, ReportCorrupt(key, pack_u64([generation])))

    def _spread(self, chain: Chain, found: list[_Found], done: npt.NDArray[np.bool_]) -> None:
        """Have nodes copy what is read often, and what was read away from home, to where it belongs."""
        stripes: dict[bytes, tuple[Link, list[int]]] = {}
        for part in found:
            for block in part.blocks[done[part.blocks]].tolist():
                stripes.setdefault(chain.anchors[block], (part.link, []))[1].append(block)
        hot = self._heat.count(stripes)
        copying: dict[tuple[str, str], list[int]] = {}
        for anchor, (link, blocks) in stripes.items():
            nodes = ranking(anchor, self._membership.live, self._copies)
            if anchor in hot or (nodes and link.address != nodes[0]):
                for node in nodes:
                    if node != link.address:
                        copying.setdefault((link.address, node), []).extend(blocks)
        for (source, target), blocks in copying.items():
            if source in self._lane.links:
                keys = blob(chain.keys, np.unique(blocks))
                self._requests.tell(self._lane, self._lane.links[source], Replicate(keys, target))


def _looked_up(route: Route, looked: Looked) -> _Found:
    states = np.frombuffer(looked.states, np.uint8)[route.blocks]
    there = states != UNKNOWN
    blocks = route.blocks[there]
    return _Found(route.link, 0, blocks, None, None, looked.generations[blocks], states[there] == READ)


def _located(route: Route, reply: Located, block_bytes: int) -> _Found:
    hits = unpack_u64(reply.length_blob) == block_bytes
    return _Found(
        route.link,
        reply.lease,
        route.blocks[hits],
        unpack_u64(reply.address_blob)[hits],
        unpack_u64(reply.checksum_blob)[hits],
        unpack_u64(reply.generation_blob)[hits],
    )


def _fetched(route: Route, reply: Fetched) -> _Found:
    sent = np.frombuffer(reply.states, np.uint8) == FetchState.SENT
    return _Found(
        route.link,
        0,
        route.blocks[sent],
        None,
        unpack_u64(reply.checksum_blob)[sent],
        unpack_u64(reply.generation_blob)[sent],
    )


def _pull(batch: _Batch, route: Route) -> tuple[Route, Call]:
    control = route.link.control
    message = Pull(control.next_id(), blob(batch.chain.keys, route.blocks), batch.pieces.block_bytes)
    return route, Call(control, message, batch.pieces.of(route.blocks))


def _pulled(route: Route, answer: Answer) -> _Found:
    assert isinstance(answer.reply, Pulled)
    checksums = unpack_u64(answer.reply.checksum_blob)
    return _Found(
        route.link,
        0,
        route.blocks[: len(checksums)],
        None,
        checksums,
        unpack_u64(answer.reply.generation_blob),
        np.frombuffer(answer.right, np.bool_),
    )


def _head(part: _Found, end: int) -> _Found:
    """The blocks of a part that lie before position ``end`` of the chain."""
    kept = part.blocks < end
    return part._replace(
        blocks=part.blocks[kept],
        addresses=part.addresses[kept] if part.addresses is not None else None,
        checksums=part.checksums[kept] if part.checksums is not None else None,
        generations=part.generations[kept],
        right=part.right[kept] if part.right is not None else None,
    )
