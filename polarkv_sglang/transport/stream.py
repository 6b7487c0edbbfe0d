"""Blocks through control connections: a batch in one exchange, for peers that only TCP leads to."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polarkv_sglang.errors import NodeError, TransportError
from polarkv_sglang.transport.control import ControlConnection, answers
from polarkv_sglang.transport.framing import BadFrame, decode_from_node, encode_before, encode_frame
from polarkv_sglang.transport.library import Library
from polarkv_sglang.transport.messages import Committed, Fill, Pull, Pulled, Store, Stored

_REPLY_BYTES = 512  # of a reply without its columns
_REPLY_BYTES_A_BLOCK = 17
_NO_MEMORY = "there is no memory for an exchange of blocks"
_UNSENT = NodeError("not sent yet")
_NONE = np.empty(0, np.bool_)
_BYTES, _WORDS = "uint8_t[]", "uint64_t[]"


class Call(NamedTuple):
    """A request to one memory node, with the blocks that go there or come from there."""

    control: ControlConnection
    request: Pull | Store | Fill
    addresses: npt.NDArray[np.uint64]  # [blocks, pieces] in this process's memory
    expected: npt.NDArray[np.uint64] | None = None  # of a write: blocks with other checksums are not stored
    sent: bool = False  # the node has the request already


class Answer(NamedTuple):
    """What became of a call; of a read only the leading blocks that arrived are counted."""

    reply: Pulled | Stored | Committed
    checksums: npt.NDArray[np.uint64]  # [blocks] of the bytes that were moved; undefined without ``digest``
    right: npt.NDArray[np.bool_]  # [blocks] of a write: checksums are those expected


def exchange(
    library: Library, calls: Sequence[Call], piece_bytes: int, deadline: float, *, digest: bool = True
) -> list[Answer | NodeError]:
    """Make all calls at once, each to another node, in one GIL-free call, by ``deadline`` (time.monotonic).

    All of them read or all of them write; ``digest``: with checksums, which writes need. What does not
    succeed is an error, and its connection closed: nothing writes to the addresses after the return. What a
    write that failed still sends may be other bytes by then; their checksums tell whoever reads them. Raises
    TransportError if there is no memory for it.
    """
    outcomes: list[Answer | NodeError] = []
    batch = _Batch(library, len(calls))
    for call in calls:
        try:
            batch.add(call)
        except NodeError as error:
            outcomes.append(error)
        else:
            outcomes.append(_UNSENT)
    if not batch.calls:
        return outcomes
    if not batch.run(piece_bytes, deadline, digest=digest):
        for call in batch.calls:
            call.control.give_up(_NO_MEMORY)
        raise TransportError(_NO_MEMORY)
    answered = map(batch.outcome, range(len(batch.calls)))
    return [next(answered) if outcome is _UNSENT else outcome for outcome in outcomes]


class _Batch:
    """What the C function is given, and the buffers that it points into."""

    def __init__(self, library: Library, room: int) -> None:
        self.calls: list[Call] = []
        self._library = library
        self._channels = library.ffi.new("polar_channel[]", room)
        self._replies: list[bytearray] = []
        self._sums: list[npt.NDArray[np.uint64]] = []
        self._frames: list[bytearray] = []

    def add(self, call: Call) -> None:
        """Raises NodeError if its connection cannot be used."""
        channel = self._channels[len(self.calls)]
        channel.fd = call.control.start_exchange()
        blocks = len(call.addresses)
        request = call.request
        if isinstance(request, Pull):
            frame = encode_frame(request)
        else:
            frame = encode_before(request, int(call.addresses.item(0)) if blocks else 0)
        reply = bytearray(_REPLY_BYTES + _REPLY_BYTES_A_BLOCK * blocks)
        sums = np.empty(blocks + (blocks + 7) // 8, np.uint64)
        from_buffer = self._library.ffi.from_buffer
        channel.request = from_buffer(_BYTES, frame)
        channel.request_bytes = 0 if call.sent else len(frame)
        channel.local = from_buffer(_WORDS, call.addresses)
        channel.block_count = blocks
        channel.checksums = from_buffer(_WORDS, sums)
        channel.reply = from_buffer(_BYTES, reply)
        channel.reply_capacity = len(reply)
        if call.expected is not None:
            channel.expected = from_buffer(_WORDS, call.expected)
        self.calls.append(call)
        self._frames.append(frame)
        self._replies.append(reply)
        self._sums.append(sums)

    def run(self, piece_bytes: int, deadline: float, *, digest: bool) -> bool:
        """Make all calls; False if there was no memory for it."""
        library, first = self._library, self.calls[0]
        batch = library.ffi.new("polar_exchange_batch *")
        batch.channels = self._channels
        batch.channel_count = len(self.calls)
        batch.pieces = first.addresses.shape[1]
        batch.piece_bytes = piece_bytes
        batch.put = not isinstance(first.request, Pull)
        batch.hash = library.xxh3 if digest else library.ffi.NULL
        batch.timeout_ns = max(0, int((deadline - time.monotonic()) * 1e9))
        return bool(library.batch.polar_exchange(batch) == library.batch.POLAR_DONE)

    def outcome(self, number: int) -> Answer | NodeError:
        """Of one of the calls that were made."""
        call, channel, sums = self.calls[number], self._channels[number], self._sums[number]
        if channel.error:
            return call.control.give_up(_describe(channel.error))
        try:
            reply = decode_from_node(memoryview(self._replies[number])[: channel.reply_bytes])
        except BadFrame as error:
            return call.control.give_up(f"broke the protocol: {error}")
        blocks = len(call.addresses)
        if not isinstance(reply, Pulled | Stored | Committed) or not answers(reply, call.request):
            return call.control.give_up(f"answered {type(call.request).__name__} with another message")
        if not isinstance(reply, Pulled):
            return Answer(reply, sums[:blocks], sums[blocks:].view(np.bool_)[:blocks])
        if len(reply.checksum_blob) != 8 * channel.arrived:
            return call.control.give_up("broke the protocol: it sent more or fewer blocks than it says")
        return Answer(reply, sums[:blocks], _NONE)


def _describe(error: int) -> str:
    if error == errno.ETIMEDOUT:
        return "did not answer in time"
    if error == errno.EBADMSG:
        return "broke the protocol: its answer is too long"
    return f"is gone ({os.strerror(error)})"
