"""Slots that a memory node on this host has granted to a rank, to write blocks to without asking."""

from __future__ import annotations

import time

import numpy as np

from polarkv_sglang.errors import NodeError
from polarkv_sglang.pool.slab import PAGE_BYTES
from polarkv_sglang.transport import Library
from polarkv_sglang.transport.columns import unpack_u64
from polarkv_sglang.transport.control import ControlConnection, answers
from polarkv_sglang.transport.directory import Directory
from polarkv_sglang.transport.messages import MAX_GRANTED, RESERVATION_S, Grant, Granted
from polarkv_sglang.transport.publish import Slots

_NO_SLOTS = np.zeros(0, np.uint64)
_FIRST_SLOTS = 16  # then twice as many each time that they were all used
_REFUSED_S = 1.0  # so long a node that had no room is not asked again
_SEND_S = 0.001  # a request is short: the socket takes it, or the node does not read


class GrantedSlots:
    """Slots of one node that one lane has ahead; all are for blocks of one length.

    Nothing else may be sent through the connection while an answer is ``awaited``.
    """

    def __init__(self, library: Library, control: ControlConnection, directory: Directory) -> None:
        """Raises TransportError if ``directory`` has no ring."""
        self.awaited: Grant | None = None  # the request
        self.unused = Slots(library, directory, control.fileno())
        self._control = control
        self._most_bytes = control.welcome.most_granted_bytes
        self._length = 0  # of a block
        self._count = _FIRST_SLOTS
        self._asked_at = 0.0  # time.monotonic
        self._refused_until = 0.0

    def most(self, length: int) -> int:
        """How many slots for blocks of ``length`` bytes there can be."""
        return min(MAX_GRANTED, self._most_bytes // (-(-length // PAGE_BYTES) * PAGE_BYTES))

    def slots(self, length: int, until: float) -> Slots:
        """Those for blocks of that length that may be written to until then (time.monotonic)."""
        if length != self._length or until > self._asked_at + RESERVATION_S:
            self._length, self._count = length, _FIRST_SLOTS
            self.unused.replace(_NO_SLOTS)
        return self.unused

    def may_ask(self) -> bool:
        return time.monotonic() >= self._refused_until

    def ask(self, blocks: int) -> None:
        """Ask for others, for so many blocks of the last length and more. Raises NodeError.

        Those that are left are ours no more.
        """
        self.unused.replace(_NO_SLOTS)
        count = min(max(blocks, self._count), self.most(self._length))
        self.awaited = Grant(self._control.next_id(), self._length, count)
        self._count, self._asked_at = 2 * count, time.monotonic()
        self._control.send(self.awaited, _SEND_S)

    def collect(self, by: float) -> None:
        """Take the answer. Raises NodeError if it has not come by then (time.monotonic)."""
        assert self.awaited is not None
        reply = self._control.receive(by)
        if not (isinstance(reply, Granted) and answers(reply, self.awaited)):
            raise NodeError("answered Grant with another message")
        self.awaited = None
        self.unused.replace(unpack_u64(reply.address_blob))
        if not reply.address_blob:
            self._refused_until, self._count = self._asked_at + _REFUSED_S, _FIRST_SLOTS
