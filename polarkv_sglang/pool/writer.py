"""Writing blocks: to slots that are granted, see ahead.py; else reserve some, move the bytes, commit."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from polarkv_sglang.pool.ahead import Ahead
from polarkv_sglang.pool.blocks import Chain, Pieces, blob, positions, spread
from polarkv_sglang.pool.link import Lane, Link
from polarkv_sglang.pool.membership import Membership
from polarkv_sglang.pool.memory import LocalMemory
from polarkv_sglang.pool.requests import Requests, Route, Sent
from polarkv_sglang.pool.routes import Moved, Part, move, route_blocks, usable_nodes
from polarkv_sglang.transport import Direction, Library
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
from polarkv_sglang.transport.stream import Call

# Of a batch's deadline, when its steps have to have ended, as in reading.
_RESERVE_BY = 0.5
_STREAM_BY = 0.65  # where other nodes' blocks have to be moved still
_MOVE_BY = 0.8
_COMMIT_S = 0.1  # at least
# So much is sent to a node without asking what it has: the bytes take no longer than the question.
_UNASKED_BYTES = 1 << 20
# What became of a block, as one byte; 0: the pool does not have it.
WRITTEN, PRESENT = 1, 2  # by this call; before it, or by another that is at it
_WRITTEN = bytes([WRITTEN])
# Of what a node says of its keys; what it has reserved is written once the bytes are there.
_OUTCOME: dict[int, int] = {KeyState.RESERVED: WRITTEN, KeyState.PRESENT: PRESENT, KeyState.BUSY: PRESENT}
_OUTCOMES = bytes(_OUTCOME.get(state, 0) for state in range(256))


class Writer:
    """Writes over one lane; the caller holds its lock and is one thread at a time."""

    def __init__(
        self,
        lane: Lane,
        membership: Membership,
        requests: Requests,
        memory: LocalMemory,
        library: Library,
        *,
        deadline_s: float,
    ) -> None:
        self._lane = lane
        self._membership = membership
        self._requests = requests
        self._memory = memory
        self._ahead = Ahead(lane, requests, library, deadline_s=deadline_s)
        self._deadline_s = deadline_s

    def write(self, chain: Chain, pieces: Pieces, checksums: npt.NDArray[np.uint64] | None) -> bytes:
        """See ``PoolClient.put``; per block WRITTEN, PRESENT or 0."""
        started = time.monotonic()
        nodes = usable_nodes(self._lane, self._membership.live)
        routes = route_blocks(self._lane, nodes, chain, positions(len(chain.keys)))
        if len(routes) == 1 and len(routes[0].blocks) == len(chain.keys):
            # The rest in fewer steps: these are half of the time that a small block takes.
            states = self._ahead.write(chain, pieces, routes[0], checksums, started, alone=True)
            if states is not None:
                return states  # WRITTEN and PRESENT are what they are there
            return self._write(chain, pieces, [], routes, checksums, started)
        near = [route for route in routes if route.link.granted is not None]
        far = [route for route in routes if route.link.granted is None]
        return self._write(chain, pieces, near, far, checksums, started)

    def _write(
        self,
        chain: Chain,
        pieces: Pieces,
        near: list[Route],
        far: list[Route],
        checksums: npt.NDArray[np.uint64] | None,
        started: float,
    ) -> bytes:
        """Write to slots ahead where nodes are ``near``, if these suffice, and ask those that are ``far``."""
        outcomes = bytearray(len(chain.keys))
        reserved: dict[str, tuple[int, Part]] = {}  # by node
        streaming: list[tuple[Route, Call]] = []
        reserve_by = started + _RESERVE_BY * self._deadline_s
        # They work while blocks are copied for the others.
        sent = self._reserve(chain, pieces, far, checksums, reserve_by, streaming)
        for route in near:
            states = self._ahead.write(chain, pieces, route, checksums, started, alone=False)
            if states is not None:
                spread(states, route.blocks, outcomes)
            else:
                sent += self._reserve(chain, pieces, [route], checksums, reserve_by, streaming)
        for route, reply in self._requests.collect(self._lane, sent, Reserved, reserve_by):
            its = reply.states.translate(_OUTCOMES)
            spread(its.replace(_WRITTEN, b"\0"), route.blocks, outcomes)  # not yet
            ours = np.frombuffer(its, np.uint8) == WRITTEN
            if not ours.any():
                continue
            blocks = route.blocks[ours]
            if route.link.streamed:
                streaming.append(_fill(pieces, Route(route.link, blocks), reply, checksums))
            else:
                part = Part(route.link, blocks, unpack_u64(reply.address_blob)[ours])
                reserved[route.link.address] = reply.reservation, part
        if streaming:
            share = _STREAM_BY if reserved else 1.0
            self._stream(streaming, pieces.piece_bytes, started + share * self._deadline_s, outcomes)
        if reserved:
            self._move(reserved, pieces, checksums, started, outcomes)
        return bytes(outcomes)

    def _stream(
        self, calls: list[tuple[Route, Call]], piece_bytes: int, by: float, outcomes: bytearray
    ) -> None:
        """Write through connections, and mark what became of the blocks."""
        for route, answer in self._requests.stream(self._lane, calls, piece_bytes, by):
            reply, right = answer.reply, answer.right
            if isinstance(reply, Stored):
                its = reply.states.translate(_OUTCOMES)
                if 0 in right:
                    its = bytes([one if ok or one == PRESENT else 0 for one, ok in zip(its, right)])
                spread(its, route.blocks, outcomes)
            elif isinstance(reply, Committed) and reply.count == right.count(1):
                spread(right, route.blocks, outcomes)  # WRITTEN is 1

    def _move(
        self,
        reserved: dict[str, tuple[int, Part]],
        pieces: Pieces,
        checksums: npt.NDArray[np.uint64] | None,
        started: float,
        outcomes: bytearray,
    ) -> None:
        """Write to the slots that nodes have reserved, commit, and mark what is written."""
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
            spread(moved.arrived[route.blocks].tobytes(), route.blocks, outcomes)  # WRITTEN is 1

    def _reserve(
        self,
        chain: Chain,
        pieces: Pieces,
        routes: list[Route],
        checksums: npt.NDArray[np.uint64] | None,
        by: float,
        streaming: list[tuple[Route, Call]],
    ) -> list[Sent]:
        """Ask for slots, or have the blocks ``streaming`` where that is quicker."""
        asking: list[Route] = []
        for route in routes:
            size = len(route.blocks) * pieces.block_bytes
            if size <= _UNASKED_BYTES and route.link.carries(size):
                streaming.append(_store(chain, pieces, route, checksums))
            else:
                asking.append(route)
        return self._requests.send(
            self._lane,
            asking,
            lambda link, blocks: Reserve(
                link.control.next_id(),
                blob(chain.keys, blocks),
                blob(chain.parents, blocks),
                pieces.block_bytes,
            ),
            by,
        )

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


def _store(
    chain: Chain, pieces: Pieces, route: Route, checksums: npt.NDArray[np.uint64] | None
) -> tuple[Route, Call]:
    control, blocks = route.link.control, route.blocks
    keys, parents = blob(chain.keys, blocks), blob(chain.parents, blocks)
    message = Store(control.next_id(), keys, parents, pieces.block_bytes)
    return route, Call(
        control, message, pieces.of(blocks), checksums[blocks] if checksums is not None else None
    )


def _fill(
    pieces: Pieces, route: Route, reply: Reserved, checksums: npt.NDArray[np.uint64] | None
) -> tuple[Route, Call]:
    control, blocks = route.link.control, route.blocks
    message = Fill(control.next_id(), reply.reservation)
    return route, Call(
        control, message, pieces.of(blocks), checksums[blocks] if checksums is not None else None
    )
