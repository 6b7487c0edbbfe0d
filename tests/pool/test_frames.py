"""Random frames against one memory node: a hundred thousand in full runs."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections import deque
from collections.abc import Callable

import msgspec
import psutil
import pytest

from polarkv_sglang.config import parse_address
from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.transport.columns import pack_u64, seal
from polarkv_sglang.transport.framing import MAX_FRAME_BYTES, encode_frame
from polarkv_sglang.transport.messages import (
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Commit,
    Fetch,
    Fill,
    Hello,
    Hold,
    Locate,
    Message,
    NodeStatistics,
    Peek,
    Peeked,
    Proof,
    Pull,
    ReadNotes,
    Refused,
    Release,
    Renew,
    Replicate,
    ReportCorrupt,
    Reserve,
    Role,
    StartStream,
    Statistics,
    Store,
    View,
    WriteNotes,
)
from tests.pool.streams import streaming
from tests.pool.test_node import eventually
from tests.support import RunningNode, running_node

WARM_UP_FRAMES = 20_000
AT_ONCE = 16  # connections
MAX_GROWTH_BYTES = 4 << 20
KEY = b"a block that is!"
ROLES: tuple[Role, ...] = ("rank", "observer", "lifeline")


class Fuzzer:
    """Makes frames of every kind, good and bad, from one seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._harmful: list[Callable[[], bytes]] = [
            self._garbage, self._mutated, self._truncated, self._oversized, self._nonsense, self._misdirected,
        ]  # fmt: skip

    def connection(self) -> tuple[bool, bytes, int]:
        """What one client sends, and how many frames that is: the harmful one comes last.

        First, whether that comes on a connection that streams already.
        """
        rng = self._rng
        frames = []
        streams = rng.random() < 0.2
        if streams:
            frames += [self._encode(self._message()) for _ in range(rng.randrange(8))]
        elif rng.random() < 0.8:
            hello = self._hello()
            frames += [self._encode(hello), self._encode(Proof(b""))]
            if hello.role == "rank":
                frames += [self._encode(self._message()) for _ in range(rng.randrange(16))]
        frames.append(rng.choice(self._harmful)())
        return streams, b"".join(frames), len(frames)

    def _encode(self, message: Message) -> bytes:
        return bytes(encode_frame(message))

    def _hello(self) -> Hello:
        rng = self._rng
        version = PROTOCOL_VERSION + (rng.random() < 0.02)
        role = rng.choice(ROLES) if rng.random() < 0.1 else "rank"
        return Hello(version, role, "fuzz", rng.randbytes(NONCE_BYTES))

    def _message(self) -> Message:
        """Valid, but about keys, leases and reservations that are not there."""
        rng = self._rng
        count = rng.randrange(8)
        keys = rng.randbytes(16 * count)
        number = rng.choice([0, 1, rng.getrandbits(32), rng.getrandbits(63)])
        column = rng.randbytes(8 * count)
        choice = rng.randrange(18)
        if choice == 0:
            return Reserve(
                number, keys, rng.choice([keys, NO_PARENT * count]), rng.choice([1, 4096, 1 << 40])
            )
        if choice == 1:
            return Commit(number, number, bytes(count), column)
        if choice == 2:
            return Locate(number, keys, rng.choice([1e-300, 1.0, float("inf")]))
        if choice == 3:
            return Release(number)
        if choice == 4:
            return Renew(number, number, 1e300)
        if choice == 5:
            return ReportCorrupt(keys, column)
        if choice == 6:
            return Replicate(keys, "nobody:1")
        if choice == 7:
            return View({f"node {rng.getrandbits(30)}": "gone" for _ in range(count)})
        if choice == 8:
            regions = pack_u64([rng.randrange(2) for _ in range(count)])
            address, rkeys = rng.randbytes(80), [b"one", b"two"]
            return Fetch(number, keys, 1e300, address, rkeys, seal(address, rkeys), 1, 4096, column, regions)
        if choice == 9:
            return Statistics(number)
        if choice == 10:
            return Pull(number, keys, rng.choice([1, 4096, 1 << 40]))
        if choice == 11:
            return Store(number, keys, keys, rng.choice([1, 4096, 1 << 40]))
        if choice == 12:
            return Fill(number, number)
        if choice == 13:
            return Hold(number, keys, rng.choice([1e-300, 1.0, float("inf")]))
        if choice == 14:
            return WriteNotes(keys, [rng.randbytes(rng.randrange(1, 999)) for _ in range(count)])
        if choice == 15:
            return ReadNotes(number, keys)
        if choice == 16:
            return StartStream(number)
        return Peek(number, keys)

    def _garbage(self) -> bytes:
        payload = self._rng.randbytes(self._rng.randrange(300))
        return len(payload).to_bytes(4, "little") + payload

    def _mutated(self) -> bytes:
        message = self._message()
        while isinstance(message, Replicate):  # a changed name is another node, which rightly takes a client
            message = self._message()
        frame = bytearray(self._encode(self._rng.choice([message, self._hello(), Proof(b"")])))
        for _ in range(self._rng.randint(1, 4)):
            frame[self._rng.randrange(len(frame))] = self._rng.randrange(256)
        return bytes(frame)

    def _truncated(self) -> bytes:
        frame = self._encode(self._message())
        return frame[: self._rng.randrange(len(frame))]

    def _oversized(self) -> bytes:
        return struct.pack("<I", self._rng.randint(MAX_FRAME_BYTES + 1, 2**32 - 1)) + self._rng.randbytes(100)

    def _nonsense(self) -> bytes:
        """A message that is none of ours, or one with wrong fields."""
        rng = self._rng
        scalars = [None, True, -1, 2**64 - 1, 0.5, "text", b"bytes", [], {}, float("nan"), "x" * 5000]
        tags = ["peek", "fetch", "reserve", "view", "hello", "proof", "steal", 7]
        fields = [rng.choice(tags), *(rng.choice(scalars) for _ in range(rng.randrange(12)))]
        nested: object = fields
        for _ in range(rng.choice([0, 0, 0, 3, 900])):
            nested = [nested]
        payload = msgspec.msgpack.encode(nested)
        return len(payload).to_bytes(4, "little") + payload

    def _misdirected(self) -> bytes:
        rng = self._rng
        messages = [Peeked(1, b"\1"), Refused("no"), self._hello(), Proof(rng.randbytes(32))]
        return self._encode(rng.choice(messages))


