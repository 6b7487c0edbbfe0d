"""What compiled code answers on a connection that streams, against what Python answers to the same."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import pytest

from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.pool.answers import answer
from polarkv_sglang.pool.index import Index
from polarkv_sglang.pool.native import load_native
from polarkv_sglang.pool.notes import Notes
from polarkv_sglang.pool.slab import PAGE_BYTES, Slab
from polarkv_sglang.pool.stream import Served
from polarkv_sglang.transport.columns import pack_u64
from polarkv_sglang.transport.framing import BadFrame, decode_from_client, decode_from_node, encode_frame
from polarkv_sglang.transport.messages import (
    MAX_KEYS,
    MAX_PULL_PARTS,
    MAX_PULL_RUNS,
    Commit,
    Fill,
    Hold,
    KeyState,
    Locate,
    Located,
    Message,
    Peek,
    Pull,
    ReadNotes,
    Release,
    Renew,
    ReportCorrupt,
    Reserve,
    Reserved,
    Store,
)

OWNER = 7
SEGMENT_BYTES = 16 * PAGE_BYTES
KEYS = [number.to_bytes(16, "big") for number in range(1, 200)]


def new_index(blocks: int = 64) -> Index:
    return Index(Slab(1 << 40, blocks * PAGE_BYTES, SEGMENT_BYTES))


class Client:
    """The far end of a connection that is served in a thread."""

    def __init__(self, index: Index, thread: ThreadPoolExecutor) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._ours.settimeout(10.0)
        self._served = Served(index, OWNER, self._theirs.fileno())
        self._thread = thread
        self._left: Future[bytes] = self._serve()

    def _serve(self) -> Future[bytes]:
        return self._thread.submit(lambda: bytes(self._served.next_frame()))

    def send(self, frame: bytes) -> None:
        self._ours.sendall(frame)

    def reply(self) -> Message:
        size = int.from_bytes(self._receive(4), "little")
        return decode_from_node(self._receive(size))

    def _receive(self, size: int) -> bytes:
        """So many bytes; MSG_WAITALL is without effect on a socket with a timeout."""
        received = bytearray()
        while len(received) < size:
            part = self._ours.recv(size - len(received))
            assert part, "the connection has ended"
            received += part
        return bytes(received)

    def left_over(self) -> bytes:
        """The frame that was left for Python."""
        frame = self._left.result(10.0)
        self._left = self._serve()
        return frame

    def close(self) -> None:
        """Returns once nobody serves it any more."""
        self._ours.close()
        while self._left.exception(10.0) is None:
            self.left_over()
        self._theirs.close()
        assert isinstance(self._left.exception(), ConnectionError)


@contextlib.contextmanager
def served(index: Index) -> Iterator[Client]:
    with ThreadPoolExecutor(1) as thread, contextlib.closing(Client(index, thread)) as client:
        yield client


class Requests:
    """Requests of chance, about what earlier ones have brought."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._reserved: list[Reserved] = [Reserved(1, 5, b"", b"")]
        self._leases = [0]

    def draw(self, number: int) -> Message:
        dice = self._dice
        first, count = dice.randrange(len(KEYS)), dice.choice((0, 1, 2, 5, 40))
        names = KEYS[first : first + count]
        keys, parents = b"".join(names), b"".join([NO_PARENT, *names][: len(names)])
        seconds = dice.choice((1e-300, 0.5, 30.0, 1e9, float("inf")))
        match dice.randrange(8):
            case 0 | 1:
                return Reserve(number, keys, parents, dice.choice((1, 4096, 5000, SEGMENT_BYTES + 1)))
            case 2:
                made = dice.choice(self._reserved)
                ours = made.states.count(0)
                return Commit(number, made.reservation, dice.randbytes(ours), dice.randbytes(8 * ours))
            case 3:
                return Locate(number, keys, seconds)
            case 4:
                return Hold(number, keys, seconds)
            case 5:
                return Renew(number, dice.choice(self._leases), seconds)
            case 6:
                return Release(dice.choice(self._leases))
            case _:
                return Peek(number, keys)

    def learn(self, reply: Message | None) -> None:
        if isinstance(reply, Reserved):
            self._reserved.append(reply)
        if isinstance(reply, Located):
            self._leases.append(reply.lease)


