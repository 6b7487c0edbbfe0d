"""Bytes between a socket and memory, in calls that wait."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from polarkv_sglang.pool.index import Index
from polarkv_sglang.pool.native import load_native
from polarkv_sglang.pool.slab import Slab
from polarkv_sglang.pool.stream import Served
from polarkv_sglang.transport.columns import pack_u64
from polarkv_sglang.transport.framing import MAX_FRAME_BYTES, BadFrame

HEAD = bytearray(b"head")
Parts = list[tuple[int, int]]  # where in a block each begins, and its bytes


class Delivery:
    """The calls, as serve.c makes them."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(
        self, head: bytearray, addresses: list[int] = (), parts: bytes = b"", timeout_s: float = 10.0
    ) -> None:
        head_start = load_native().ffi.from_buffer("uint8_t[]", head)
        self._run("polar_send", addresses, parts, timeout_s, head=head_start, head_bytes=len(head))

    def receive(
        self,
        tail: bytearray,
        tail_bytes: int,
        addresses: list[int] = (),
        parts: bytes = b"",
        timeout_s: float = 10.0,
        *,
        spin_s: float = 0.0,
    ) -> None:
        start = load_native().ffi.from_buffer("uint8_t[]", tail)
        ends = {"tail": start, "tail_bytes": tail_bytes, "spin_ns": int(spin_s * 1e9)}
        self._run("polar_receive", addresses, parts, timeout_s, **ends)

    def _run(
        self, function: str, addresses: list[int], parts: bytes, timeout_s: float, **ends: object
    ) -> None:
        _, node, ffi = load_native()
        words = [ffi.from_buffer("uint64_t[]", blob) for blob in (pack_u64(addresses), parts)]
        delivery = {"fd": self._fd, "timeout_ns": int(timeout_s * 1e9)} | ends
        delivery |= {"blocks": words[0], "block_count": len(addresses)}
        delivery |= {"parts": words[1], "part_count": len(parts) // 16}
        error = getattr(node, function)(ffi.new("polar_delivery *", delivery))
        if error:
            raise OSError(error, os.strerror(error))


class Ends:
    """A connection, and both of its ends."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.ours = socket.create_connection(server.getsockname())
            self.theirs, _ = server.accept()
        self.ours.setblocking(False)
        self.delivery = Delivery(self.ours.fileno())
        index = Index(Slab(1 << 40, 1 << 20, 1 << 20))
        self.served = Served(index, 1, self.ours.fileno())

    def read(self, count: int) -> bytes:
        return self.theirs.recv(count, socket.MSG_WAITALL)


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    with ends.ours, ends.theirs, ThreadPoolExecutor(1) as ends.thread:
        yield ends
        ends.theirs.close()


def blocks(count: int, length: int, seed: int) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Blocks, some of which follow each other: their bytes, addresses, and the memory that they lie in."""
    memory = np.random.default_rng(seed).integers(0, 256, (2 * count, length), np.uint8)
    places = sorted(random.Random(seed).sample(range(2 * count), count))
    return memory[places], [memory.ctypes.data + place * length for place in places], memory


PARTS: Parts = [(0, 700), (1000, 1), (1500, 548)]


@pytest.mark.parametrize("parts", [[(0, 2048)], PARTS], ids=["whole", "parts"])
@pytest.mark.parametrize("count", [0, 1, 3, 1000, 5000])
def test_parts_of_blocks_go_out_in_order_behind_the_head(ends: Ends, count: int, parts: Parts):
    content, addresses, _memory = blocks(count, 2048, seed=count)
    expected = b"".join(bytes(block[at : at + size]) for block in content for at, size in parts)
    blob = pack_u64([number for part in parts for number in part])
    sending = ends.thread.submit(ends.delivery.send, HEAD, addresses, blob, 10.0)
    assert ends.read(len(HEAD) + len(expected)) == HEAD + expected
    sending.result()


@pytest.mark.parametrize("parts", [[(0, 2048)], PARTS], ids=["whole", "parts"])
@pytest.mark.parametrize("count", [0, 1, 3, 1000, 5000])
def test_parts_of_blocks_come_in_order_before_the_tail(ends: Ends, count: int, parts: Parts):
    """Every third block is for nobody, and nothing but the parts is written to."""
    sent, _, _ = blocks(count, 2048, seed=count)
    _, addresses, memory = blocks(count, 2048, seed=count + 1)
    whole = memory.copy()
    wanted = [0 if place % 3 == 1 else address for place, address in enumerate(addresses)]
    for address, block in zip(wanted, sent):
        start = address - memory.ctypes.data
        for at, size in parts if address else ():
            whole.reshape(-1)[start + at : start + at + size] = block[at : at + size]
    tail = bytearray(100)
    blob = pack_u64([number for part in parts for number in part])
    receiving = ends.thread.submit(ends.delivery.receive, tail, 5, wanted, blob, 10.0)
    data = b"".join(bytes(block[at : at + size]) for block in sent for at, size in parts) + b"12345"
    cut = len(data) // 3
    ends.theirs.sendall(data[:cut])
    time.sleep(0.01)
    ends.theirs.sendall(data[cut:] + b"more")
    receiving.result()
    assert tail == b"12345" + bytes(95)
    assert (memory == whole).all()
    assert ends.ours.recv(10) == b"more"


def test_frames_come_one_by_one_and_of_any_length(ends: Ends):
    payloads = [b"", b"one", bytes(200_000), b"two"]
    receiving = ends.thread.submit(lambda: [bytes(ends.served.next_frame()) for _ in payloads])
    for payload in payloads:
        ends.theirs.sendall(len(payload).to_bytes(4, "little") + payload)
    assert receiving.result() == payloads


def test_frame_over_the_limit_is_refused(ends: Ends):
    ends.theirs.sendall((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(BadFrame, match="over the limit"):
        ends.served.next_frame()


def test_peer_that_stalls_is_waited_for_until_the_time_is_over(ends: Ends):
    _, addresses, _memory = blocks(8, 1 << 20, seed=1)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        ends.delivery.send(HEAD, addresses, pack_u64((0, 1 << 20)), 0.2)
    with pytest.raises(TimeoutError):
        ends.delivery.receive(bytearray(1), 1, timeout_s=0.2)
    assert 0.4 <= time.monotonic() - started < 2.0


def test_waiting_for_a_peer_on_this_host_takes_little_of_a_processor(ends: Ends):
    ends.theirs.sendall(b"x")
    started = time.thread_time()
    with pytest.raises(TimeoutError):
        ends.delivery.receive(bytearray(2), 2, timeout_s=0.5, spin_s=1e-4)
    assert time.thread_time() - started < 0.1


@pytest.mark.parametrize("sends", [True, False], ids=["send", "receive"])
def test_peer_that_is_always_ready_is_not_waited_for_longer(ends: Ends, sends: bool):
    """As many bytes as take it seconds."""
    _, [address], _memory = blocks(1, 1 << 20, seed=1)
    other = ends.thread.submit(_read_or_write_for_ever, ends.theirs, reads=sends)
    started = time.monotonic()
    front = (HEAD,) if sends else (HEAD, len(HEAD))
    call = ends.delivery.send if sends else ends.delivery.receive
    with pytest.raises(TimeoutError):
        call(*front, [address] * 100_000, pack_u64((0, 1 << 20)), 0.2)
    assert time.monotonic() - started < 2.0
    ends.ours.shutdown(socket.SHUT_RDWR)
    ends.ours.close()
    other.result()


def _read_or_write_for_ever(sock: socket.socket, *, reads: bool) -> None:
    buffer = bytearray(1 << 20)
    try:
        while sock.recv_into(buffer) if reads else sock.send(buffer):
            pass
    except ConnectionError:
        pass


def test_peer_that_goes_ends_the_call(ends: Ends):
    receiving = ends.thread.submit(ends.served.next_frame)
    time.sleep(0.05)
    ends.theirs.close()
    with pytest.raises(ConnectionError):
        receiving.result()