def _socket(node: RunningNode) -> socket.socket:
    return socket.create_connection(parse_address(node.address))


def _streaming_socket(node: RunningNode) -> socket.socket:
    with streaming(node) as control:
        return socket.socket(fileno=os.dup(control.fileno()))


def bombard(node: RunningNode, fuzzer: Fuzzer, frames: int) -> None:
    """Send so many frames; every connection is ended by the node, after our last word at the latest."""
    waiting: deque[socket.socket] = deque()
    sent = 0
    while sent < frames or waiting:
        if sent < frames:
            streams, data, count = fuzzer.connection()
            sent += count
            sock = (
                _streaming_socket(node) if streams else socket.create_connection(parse_address(node.address))
            )
            sock.settimeout(10.0)
            waiting.append(sock)
            try:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            except OSError:  # it has heard enough
                pass
        if len(waiting) == AT_ONCE or sent >= frames:
            with waiting.popleft() as sock:
                try:
                    while sock.recv(1 << 16):
                        pass
                except ConnectionResetError:
                    pass


@pytest.mark.parametrize("frames", [40_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_random_frames_leave_the_node_up_and_its_memory_flat(frames: int):
    fuzzer = Fuzzer(2027)
    with running_node("4MiB") as node, node.connect() as bystander:
        process = psutil.Process(node.pid)
        reserved = bystander.request(Reserve(bystander.next_id(), KEY, NO_PARENT, 4096), 5.0)
        bystander.request(Commit(bystander.next_id(), reserved.reservation, b"\1", bytes(8)), 5.0)
        bystander.request(Locate(bystander.next_id(), KEY, 60.0), 5.0)  # a lease: it must not be evicted

        def statistics() -> NodeStatistics:
            return bystander.request(Statistics(bystander.next_id()), 5.0)

        def resources() -> tuple[int, int]:
            eventually(lambda: statistics().connections == 1)
            return process.num_fds(), process.num_threads()

        # The first copy to another node takes a client, which stays.
        threads = process.num_threads()
        bystander.send(Replicate(KEY, "nobody:1"))
        eventually(lambda: process.num_threads() > threads)
        bombard(node, fuzzer, WARM_UP_FRAMES)
        before, before_bytes = resources(), process.memory_info().rss
        bombard(node, fuzzer, frames - WARM_UP_FRAMES)
        assert resources() == before
        assert process.memory_info().rss - before_bytes < MAX_GROWTH_BYTES
        now = statistics()
        assert now.bad_frames_total > frames / 50
        assert now.refused_total["version"] > 0
        assert now.views == {}
        assert (now.leases, now.sent_blocks_total) == (1, 0)
        assert bystander.request(Peek(bystander.next_id(), KEY), 5.0).present == b"\1"
