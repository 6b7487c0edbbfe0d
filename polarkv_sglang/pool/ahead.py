"""Writing blocks to slots that a memory node on this host has granted before: it is not asked, only told."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from polarkv_sglang.errors import NodeError
from polarkv_sglang.pool.blocks import Chain, Pieces, blob
from polarkv_sglang.pool.granted import GrantedSlots
from polarkv_sglang.pool.link import Lane
from polarkv_sglang.pool.requests import Requests, Route
from polarkv_sglang.transport import Library
from polarkv_sglang.transport.publish import Publish

# Of a batch's deadline, when its steps have to have ended, as in reading.
_GRANT_BY = 0.5
_GRANT_FIRST_BY = 0.25  # where other nodes' blocks have to be written still
_WRITE_BY = 0.8
_LATE_S = 0.05  # past its deadline what has been asked for may still be read: another node used the time up


class Ahead:
    """Writes over one lane; the caller holds its lock and is one thread at a time."""

    def __init__(self, lane: Lane, requests: Requests, library: Library, *, deadline_s: float) -> None:
        self._lane = lane
        self._requests = requests
        self._publish = Publish(library)
        self._deadline_s = deadline_s

    def write(
        self,
        chain: Chain,
        pieces: Pieces,
        route: Route,
        checksums: npt.NDArray[np.uint64] | None,
        started: float,
        *,
        alone: bool,
    ) -> bytes | None:
        """What became of a route's blocks, one byte each as in ``Publish``; None if its node has to be asked.

        ``started`` (time.monotonic): when the batch did. ``alone``: no other node has blocks of it.
        """
        granted, blocks = route.link.granted, route.blocks
        if granted is None:
            return None
        ask_by = started + (_GRANT_BY if alone else _GRANT_FIRST_BY) * self._deadline_s
        states = b"".ljust(len(blocks), b"\0")
        try:
            if granted.awaited is not None:
                granted.collect(max(ask_by, time.monotonic() + _LATE_S))
            if granted.most(pieces.block_bytes) < len(blocks):
                return None
            written = self._write(granted, chain, pieces, route, checksums, started)
            if written is None and granted.may_ask() and time.monotonic() < ask_by:
                granted.ask(len(blocks))
                granted.collect(ask_by)
                written = self._write(granted, chain, pieces, route, checksums, started)
            if written is None:
                return None
            states = written
            if granted.unused.left < len(blocks):  # the next write of this kind need not wait then
                granted.ask(len(blocks))
        except NodeError as error:
            self._requests.fail(self._lane, route.link, str(error))
        return states

    def _write(
        self,
        granted: GrantedSlots,
        chain: Chain,
        pieces: Pieces,
        route: Route,
        checksums: npt.NDArray[np.uint64] | None,
        started: float,
    ) -> bytes | None:
        """None if there are too few slots; NodeError if the node is gone."""
        blocks = route.blocks
        return self._publish.write(
            granted.slots(pieces.block_bytes, started + self._deadline_s),
            blob(chain.keys, blocks),
            blob(chain.parents, blocks),
            pieces.of(blocks),
            pieces.piece_bytes,
            checksums[blocks] if checksums is not None else None,
            started + _WRITE_BY * self._deadline_s - time.monotonic(),
        )
