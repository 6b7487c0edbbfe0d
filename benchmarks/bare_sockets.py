"""The bound for any store over TCP on one machine: bytes through one loopback connection, and nothing else.

A peer process answers a request of 17 bytes with so many bytes, or takes so many and answers with 16: no
names, no index, no checksum. It runs on uvloop, as a memory node does.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import socket
import statistics
import struct
import sys
import time
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection

import uvloop

from polarkv_sglang.config import format_bytes, parse_bytes

SIZES = "64KiB,256KiB,1MiB,16MiB,64MiB"
_MEMORY_BYTES = 512 << 20  # walked through, so that no cache helps
_PIECE_BYTES = 256 << 10  # of one receive
_REQUEST = struct.Struct("<BQQ")  # put, offset, length
_ACKNOWLEDGEMENT = bytes(16)
_SAMPLE_BYTES = 512 << 20
_LEAST_SAMPLES, _MOST_SAMPLES = 12, 300


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

    def get_buffer(self, size_hint: int) -> memoryview:
        if self._left:
            return self._memory[self._offset : self._offset + min(self._left, 1 << 20)]
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
            self._transport.write(self._memory[offset : offset + length])


def _serve(ready: Connection) -> None:
    memory = _memory()

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _Peer(memory), "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(serve())


def _memory() -> memoryview:
    memory = mmap.mmap(-1, _MEMORY_BYTES)
    for offset in range(0, _MEMORY_BYTES, mmap.PAGESIZE):
        memory[offset] = 1
    return memoryview(memory)


def measure(sock: socket.socket, memory: memoryview, length: int, put: bool) -> list[float]:
    """Seconds of each exchange."""
    samples = max(_LEAST_SAMPLES, min(_MOST_SAMPLES, _SAMPLE_BYTES // length))
    seconds = []
    for sample in range(samples):
        offset = sample * length % (_MEMORY_BYTES - length + 1)
        block = memory[offset : offset + length]
        started = time.perf_counter()
        sock.sendall(_REQUEST.pack(put, offset, length))
        if put:
            sock.sendall(block)
            sock.recv(len(_ACKNOWLEDGEMENT), socket.MSG_WAITALL)
        else:
            received = 0
            while received < length:
                received += sock.recv_into(block[received:], min(length - received, _PIECE_BYTES))
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bare_sockets", description=__doc__)
    parser.add_argument("--sizes", default=SIZES, help="default: %(default)s")
    sizes = [parse_bytes(size) for size in parser.parse_args().sizes.split(",")]
    ours, theirs = Pipe()
    peer = Process(target=_serve, args=(theirs,), daemon=True)
    peer.start()
    memory = _memory()
    print("| op | bytes | GB/s | median us | best us |\n|---|---:|---:|---:|---:|")
    with socket.create_connection(("127.0.0.1", ours.recv())) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for length in sizes:
            for put in (True, False):
                seconds = measure(sock, memory, length, put)
                middle = statistics.median(seconds)
                cells = [format_bytes(length), f"{length / 1e9 / middle:.2f}", f"{1e6 * middle:.0f}"]
                print(f"| {'put' if put else 'get'} | {' | '.join(cells)} | {1e6 * min(seconds):.0f} |")
    peer.terminate()
    print(f"{os.cpu_count()} cores", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
