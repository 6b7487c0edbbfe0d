"""Looking blocks up without reading them: what the pool has, and keeping it for who reads later."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from polarkv_sglang.pool.blocks import Blocks, Chain, blob, leading
from polarkv_sglang.pool.link import Lane, Link
from polarkv_sglang.pool.membership import Membership
from polarkv_sglang.pool.requests import Requests, Route, Sent
from polarkv_sglang.pool.routes import route_blocks, usable_nodes
from polarkv_sglang.transport.messages import MAX_KEYS, Held, Hold, Peek, Peeked, Release, Renew, Renewed

_NO_BLOCKS = np.empty(0, np.intp)


class Kept(NamedTuple):
    """What a hold found, and the leases that keep it; see ``PoolClient.hold``."""

    blocks: int  # at the head of the chain, in the pool
    leases: tuple[tuple[Link, int], ...]  # one a memory node and request
    whole: bool  # all of it is kept: no node has too much to keep


NOTHING_KEPT: Final = Kept(0, (), whole=False)


class Finder:
    """Asks memory nodes over one lane; the caller holds its lock and is one thread at a time."""

    def __init__(
        self, lane: Lane, membership: Membership, requests: Requests, *, deadline_s: float, copies: int
    ) -> None:
        self._lane = lane
        self._membership = membership
        self._requests = requests
        self._deadline_s = deadline_s
        self._copies = copies

    def peek(self, chain: Chain) -> int:
        """See ``PoolClient.peek``."""

        def ask(routes: list[Route], deadline: float, present: npt.NDArray[np.bool_]) -> None:
            sent = self._requests.send(
                self._lane,
                routes,
                lambda link, asked: Peek(link.control.next_id(), blob(chain.keys, asked)),
                deadline,
            )
            for route, reply in self._requests.collect(self._lane, sent, Peeked, deadline):
                present[route.blocks] = np.frombuffer(reply.present, np.uint8) == 1

        return self._look(chain, ask)

    def hold(self, chain: Chain, lease_s: float) -> Kept:
        """See ``PoolClient.hold``."""
        leases: list[tuple[Link, int]] = []
        whole = True

        def ask(routes: list[Route], deadline: float, present: npt.NDArray[np.bool_]) -> None:
            nonlocal whole
            sent = self._requests.send(
                self._lane,
                routes,
                lambda link, asked: Hold(link.control.next_id(), blob(chain.keys, asked), lease_s),
                deadline,
            )
            for route, reply in self._requests.collect(self._lane, sent, Held, deadline):
                present[route.blocks] = np.frombuffer(reply.present, np.uint8) == 1
                if reply.lease:
                    leases.append((route.link, reply.lease))
                elif any(reply.present):
                    whole = False

        blocks = self._look(chain, ask)
        return Kept(blocks, tuple(leases), whole)

    def renew(self, kept: Kept, lease_s: float) -> bool:
        """See ``PoolClient.renew``."""
        deadline = time.monotonic() + self._deadline_s
        sent: list[Sent] = []
        for link, lease in kept.leases:
            if self._lane.links.get(link.address) is not link:
                continue  # it was linked anew since, and what it kept for the old link went with that

            def build(link: Link, _: Blocks, lease: int = lease) -> Renew:
                return Renew(link.control.next_id(), lease, lease_s)

            sent += self._requests.send(self._lane, [Route(link, _NO_BLOCKS)], build, deadline)
        replies = self._requests.collect(self._lane, sent, Renewed, deadline)
        return sum(reply.held for _, reply in replies) == len(kept.leases)

    def drop(self, kept: Kept) -> None:
        """See ``PoolClient.drop``."""
        for link, lease in kept.leases:
            self._requests.tell(self._lane, link, Release(lease))

    def _look(self, chain: Chain, ask: Callable[[list[Route], float, npt.NDArray[np.bool_]], None]) -> int:
        """How many blocks at the head of the chain are found; ``ask`` marks what a node has."""
        present = np.zeros(len(chain), bool)
        started = time.monotonic()
        # A chain can be longer than a request may be; a part only matters if those before it are whole.
        for start in range(0, len(chain), MAX_KEYS):
            part = np.arange(start, min(start + MAX_KEYS, len(chain)))
            nodes = usable_nodes(self._lane, self._membership.live)
            for place in range(self._copies):
                routes = route_blocks(self._lane, nodes, chain, part[~present[part]], place)
                # A node that does not answer must not take the time of the next.
                share = (place + 1) / self._copies
                ask(routes, started + share * self._deadline_s, present)
            if not present[part].all():
                break
        return leading(present)
