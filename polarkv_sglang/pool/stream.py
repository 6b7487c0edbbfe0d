"""Blocks that pass through clients' connections, between socket and slab without a copy in between.

Each connection that streams has a thread: a client that stalls holds up nobody, the control server answers
while blocks are on their way, and clients are served on as many cores as there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from polarkv_sglang.pool.answers import answer
from polarkv_sglang.pool.index import RESERVATION_S, Index, Slots
from polarkv_sglang.pool.notes import Notes
from polarkv_sglang.transport import Library
from polarkv_sglang.transport.columns import pack_u64, split_keys, unpack_u64
from polarkv_sglang.transport.delivery import Delivery
from polarkv_sglang.transport.framing import BadFrame, decode_from_client, encode_before, encode_frame
from polarkv_sglang.transport.messages import (
    MAX_LEASE_S,
    Committed,
    Fill,
    FromClient,
    Message,
    Pull,
    Pulled,
    Replicate,
    Store,
    Stored,
    Streaming,
)

_SEND_BY = 0.9  # of the longest lease, when blocks have to be sent
_TRAILER_BYTES = 9  # behind the blocks of a write, for each: its checksum, and whether it is to be stored

_logger = logging.getLogger(__name__)


class Streams:
    """What the streams of a node share, and what they did. Started and ended by the event loop."""

    def __init__(self, index: Index, notes: Notes, library: Library) -> None:
        self.index = index
        self.notes = notes
        self.library = library
        self.open: set[Stream] = set()
        self.closed = False
        self.sent_blocks = self.sent_bytes = 0
        self._lock = threading.Lock()

    def count(self, blocks: int, sent_bytes: int) -> None:
        """Add to what was sent. For any thread."""
        with self._lock:
            self.sent_blocks += blocks
            self.sent_bytes += sent_bytes

    async def close(self) -> None:
        """End all streams, and start none any more; returns once none of them touches the slab."""
        self.closed = True
        for stream in self.open:
            stream.stop()
        if self.open:
            await asyncio.wait([stream.done for stream in self.open])


class Stream:
    """One client's connection from when it streams until it ends, on a thread of its own."""

    def __init__(
        self,
        shared: Streams,
        owner: int,
        fd: int,
        request_id: int,
        name: str,
        replicate: Callable[[Replicate], None],
        on_end: Callable[[BadFrame | None], None],
    ) -> None:
        """Answer the request to stream, and serve what follows, through a socket that nobody else uses now.

        ``owner``: of leases and reservations, see ``Index``. ``replicate`` is called in the thread, and
        ``on_end`` on the event loop, with what the client did wrong, if it did. Raises OSError if there is no
        descriptor for it, RuntimeError if there is no thread.
        """
        self._shared = shared
        self._owner = owner
        self._name = name
        self._replicate = replicate
        self._on_end = on_end
        self._socket = socket.socket(fileno=os.dup(fd))
        self._delivery = Delivery(shared.library, self._socket.fileno())
        thread = ThreadPoolExecutor(1, thread_name_prefix="polarkv-stream")
        try:
            self.done = asyncio.get_running_loop().run_in_executor(thread, self._serve, request_id)
        except BaseException:
            self._socket.close()
            raise
        thread.shutdown(wait=False)
        shared.open.add(self)
        self.done.add_done_callback(self._ended)

    def stop(self) -> None:
        """Have it end soon."""
        with contextlib.suppress(OSError):  # the client was quicker
            self._socket.shutdown(socket.SHUT_RDWR)

    def _ended(self, done: asyncio.Future[BadFrame | None]) -> None:
        self._shared.open.discard(self)
        self._socket.close()
        if (error := done.exception()) is not None:
            _logger.error("the stream of %s failed", self._name, exc_info=error)
        self._on_end(done.result() if error is None else None)

    def _serve(self, request_id: int) -> BadFrame | None:
        """Runs in the thread until the connection ends; returns what the client did wrong, if it did."""
        try:
            self._delivery.send(encode_frame(Streaming(request_id)))
            while True:
                self._answer(decode_from_client(self._delivery.frame()))
        except BadFrame as error:
            return error
        except TimeoutError:
            _logger.warning("%s has not read or sent blocks in time", self._name)
        except OSError as error:
            _logger.debug("%s is gone: %s", self._name, error)
        return None

    def _answer(self, request: FromClient) -> None:
        index, owner = self._shared.index, self._owner
        reply: Message | None
        match request:
            case Pull():
                self._send_blocks(request)
                return
            case Store():
                keys, parents = split_keys(request.keys), split_keys(request.parents)
                reserved = index.reserve(owner, keys, parents, request.length, fill=True)
                self._receive_blocks(
                    reserved.number, Slots(reserved.addresses, request.length, RESERVATION_S)
                )
                reply = Stored(request.request_id, reserved.states)
            case Fill():
                slots = index.fill(owner, request.reservation)
                if slots is None:
                    raise BadFrame("a fill of a reservation that is over, or is another's")
                reply = Committed(request.request_id, self._receive_blocks(request.reservation, slots))
            case Replicate():
                self._replicate(request)
                return
            case _:
                reply = answer(index, self._shared.notes, owner, request)
        if reply is not None:
            self._delivery.send(encode_frame(reply))

    def _send_blocks(self, request: Pull) -> None:
        """Answer a pull: its blocks are leased until the socket has taken them."""
        index = self._shared.index
        parts = request.parts()
        first, last = parts[0][0] == 0, sum(parts[-1]) == request.length
        lease = index.locate(self._owner, split_keys(request.keys), MAX_LEASE_S, counted=first)
        try:
            lengths = lease.lengths
            count = next((at for at, length in enumerate(lengths) if length != request.length), len(lengths))
            sent_bytes = count * sum(size for _, size in parts)
            checksums, generations = pack_u64(lease.checksums[:count]), pack_u64(lease.generations[:count])
            first_byte = lease.addresses[0] + parts[0][0] if count else 0
            head = encode_before(Pulled(request.request_id, checksums, generations), first_byte, between=8)
            head += sent_bytes.to_bytes(8, "little")
            whole = pack_u64((0, request.length))
            self._delivery.send(
                head, lease.addresses[:count], request.part_blob or whole, _SEND_BY * MAX_LEASE_S
            )
        finally:
            index.release(self._owner, lease.number)
        # Of blocks that come in parts, with the last one.
        self._shared.count(count if last else 0, sent_bytes)

    def _receive_blocks(self, reservation: int, slots: Slots) -> int:
        """Have slots filled, and the reservation of those that have an address committed.

        How many blocks are visible then. What comes for the others is dropped.
        """
        index, owner = self._shared.index, self._owner
        try:
            blocks = len(slots.addresses)
            trailer = bytearray(_TRAILER_BYTES * blocks)
            whole = pack_u64((0, slots.length))
            self._delivery.receive(trailer, len(trailer), slots.addresses, whole, slots.left_s)
            checksums = unpack_u64(bytes(trailer[: 8 * blocks])).tolist()
            ours = [place for place, address in enumerate(slots.addresses) if address]
            if not ours:
                return 0
            mask = bytes([trailer[8 * blocks + place] for place in ours])
            return index.commit(owner, reservation, mask, [checksums[place] for place in ours])
        except BaseException:
            index.give_up(owner, reservation)
            raise
