"""Blocks that pass through clients' connections, between socket and slab without a copy in between.

Each connection that streams has a thread: a client that stalls holds up nobody, the control server answers
while blocks are on their way, and clients are served on as many cores as there are.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from polarkv_sglang.pool.answers import answer
from polarkv_sglang.pool.index import Index
from polarkv_sglang.pool.notes import Notes
from polarkv_sglang.transport import Library
from polarkv_sglang.transport.columns import pack_u64, split_keys, unpack_u64
from polarkv_sglang.transport.delivery import Delivery
from polarkv_sglang.transport.framing import BadFrame, decode_from_client, encode_frame
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
    """What the streams of a node share, and what they did. Used by the event loop, but for ``count``."""

    def __init__(self, index: Index, notes: Notes, library: Library) -> None:
        self.index = index
        self.notes = notes
        self.library = library
        self.open: set[Stream] = set()
        self.sent_blocks = self.sent_bytes = 0
        self._lock = threading.Lock()

    def count(self, blocks: int, sent_bytes: int) -> None:
        """Add to what was sent. For any thread."""
        with self._lock:
            self.sent_blocks += blocks
            self.sent_bytes += sent_bytes

    async def close(self) -> None:
        """End all streams; returns once none of them touches the slab any more."""
        for stream in self.open:
            stream.stop()
        await asyncio.gather(*[stream.done for stream in self.open], return_exceptions=True)


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
        on_end: Callable[[Exception | None], None],
    ) -> None:
        """Answer the request to stream, and serve what follows, through a socket that nobody else uses now.

        ``owner``: of leases and reservations, see ``Index``. ``replicate`` and ``on_end`` are called on the
        event loop, the latter with what the client did wrong, if it did.
        """
        self._shared = shared
        self._owner = owner
        self._name = name
        self._replicate = replicate
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(fileno=os.dup(fd))
        self._delivery = Delivery(shared.library, self._socket.fileno())
        shared.open.add(self)
        thread = ThreadPoolExecutor(1, thread_name_prefix="polarkv-stream")
        self.done = self._loop.run_in_executor(thread, self._serve, request_id)
        thread.shutdown(wait=False)
        self.done.add_done_callback(self._ended)

    def stop(self) -> None:
        """Have it end soon."""
        if self in self._shared.open:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:  # the client was quicker
                pass

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
            _logger.warning("%s was too slow in reading or writing blocks", self._name)
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
                slots = index.reserve(owner, keys, parents, request.length)
                self._receive_blocks(slots.number, slots.addresses, request.length)
                reply = Stored(request.request_id, slots.states)
            case Fill():
                reply = Committed(request.request_id, self._receive_blocks(request.reservation))
            case Replicate():
                self._loop.call_soon_threadsafe(self._replicate, request)
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
            head = encode_frame(Pulled(request.request_id, checksums, generations))
            head += sent_bytes.to_bytes(8, "little")
            whole = pack_u64((0, request.length))
            self._delivery.send(
                head, lease.addresses[:count], request.part_blob or whole, _SEND_BY * MAX_LEASE_S
            )
        finally:
            index.release(self._owner, lease.number)
        # Of blocks that come in parts, with the last one.
        self._shared.count(count if last else 0, sent_bytes)

    def _receive_blocks(
        self, reservation: int, addresses: Sequence[int] | None = None, length: int = 0
    ) -> int:
        """Have the blocks of a reservation filled and commit them; how many are visible then.

        ``addresses``: of the slots that it has, 0 for what comes to nobody, and the length of blocks; None:
        all of its own. Raises BadFrame for a reservation that is over, or is another's.
        """
        index, owner = self._shared.index, self._owner
        slots = index.fill(owner, reservation) if reservation else None
        if addresses is None:
            if slots is None:
                raise BadFrame("a fill of a reservation that is over")
            addresses, length = slots.addresses, slots.length
        blocks = len(addresses)
        trailer = bytearray(_TRAILER_BYTES * blocks)
        left_s = slots.left_s if slots is not None else MAX_LEASE_S
        try:
            self._delivery.receive(trailer, len(trailer), addresses, pack_u64((0, length)), left_s)
        except BaseException:
            index.give_up(owner, reservation)
            raise
        if slots is None:
            return 0
        checksums, mask = unpack_u64(trailer[: 8 * blocks]).tolist(), trailer[8 * blocks :]
        ours = [place for place, address in enumerate(addresses) if address]
        return index.commit(
            owner, reservation, bytes([mask[at] for at in ours]), [checksums[at] for at in ours]
        )
