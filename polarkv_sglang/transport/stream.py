"""Blocks through control connections: a batch in one exchange, where nothing is quicker."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt
from cffi import FFI

from polarkv_sglang.errors import NodeError, TransportError
from polarkv_sglang.transport.columns import unpack_u64
from polarkv_sglang.transport.control import ControlConnection, answers
from polarkv_sglang.transport.framing import BadFrame, decode_from_node, encode_before, encode_frame
from polarkv_sglang.transport.library import Library
from polarkv_sglang.transport.messages import Committed, Fill, Pull, Pulled, Store, Stored

_REPLY_BYTES = 512  # of a reply without its columns
_REPLY_BYTES_A_BLOCK = 17
_SUM_BYTES = 8
_FIRST_ROOM = 64  # blocks
_REPLIES = (Pulled, Stored, Committed)
_NO_MEMORY = "there is no memory for an exchange of blocks"


class Call(msgspec.Struct, frozen=True):  # made in a third of a NamedTuple's time
    """A request to one memory node, with the blocks that go there or come from there."""

    control: ControlConnection
    request: Pull | Store | Fill
    addresses: npt.NDArray[np.uint64]  # [blocks, pieces] in this process's memory
    expected: npt.NDArray[np.uint64] | None = None  # of a write: blocks with other checksums are not stored
    sent: bool = False  # the node has the request already


class Answer(msgspec.Struct, frozen=True):
    """What became of a call."""

    reply: Pulled | Stored | Committed
    # One byte per block that moved, of a read only the leading ones: 1 if its checksum is that of the reply;
    # of a write, if it is the expected one, or none was. Empty without ``digest``.
    right: bytes


class Exchange:
    """Moves blocks through connections: what one lane needs for that, kept from one batch to the next.

    Used by one thread at a time.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._batch = library.ffi.new("polar_exchange_batch *")
        self._slots: list[_Slot] = []

    def run(
        self, calls: Sequence[Call], piece_bytes: int, deadline: float, *, digest: bool = True
    ) -> list[Answer | NodeError]:
        """Make all calls at once, each to another node, in one GIL-free call, by ``deadline``
        (time.monotonic).

        All of them read or all of them write; ``digest``: with checksums, which writes need. What does not
        succeed is an error, and its connection closed: nothing writes to the addresses after the return. What
        a write that failed still sends may be other bytes by then; their checksums tell whoever reads them.
        Raises TransportError if there is no memory for it.
        """
        if not calls:
            return []
        if len(calls) > len(self._slots):
            self._make_room(len(calls))
        slots = self._slots[: len(calls)]
        for slot, call in zip(slots, calls):
            slot.fill(call)
        library, batch, first = self._library, self._batch, calls[0]
        batch.channel_count = len(calls)
        batch.pieces = first.addresses.shape[1]
        batch.piece_bytes = piece_bytes
        batch.put = not isinstance(first.request, Pull)
        batch.near = all(call.control.is_on_own_host for call in calls)
        batch.hash = library.xxh3 if digest else library.ffi.NULL
        batch.timeout_ns = max(0, int((deadline - time.monotonic()) * 1e9))
        if library.batch.polar_exchange(batch) != library.batch.POLAR_DONE:
            for call in calls:
                call.control.give_up(_NO_MEMORY)
            raise TransportError(_NO_MEMORY)
        return [slot.outcome(digest=digest) for slot in slots]

    def _make_room(self, count: int) -> None:
        channels = self._library.ffi.new("polar_channel[]", count)
        slots = [_Slot(self._library, channels + number) for number in range(count)]
        # All or nothing: there may be no memory for some of it.
        self._channels, self._slots, self._batch.channels = channels, slots, channels


class _Slot:
    """One peer of an exchange: what the C function is given, and the buffers that it points into."""

    _call: Call  # the one that was filled in last
    _unusable: NodeError | None  # why its connection is

    def __init__(self, library: Library, channel: FFI.CData) -> None:
        self._from_buffer = library.ffi.from_buffer
        self._bytes, self._words = library.ffi.typeof("uint8_t[]"), library.ffi.typeof("uint64_t[]")
        self._nothing = library.ffi.NULL
        self._channel = channel
        self._make_room(_FIRST_ROOM)

    def _make_room(self, blocks: int) -> None:
        reply = bytearray(_REPLY_BYTES + _REPLY_BYTES_A_BLOCK * blocks)
        sums = bytearray((_SUM_BYTES + 1) * blocks)
        # Of the arrays, not of the views: Python before 3.13 crashes when it collects a view with a buffer.
        buffers = self._from_buffer(self._bytes, reply), self._from_buffer(self._words, sums)
        views = memoryview(reply), memoryview(sums)
        # All or nothing, as above.
        self._room, self._buffers = blocks, buffers
        self._reply, self._sums = views
        self._channel.reply, self._channel.checksums = buffers
        self._channel.reply_capacity = len(reply)

    def fill(self, call: Call) -> None:
        """Prepare a call."""
        channel, from_buffer = self._channel, self._from_buffer
        request, addresses, expected = call.request, call.addresses, call.expected
        self._call, self._unusable = call, None
        try:
            channel.fd = call.control.start_exchange()
        except NodeError as error:
            self._unusable = error
            channel.fd = -1  # which fails
        blocks = len(addresses)
        if blocks > self._room:
            self._make_room(blocks)
        if call.sent:
            frame = bytearray()
        elif isinstance(request, Pull):
            frame = encode_frame(request)
        else:
            frame = encode_before(request, addresses.item(0) if blocks else 0)
        request_bytes, local = from_buffer(self._bytes, frame), from_buffer(self._words, addresses)
        channel.request = request_bytes
        channel.request_bytes = len(frame)
        channel.local = local
        channel.block_count = blocks
        wanted = self._nothing if expected is None else from_buffer(self._words, expected)
        channel.expected = wanted
        self._kept = request_bytes, local, wanted  # what they point to lives as long

    def outcome(self, *, digest: bool) -> Answer | NodeError:
        """Of the call, once it was made."""
        channel, control, request = self._channel, self._call.control, self._call.request
        if self._unusable is not None:
            return self._unusable
        if channel.error:
            return control.give_up(_describe(channel.error))
        try:
            reply = decode_from_node(self._reply[: channel.reply_bytes])
        except BadFrame as error:
            return control.give_up(f"broke the protocol: {error}")
        if not isinstance(reply, _REPLIES) or not answers(reply, request):
            return control.give_up(f"answered {type(request).__name__} with another message")
        if isinstance(reply, Pulled):
            if len(reply.checksum_blob) != _SUM_BYTES * channel.arrived:
                return control.give_up("broke the protocol: it sent more or fewer blocks than it says")
            return Answer(reply, self._compare(reply.checksum_blob) if digest else b"")
        blocks = channel.block_count
        return Answer(reply, bytes(self._sums[_SUM_BYTES * blocks : (_SUM_BYTES + 1) * blocks]))

    def _compare(self, wanted: bytes) -> bytes:
        """Whether the leading blocks have these checksums."""
        sums = bytes(self._sums[: len(wanted)])
        if sums == wanted:
            return b"\1" * (len(wanted) // _SUM_BYTES)
        right: npt.NDArray[np.bool_] = unpack_u64(sums) == unpack_u64(wanted)
        return right.tobytes()


def _describe(error: int) -> str:
    if error == errno.ETIMEDOUT:
        return "did not answer in time"
    if error == errno.EBADMSG:
        return "broke the protocol: its answer is too long"
    return f"is gone ({os.strerror(error)})"
