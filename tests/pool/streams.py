"""Blocks in memory, and calls that move them through a connection to a memory node."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import numpy as np

from polarkv_sglang.errors import NodeError
from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.transport import checksums, load_library
from polarkv_sglang.transport.control import ControlConnection
from polarkv_sglang.transport.framing import encode_frame
from polarkv_sglang.transport.messages import Fill, KeyState, Pull, Pulled, Store, Stored
from polarkv_sglang.transport.stream import Answer, Call, Exchange
from tests.support import RunningNode

PIECE, PIECES = 12 << 10, 2
BLOCK = PIECE * PIECES
RESERVED, PRESENT, BUSY = KeyState.RESERVED, KeyState.PRESENT, KeyState.BUSY


def keys(count: int, first: int = 1) -> bytes:
    return b"".join(number.to_bytes(16, "big") for number in range(first, first + count))


class Memory:
    """``count`` blocks in pieces that lie all over."""

    def __init__(self, count: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.bytes = random.integers(0, 256, (PIECES * count, PIECE), np.uint8)
        places = random.permutation(PIECES * count).astype(np.uint64)
        self.addresses = (self.bytes.ctypes.data + places * np.uint64(PIECE)).reshape(count, PIECES)
        self.sums = checksums(load_library(), self.addresses, PIECE)
        self.places = places.astype(np.intp)

    def blocks(self) -> np.ndarray:
        """Their bytes, in order."""
        return self.bytes[self.places].reshape(-1, BLOCK)


@contextlib.contextmanager
def streaming(node: RunningNode) -> Iterator[ControlConnection]:
    """A connection that blocks may go through."""
    with node.connect() as control:
        control.start_streaming(5.0)
        yield control


def call(
    control: ControlConnection,
    request: Pull | Store | Fill,
    memory: Memory,
    expected: np.ndarray | None = None,
    deadline_s: float = 5.0,
) -> Answer | NodeError:
    calls = [Call(control, request, memory.addresses, expected)]
    [answer] = Exchange(load_library()).run(calls, PIECE, time.monotonic() + deadline_s)
    return answer


def store(
    control: ControlConnection, memory: Memory, under: bytes, expected: np.ndarray | None = None
) -> list:
    """Write blocks unasked; the state of each key."""
    request = Store(control.next_id(), under, (NO_PARENT + under)[: len(under)], BLOCK)
    answer = call(control, request, memory, expected)
    assert isinstance(answer, Answer), answer
    assert isinstance(answer.reply, Stored)
    return list(answer.reply.states)


def pull(control: ControlConnection, memory: Memory, under: bytes, length: int = BLOCK) -> Pulled:
    answer = call(control, Pull(control.next_id(), under, length), memory)
    assert isinstance(answer, Answer), answer
    assert isinstance(answer.reply, Pulled)
    assert answer.right == b"\1" * (len(answer.reply.checksum_blob) // 8)
    return answer.reply


def half_a_store(control: ControlConnection, count: int = 8, first: int = 1) -> bytes:
    """The start of a store, and half of the bytes behind it."""
    under = keys(count, first)
    frame = encode_frame(Store(control.next_id(), under, (NO_PARENT + under)[: len(under)], BLOCK))
    return bytes(frame) + bytes(count * BLOCK // 2)


def send(control: ControlConnection, data: bytes) -> None:
    with socket.socket(fileno=control.fileno()) as sock:
        try:
            sock.settimeout(5.0)
            sock.sendall(data)
        finally:
            sock.detach()
