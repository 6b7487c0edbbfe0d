"""Requests to several memory nodes at once, and what to do about those that fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from polarkv_sglang.errors import NodeError
from polarkv_sglang.pool.blocks import Blocks
from polarkv_sglang.pool.link import Lane, Link
from polarkv_sglang.transport.control import answers
from polarkv_sglang.transport.messages import (
    Answered,
    Release,
    Replicate,
    Reply,
    ReportCorrupt,
    Used,
    WriteNotes,
)
from polarkv_sglang.transport.stream import Answer, Call

Told = Release | Used | ReportCorrupt | Replicate | WriteNotes
"""What has no reply."""

ReplyT = TypeVar("ReplyT", bound=Reply)

_SEND_S = 0.001  # past its deadline a request may still be sent if the socket takes it
_NOTES_BYTE_S = 2e-8  # for each byte of notes, of which there can be more than a socket takes at once
_LATE_S = 0.05  # past its deadline what has been asked for may still be read: another node used the time up


class Route(msgspec.Struct, frozen=True):  # made in a third of a NamedTuple's time
    """Blocks of a chain, in order, that one memory node is asked about."""

    link: Link
    blocks: Blocks


class Sent(NamedTuple):
    """A request whose reply is still to come."""

    route: Route
    message: Answered


class Requests:
    """Sends and collects requests over a lane whose lock the caller holds; a node that fails is left out.

    A failed link is dropped from its lane and reported to ``on_failure`` with the node's address and why.
    """

    def __init__(self, on_failure: Callable[[str, str], None]) -> None:
        self._on_failure = on_failure

    def send(
        self,
        lane: Lane,
        routes: Sequence[Route],
        build: Callable[[Link, Blocks], Answered],
        deadline: float,
    ) -> list[Sent]:
        """Send each node its request: they work at once. Past the deadline nobody is asked, or blamed."""
        sent: list[Sent] = []
        if time.monotonic() >= deadline:
            return sent
        for route in routes:
            message = build(route.link, route.blocks)
            try:
                route.link.control.send(message, max(_SEND_S, deadline - time.monotonic()))
            except NodeError as error:
                self.fail(lane, route.link, str(error))
            else:
                sent.append(Sent(route, message))
        return sent

    def collect(
        self, lane: Lane, sent: Sequence[Sent], reply_type: type[ReplyT], deadline: float
    ) -> list[tuple[Route, ReplyT]]:
        """The replies that come by ``deadline`` (time.monotonic)."""
        replies: list[tuple[Route, ReplyT]] = []
        for route, message in sent:
            link = route.link
            try:
                reply = link.control.receive(deadline)
            except NodeError as error:
                self.fail(lane, link, str(error))
                continue
            if isinstance(reply, reply_type) and answers(reply, message):
                replies.append((route, reply))
            else:
                self.fail(lane, link, f"answered {type(message).__name__} with another message")
        return replies

    def collect_pushed(
        self, lane: Lane, sent: Sequence[Sent], reply_type: type[ReplyT], deadline: float
    ) -> list[tuple[Route, ReplyT]]:
        """As ``collect``, for requests that make a node put into our memory: UCX needs progress for it.

        If one of them does not answer, the lane's worker is replaced: what the node still sends then goes
        nowhere.
        """
        replies: list[tuple[Route, ReplyT]] = []
        waiting = list(sent)
        while waiting and lane.worker is not None:
            sockets = [request.route.link.control.fileno() for request in waiting]
            ready = lane.worker.wait(sockets, max(0.0, deadline - time.monotonic()))
            # Past the deadline none is ready, and collecting makes them fail.
            replies += self.collect(lane, [waiting.pop(ready or 0)], reply_type, deadline)
        if len(replies) < len(sent):
            self.replace_worker(lane)
        return replies

    def stream(
        self,
        lane: Lane,
        calls: Sequence[tuple[Route, Call]],
        piece_bytes: int,
        deadline: float,
        *,
        digest: bool = True,
    ) -> list[tuple[Route, Answer]]:
        """Move blocks through connections, all at once; the calls that were answered by ``deadline``.

        Past the deadline nobody is asked, or blamed; who was asked before may have answered by then.
        """
        if time.monotonic() >= deadline:
            calls = [(route, call) for route, call in calls if call.sent]
            deadline = time.monotonic() + _LATE_S
        assert lane.exchange is not None
        outcomes = lane.exchange.run([call for _, call in calls], piece_bytes, deadline, digest=digest)
        answered: list[tuple[Route, Answer]] = []
        for (route, _), outcome in zip(calls, outcomes):
            if not isinstance(outcome, NodeError):
                answered.append((route, outcome))
            elif lane.links.get(route.link.address) is route.link:  # not given up, and told of, before
                self.fail(lane, route.link, str(outcome))
        return answered

    def tell(self, lane: Lane, link: Link, message: Told) -> None:
        """Send what has no reply, if the link still stands."""
        if lane.links.get(link.address) is not link:
            return
        try:
            if isinstance(message, Release):
                link.control.send_later(message, _SEND_S)
            elif isinstance(message, Used):
                link.control.hint(message, _SEND_S)
            else:
                notes = message.notes if isinstance(message, WriteNotes) else ()
                link.control.send(message, _SEND_S + _NOTES_BYTE_S * sum(map(len, notes)))
        except NodeError as error:
            self.fail(lane, link, str(error))

    def fail(self, lane: Lane, link: Link, reason: str) -> None:
        """Use a link no more."""
        if lane.links.get(link.address) is link:
            lane.drop(link.address)
        self._on_failure(link.address, reason)

    def replace_worker(self, lane: Lane) -> None:
        """Make UCX let go of our memory; the nodes that were reached by its endpoints are linked anew."""
        for address in lane.replace_worker():
            self._on_failure(address, "shared a UCX worker with a node that failed")
