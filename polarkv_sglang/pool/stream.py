"""Clients' connections that blocks pass through, between socket and slab without a copy in between.

Each has a thread, which is in compiled code nearly always: a client that stalls holds up nobody, the control
server answers while blocks are on their way, and clients are served on as many cores as there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from polarkv_sglang.pool.answers import answer
from polarkv_sglang.pool.index import Index
from polarkv_sglang.pool.native import load_native
from polarkv_sglang.pool.notes import Notes
from polarkv_sglang.pool.pages import SharedMemory
from polarkv_sglang.transport import share
from polarkv_sglang.transport.directory import RING_BYTES
from polarkv_sglang.transport.framing import MAX_FRAME_BYTES, BadFrame, decode_from_client, encode_frame
from polarkv_sglang.transport.messages import Message, Replicate, Streaming
from polarkv_sglang.transport.quick import bound_send_buffer, is_to_own_host

_logger = logging.getLogger(__name__)


class Streams:
    """What the streams of a node share. Used on the event loop's thread, but for index and notes."""

    def __init__(self, index: Index, notes: Notes) -> None:
        self.index = index
        self.notes = notes
        self.open: set[Stream] = set()
        self.closed = False

    async def close(self) -> None:
        """End all streams, and start none any more; returns once none of them touches the slab."""
        self.closed = True
        for stream in self.open:
            stream.stop()
        if self.open:
            await asyncio.wait([stream.done for stream in self.open])


class Served:
    """A connected socket, which must not block, whose requests about blocks are answered in serve.c.

    For one thread. The calls raise TimeoutError if the client does not read or send blocks in time,
    ConnectionError and other OSError if it is gone; then the connection has to be closed.
    """

    def __init__(self, index: Index, owner: int, fd: int, *, near: bool = False) -> None:
        """``owner``: of leases and reservations, see ``Index``. ``near``: the client is on this host."""
        _, self._node, self._ffi = load_native()
        self._index = index  # has to outlive it
        stream = self._node.polar_stream_new(index.native, owner, fd, near, MAX_FRAME_BYTES)
        if stream == self._ffi.NULL:
            raise MemoryError("there is no memory for a stream")
        self._stream = self._ffi.gc(stream, self._node.polar_stream_free)

    def next_frame(self) -> memoryview:
        """Answer requests until one comes that is not answered there: its frame, valid until the next call.

        Raises BadFrame if it is over MAX_FRAME_BYTES.
        """
        error = self._node.polar_serve(self._stream)
        if error == errno.EMSGSIZE:
            raise BadFrame(
                f"a frame of {self._stream.frame_bytes} bytes is over the limit of {MAX_FRAME_BYTES}"
            )
        _check(error)
        return memoryview(self._ffi.buffer(self._stream.frame, self._stream.frame_bytes))

    def send(self, message: Message) -> None:
        frame = encode_frame(message)
        head = self._ffi.from_buffer("uint8_t[]", frame)
        delivery = {"fd": self._stream.fd, "head": head, "head_bytes": len(frame), "timeout_ns": -1}
        _check(self._node.polar_send(self._ffi.new("polar_delivery *", delivery)))


class Stream:
    """One client's connection from when it streams until it ends, on a thread of its own."""

    def __init__(
        self,
        shared: Streams,
        owner: int,
        fd: int,
        request_id: int,
        ring: bool,
        name: str,
        replicate: Callable[[Replicate], None],
        on_end: Callable[[BadFrame | None], None],
    ) -> None:
        """Answer the request to stream, and serve what follows, through a socket that nobody else uses now.

        ``owner``: of leases and reservations, see ``Index``. ``ring``: offer the client one, if there can be.
        ``replicate`` is called in the thread, and ``on_end`` on the event loop, with what the client did
        wrong, if it did. Raises OSError if there is no descriptor for it, RuntimeError if there is no thread,
        MemoryError if there is no memory.
        """
        self._shared = shared
        self._owner = owner
        self._name = name
        self._replicate = replicate
        self._on_end = on_end
        self._socket = socket.socket(fileno=os.dup(fd))
        self._ring: SharedMemory | None = None
        thread = ThreadPoolExecutor(1, thread_name_prefix="polarkv-stream")
        try:
            if ring:
                self._open_ring()
            bound_send_buffer(self._socket)
            near = is_to_own_host(self._socket)
            self._served = Served(shared.index, owner, self._socket.fileno(), near=near)
            self.done = asyncio.get_running_loop().run_in_executor(thread, self._serve, request_id)
        except BaseException:
            self._close()
            raise
        thread.shutdown(wait=False)
        shared.open.add(self)
        self.done.add_done_callback(self._ended)

    def stop(self) -> None:
        """Have it end soon."""
        with contextlib.suppress(OSError):  # the client was quicker
            self._socket.shutdown(socket.SHUT_RDWR)

    def _open_ring(self) -> None:
        """The client does without one where there is no memory or descriptor for it."""
        with contextlib.suppress(OSError, MemoryError):
            ring = SharedMemory("polarkv-ring", RING_BYTES)
            try:
                self._shared.index.open_ring(self._owner, ring)
            except MemoryError:
                ring.close()
                raise
            self._ring = ring

    def _close(self) -> None:
        self._socket.close()
        if self._ring is not None:
            self._shared.index.close_ring(self._owner)
            self._ring.close()

    def _ended(self, done: asyncio.Future[BadFrame | None]) -> None:
        self._shared.open.discard(self)
        self._close()
        if (error := done.exception()) is not None:
            _logger.error("the stream of %s failed", self._name, exc_info=error)
        self._on_end(done.result() if error is None else None)

    def _serve(self, request_id: int) -> BadFrame | None:
        """Runs in the thread until the connection ends; returns what the client did wrong, if it did."""
        try:
            ring = share(self._ring.fd, self._ring.length) if self._ring is not None else None
            self._served.send(Streaming(request_id, True, ring))
            while True:
                request = decode_from_client(self._served.next_frame())
                if isinstance(request, Replicate):
                    self._replicate(request)
                    continue
                reply = answer(self._shared.index, self._shared.notes, self._owner, request)
                if reply is not None:
                    self._served.send(reply)
        except BadFrame as error:
            return error
        except TimeoutError:
            _logger.warning("%s has not read or sent blocks in time", self._name)
        except OSError as error:
            _logger.debug("%s is gone: %s", self._name, error)
        return None


def _check(error: int) -> None:
    if error:
        raise OSError(error, os.strerror(error))
