"""What a socket that copies carries on one machine: bytes through one loopback connection, and nothing else.

A peer process takes so many bytes and answers with 16, or gives them back: no names, no index, no checksum.
It runs on uvloop, as a memory node does.
"""

from __future__ import annotations

import asyncio
import mmap
import multiprocessing
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import uvloop

from benchmarks.blocks import Blocks
from polarkv_sglang.transport.quick import bound_send_buffer, connect_unpaced

_PIECE_BYTES = 256 << 10  # of one receive of the client
_PEER_PIECE_BYTES = 1 << 20
# Put, offset, length. What goes out behind fewer bytes is copied at half speed; see ``encode_before``.
_REQUEST = struct.Struct("<BQQ47x")
_PREAMBLE = bytes(64)
_ACKNOWLEDGEMENT = bytes(16)


class SocketStore:
    """The client of such a peer, in this process: it gives back the last batch only, and by its place."""

    version = "no store"

    def __init__(self, name: str, sock: socket.socket, capacity_bytes: int, blocks: Blocks) -> None:
        self.name = name
        self._socket = sock
        self._capacity_bytes = capacity_bytes
        self._source, self._target = blocks.source.data, blocks.target.data
        self._offset = self._end = 0  # of the last batch: the next goes behind it, where no cache helps

    def put(self, keys: Sequence[bytes], block_bytes: int) -> float:
        length = len(keys) * block_bytes
        self._offset = self._end if self._end + length <= self._capacity_bytes else 0
        self._end = self._offset + length
        source = self._source[:length]
        started = time.perf_counter()
        request = _REQUEST.pack(True, self._offset, length)
        sent = self._socket.sendmsg([request, source])
        self._socket.sendall(source[sent - len(request) :])
        self._socket.recv(len(_ACKNOWLEDGEMENT), socket.MSG_WAITALL)
        return time.perf_counter() - started

    def get(self, keys: Sequence[bytes], block_bytes: int) -> float:
        length = len(keys) * block_bytes
        started = time.perf_counter()
        self._socket.sendall(_REQUEST.pack(False, self._offset, length))
        self._socket.recv(len(_PREAMBLE), socket.MSG_WAITALL)
        received = 0
        while received < length:
            end = min(length, received + _PIECE_BYTES)
            received += self._socket.recv_into(self._target[received:end])
        return time.perf_counter() - started

    def discard(self, keys: Sequence[bytes]) -> None:
        """Nothing: the next batches go elsewhere, until they come round."""


class _Peer(asyncio.BufferedProtocol):
    """Serves one connection from and to its memory."""

    _transport: asyncio.WriteTransport

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._request = memoryview(bytearray(_REQUEST.size))
        self._request_bytes = 0
        self._offset = self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment] # uvloop's only behave like asyncio's
        peer: socket.socket = transport.get_extra_info("socket")
        bound_send_buffer(peer)

    def get_buffer(self, size_hint: int) -> memoryview:
        if self._left:
            return self._memory[self._offset : self._offset + min(self._left, _PEER_PIECE_BYTES)]
        return self._request[self._request_bytes :]

    def buffer_updated(self, count: int) -> None:
        if self._left:
            self._offset += count
            self._left -= count
            if not self._left:
                self._transport.write(_ACKNOWLEDGEMENT)
            return
        self._request_bytes += count
        if self._request_bytes < _REQUEST.size:
            return
        self._request_bytes = 0
        put, offset, length = _REQUEST.unpack(self._request)
        if put:
            self._offset, self._left = offset, length
        else:
            self._transport.writelines([_PREAMBLE, self._memory[offset : offset + length]])


@contextmanager
def socket_store(name: str, blocks: Blocks, capacity_bytes: int) -> Iterator[SocketStore]:
    """A peer with so much memory, and its client; the peer ends with the context."""
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    peer = spawning.Process(target=_serve, args=(theirs, capacity_bytes), daemon=True)
    peer.start()
    theirs.close()  # so that a peer which ends before it is ready ends the wait for it
    try:
        with socket.socket() as sock:
            connect_unpaced(sock, ("127.0.0.1", ours.recv()))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            bound_send_buffer(sock)
            yield SocketStore(name, sock, capacity_bytes, blocks)
    finally:
        peer.kill()
        peer.join()


def _serve(ready: Connection, capacity_bytes: int) -> None:
    memory = memoryview(mmap.mmap(-1, capacity_bytes))

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _Peer(memory), "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(serve())
