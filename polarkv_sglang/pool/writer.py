"""Writing blocks: reserve slots, move the bytes, commit."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polarkv_sglang.pool.blocks import Chain, Pieces, blob
from polarkv_sglang.pool.link import Lane, Link
from polarkv_sglang.pool.membership import Membership
from polarkv_sglang.pool.memory import LocalMemory
from polarkv_sglang.pool.requests import Requests, Route, Streamed
from polarkv_sglang.pool.routes import Moved, Part, move, route_blocks, usable_nodes
from polarkv_sglang.transport import Direction
from polarkv_sglang.transport.columns import unpack_u64
from polarkv_sglang.transport.messages import (
    Commit,
    Committed,
    Fill,
    KeyState,
    Reserve,
    Reserved,
    Store,
    Stored,
)

# Of a batch's deadline, when its steps have to have ended, as in reading.
_RESERVE_BY = 0.5
_MOVE_BY = 0.8
_COMMIT_S = 0.1  # at least
# So much is sent to a node without asking what it has: the bytes take no longer than the question.
_UNASKED_BYTES = 1 << 20
# As plain numbers: a member of an enum takes a microsecond to look up.
_RESERVED, _PRESENT, _BUSY = int(KeyState.RESERVED), int(KeyState.PRESENT), int(KeyState.BUSY)


class Written(NamedTuple):
    """Masks over a chain."""

    present: npt.NDArray[np.bool_]  # the pool had it, or was getting it from another
    written: npt.NDArray[np.bool_]


class Writer:
    """Writes over one lane; the caller holds its lock and is one thread at a time."""

    def __init__(
        self,
        lane: Lane,
        membership: Membership,
        requests: Requests,
        memory: LocalMemory,
        *,
        deadline_s: float,
    ) -> None:
        self._lane = lane
        self._membership = membership
        self._requests = requests
        self._memory = memory
        self._deadline_s = deadline_s

    def write(self, chain: Chain, pieces: Pieces, checksums: npt.NDArray[np.uint64] | None) -> Written:
        """See ``PoolClient.put``."""
        started = time.monotonic()
        present = np.zeros(len(chain), bool)
        written = np.zeros(len(chain), bool)
        reserved: dict[str, tuple[int, Part]] = {}  # by node
        nodes = usable_nodes(self._lane, self._membership.live)
        routes = route_blocks(self._lane, nodes, chain, np.arange(len(chain)))
        storing = [route for route in routes if _is_small(route, pieces)]
        asking = [route for route in routes if not _is_small(route, pieces)]
        streaming = [self._store(chain, pieces, route, checksums) for route in storing]
        for route, reply in self._reserve(chain, pieces, asking, started + _RESERVE_BY * self._deadline_s):
            states = np.frombuffer(reply.states, np.uint8)
            present[route.blocks] = (states == _PRESENT) | (states == _BUSY)
            ours = states == _RESERVED
            if ours.any():
                if route.link.streamed:
                    streaming.append(_fill(Route(route.link, route.blocks[ours]), reply, checksums))
                    continue
                addresses = unpack_u64(reply.address_blob)[ours]
                part = Part(route.link, route.blocks[ours], addresses)
                reserved[route.link.address] = (reply.reservation, part)
        if streaming:
            share = _MOVE_BY if reserved else 1.0
            self._stream(streaming, pieces, started + share * self._deadline_s, present, written)
        if not reserved:
            return Written(present, written)
        moved = move(
            self._lane,
            Direction.PUT,
            self._memory,
            pieces,
            [part for _, part in reserved.values()],
            started + _MOVE_BY * self._deadline_s,
            self._requests,
        )
        if checksums is not None:
            moved = moved._replace(arrived=moved.arrived & (moved.checksums == checksums))
        # A transfer that had to be drained has used more than its share.
        commit_by = max(started + self._deadline_s, time.monotonic() + _COMMIT_S)
        for route in self._commit(reserved, moved, commit_by):
            written[route.blocks] = moved.arrived[route.blocks]
        return Written(present, written)

    def _store(
        self, chain: Chain, pieces: Pieces, route: Route, checksums: npt.NDArray[np.uint64] | None
    ) -> Streamed:
        message = Store(
            route.link.control.next_id(),
            blob(chain.keys, route.blocks),
            blob(chain.parents, route.blocks),
            pieces.block_bytes,
        )
        return Streamed(route, message, checksums[route.blocks] if checksums is not None else None)

    def _stream(
        self,
        calls: list[Streamed],
        pieces: Pieces,
        by: float,
        present: npt.NDArray[np.bool_],
        written: npt.NDArray[np.bool_],
    ) -> None:
        """Write through connections, and mark what became of the blocks."""
        for route, answer in self._requests.stream(self._lane, calls, pieces, by):
            if isinstance(answer.reply, Stored):
                states = np.frombuffer(answer.reply.states, np.uint8)
                present[route.blocks] = (states == _PRESENT) | (states == _BUSY)
                written[route.blocks] = (states == _RESERVED) & answer.right
            elif isinstance(answer.reply, Committed) and answer.reply.count == answer.right.sum():
                written[route.blocks] = answer.right

    def _reserve(
        self, chain: Chain, pieces: Pieces, routes: list[Route], by: float
    ) -> list[tuple[Route, Reserved]]:
        sent = self._requests.send(
            self._lane,
            routes,
            lambda link, blocks: Reserve(
                link.control.next_id(),
                blob(chain.keys, blocks),
                blob(chain.parents, blocks),
                pieces.block_bytes,
            ),
            by,
        )
        return self._requests.collect(self._lane, sent, Reserved, by)

    def _commit(self, reserved: dict[str, tuple[int, Part]], moved: Moved, by: float) -> list[Route]:
        """Make visible what arrived; the routes whose nodes have done so."""

        def commit(link: Link, blocks: npt.NDArray[np.intp]) -> Commit:
            return Commit(
                link.control.next_id(),
                reserved[link.address][0],
                moved.arrived[blocks].astype(np.uint8).tobytes(),
                moved.checksums[blocks].astype("<u8").tobytes(),
            )

        # A link that failed in the transfer is gone from the lane: its reservation expires by itself,
        # since a late put may still reach the slots.
        standing = [
            Route(part.link, part.blocks)
            for node, (_, part) in reserved.items()
            if self._lane.links.get(node) is part.link
        ]
        sent = self._requests.send(self._lane, standing, commit, by)
        replies = self._requests.collect(self._lane, sent, Committed, by)
        # Less is visible than was committed where the reservation had expired: nothing then.
        return [route for route, reply in replies if reply.count == moved.arrived[route.blocks].sum()]


def _is_small(route: Route, pieces: Pieces) -> bool:
    """Whether the blocks may go to their node unasked."""
    return route.link.streamed and len(route.blocks) * pieces.block_bytes <= _UNASKED_BYTES


def _fill(route: Route, reply: Reserved, checksums: npt.NDArray[np.uint64] | None) -> Streamed:
    message = Fill(route.link.control.next_id(), reply.reservation)
    return Streamed(route, message, checksums[route.blocks] if checksums is not None else None)