@pytest.mark.parametrize("seed", range(5))
def test_replies_are_those_of_python(seed: int):
    """Over all sizes of numbers, and with the same left in the index."""
    index, twin = new_index(), new_index()
    requests, numbers = Requests(seed), (1, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63 - 1)
    with served(index) as client:
        for step in range(1500):
            request = requests.draw(numbers[step % len(numbers)])
            expected = answer(twin, Notes(0), OWNER, request)
            client.send(bytes(encode_frame(request)))
            if expected is not None:
                assert client.reply() == expected, request
                requests.learn(expected)
        client.send(bytes(encode_frame(Peek(1, b""))))
        client.reply()
        index.check_integrity()
        assert index.statistics() == twin.statistics()
    assert twin.statistics().evictions_total > 0


def test_a_request_of_as_many_keys_as_there_may_be_is_answered():
    keys = b"".join(number.to_bytes(16, "big") for number in range(1, MAX_KEYS + 1))
    index = new_index()
    with served(index) as client:
        client.send(bytes(encode_frame(Reserve(1, keys, NO_PARENT * MAX_KEYS, 4096))))
        assert client.reply() == answer(
            new_index(), Notes(0), OWNER, Reserve(1, keys, NO_PARENT * MAX_KEYS, 4096)
        )
        client.send(bytes(encode_frame(Peek(2, keys))))
        assert client.reply() == answer(index, Notes(0), OWNER, Peek(2, keys))


@pytest.mark.parametrize(
    "request_", [ReadNotes(1, KEYS[0]), ReportCorrupt(KEYS[0], pack_u64([1]))], ids=["notes", "corrupt"]
)
def test_what_is_not_answered_there_is_left_for_python(request_: Message):
    with served(new_index()) as client:
        client.send(bytes(encode_frame(request_)))
        assert decode_from_client(client.left_over()) == request_


@pytest.mark.parametrize(
    "items",
    [
        ["peek", 1, bytes(15)],
        ["peek", 1, bytes(16 * (MAX_KEYS + 1))],
        ["peek", -1, b""],
        ["peek", 1, b"", 0],
        ["peek", 1],
        ["peek", "1", b""],
        ["locate", 1, b"", 0.0],
        ["locate", 1, b"", float("nan")],
        ["locate", 1, b"", -1.0],
        ["reserve", 1, bytes(16), bytes(32), 4096],
        ["reserve", 1, b"", b"", 0],
        ["reserve", 1, b"", b"", 2**40 + 1],
        ["commit", 1, 1, b"\1", bytes(7)],
        ["commit", 1, 1, bytes(MAX_KEYS + 1), bytes(8 * (MAX_KEYS + 1))],
        ["store", 1, bytes(16), b"", 4096, b""],
        ["pull", 1, b"", 4096, bytes(15)],
        ["pull", 1, b"", 4096, pack_u64([0, 0])],
        ["pull", 1, b"", 4096, pack_u64([1, 4096])],
        ["pull", 1, b"", 4096, pack_u64([2**64 - 1, 2])],
        ["pull", 1, b"", 4096, pack_u64([0, 1] * 65)],
        ["pull", 1, bytes(16 * MAX_KEYS), 4096, pack_u64([0, 1] * 3)],
        ["hold", 1, b"", 0.0],
        ["renew", 1, 1, 0.0],
        ["fill", 1, 1, b"", b""],
        [],
        {"peek": 1},
        "peek",
    ],
    ids=lambda items: items[0] if isinstance(items, list) and items else type(items).__name__,
)
def test_what_is_wrong_with_a_request_is_left_for_python_to_say(items: object):
    frame = msgspec.msgpack.encode(items)
    with served(new_index()) as client:
        client.send(len(frame).to_bytes(4, "little") + frame)
        left = client.left_over()
        assert left == frame
        with pytest.raises(BadFrame):
            decode_from_client(left)


def test_fill_of_nothing_is_left_for_python():
    with served(new_index()) as client:
        client.send(bytes(encode_frame(Fill(1, 99))))
        with pytest.raises(BadFrame, match="a reservation that is over"):
            answer(new_index(), Notes(0), OWNER, decode_from_client(client.left_over()))


def test_requests_that_are_cut_or_changed_do_no_harm():
    """Each is answered, or left for Python, or has its blocks waited for."""
    dice = random.Random(3)
    keys = b"".join(KEYS[:3])
    whole = [
        Peek(1, keys), Locate(2, keys, 1.0), Hold(3, keys, 1.0), Renew(4, 5, 1.0), Release(6),
        Reserve(7, keys, keys, 4096), Commit(8, 9, b"\1\0\1", bytes(24)), Pull(10, keys, 4096),
        Store(11, b"", b"", 4096), Fill(12, 13),
    ]  # fmt: skip
    index = new_index()
    for _ in range(2000):
        frame = bytearray(encode_frame(dice.choice(whole))[4:])
        for _ in range(dice.randrange(4)):
            frame[dice.randrange(len(frame))] = dice.randrange(256)
        frame = frame[: dice.randrange(len(frame) + 1)] if dice.random() < 0.3 else frame
        with served(index) as client:
            client.send(len(frame).to_bytes(4, "little") + frame)
            with contextlib.suppress(OSError):
                client.send(bytes(encode_frame(Peek(99, b""))))
    index.check_integrity()


# An index that has no memory to find more keys by, and addresses that an earlier request has left.
_NO_MEMORY = """
import resource
from tests.pool.test_serve import new_index, numbered
from polarkv_sglang.pool.native import load_native

_, node, ffi = load_native()
blocks, count = 1 << 18, 4096
index = new_index(blocks)
for first in range(1, blocks, count):
    addresses, states = ffi.new("uint64_t[]", [7] * count), ffi.new("uint8_t[]", count)
    keys, parents = numbered(first, count), bytes(16 * count)
    request = index.native, 1, keys, parents, count, 4096, 0, 0, addresses, states
    resource.setrlimit(resource.RLIMIT_AS, (4096, -1))
    number = node.polar_reserve(*request)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    if not number:
        break
assert not number, "there was memory for all"
assert not any(addresses), "addresses of others are told"
assert set(states) == {node.POLAR_NO_ROOM}
assert node.polar_reserve(*request) and all(addresses)
print("refused from", first)
"""


def numbered(first: int, count: int) -> bytes:
    return b"".join(number.to_bytes(16, "big") for number in range(first, first + count))


def test_request_that_there_is_no_memory_for_is_given_no_address():
    done = subprocess.run(
        [sys.executable, "-c", _NO_MEMORY], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.startswith("refused from"), done.stderr


def test_limits_are_those_of_the_messages():
    node = load_native().node
    assert node.POLAR_MAX_KEYS == MAX_KEYS
    assert node.POLAR_MAX_PULL_PARTS == MAX_PULL_PARTS
    assert node.POLAR_MAX_PULL_RUNS == MAX_PULL_RUNS
    states = KeyState.RESERVED, KeyState.PRESENT, KeyState.NO_ROOM, KeyState.BUSY
    assert states == (node.POLAR_RESERVED, node.POLAR_PRESENT, node.POLAR_NO_ROOM, node.POLAR_BUSY)


def test_more_keys_than_there_may_be_are_refused_where_python_calls():
    index, keys = new_index(), bytes(16 * (MAX_KEYS + 1))
    for call in (index.peek, index.describe, lambda keys: index.locate(1, keys, 1.0)):
        with pytest.raises(ValueError, match="are not up to 8192 keys"):
            call(keys)
    with pytest.raises(ValueError, match="other parents"):
        index.reserve(1, bytes(32), bytes(16), 4096)
