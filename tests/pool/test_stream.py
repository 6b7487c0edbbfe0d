"""Blocks through a client's connection, against a real memory node."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from polarkv_sglang.errors import NodeError
from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.pool.index import RESERVATION_S
from polarkv_sglang.pool.stream import SlabView, Upload, runs
from polarkv_sglang.transport import checksums, load_library
from polarkv_sglang.transport.columns import pack_u64, unpack_u64
from polarkv_sglang.transport.control import ControlConnection
from polarkv_sglang.transport.framing import encode_frame
from polarkv_sglang.transport.messages import (
    Committed,
    Fill,
    KeyState,
    Peek,
    Pull,
    Pulled,
    Reserve,
    Store,
    Stored,
)
from polarkv_sglang.transport.stream import Answer, Call, exchange
from tests.pool.rank import a_rank, prompt
from tests.pool.test_index import Pool
from tests.pool.test_node import eventually
from tests.support import RunningNode, running_node
from tests.transport.test_control import connect, handshake, scripted_node, until_closed

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


@pytest.fixture
def node() -> Iterator[RunningNode]:
    with running_node("64MiB", "--ucx-tls", "tcp") as node:
        yield node


@pytest.fixture
def control(node: RunningNode) -> Iterator[ControlConnection]:
    with node.connect() as control:
        yield control


def call(
    control: ControlConnection,
    request: Pull | Store | Fill,
    memory: Memory,
    expected: np.ndarray | None = None,
    deadline_s: float = 5.0,
) -> Answer | NodeError:
    calls = [Call(control, request, memory.addresses, expected)]
    [answer] = exchange(load_library(), calls, PIECE, time.monotonic() + deadline_s)
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
    stored = unpack_u64(answer.reply.checksum_blob)
    assert (answer.checksums[: len(stored)] == stored).all()
    return answer.reply


# From 8 MiB on the pages are lent to the socket.
@pytest.mark.parametrize("count", [1, 3, 200, 400])
def test_blocks_come_back_as_they_were_stored(control: ControlConnection, node: RunningNode, count: int):
    source, target = Memory(count), Memory(count, seed=1)
    assert store(control, source, keys(count)) == [RESERVED] * count
    assert len(pull(control, target, keys(count)).checksum_blob) == 8 * count
    assert (target.blocks() == source.blocks()).all()
    now = node.statistics()
    assert (now.sent_blocks_total, now.sent_bytes_total) == (count, count * BLOCK)
    assert (now.blocks, now.reservations) == (count, 0)
    eventually(lambda: node.statistics().leases == 0)


def test_large_writes_to_two_nodes_go_at_once(control: ControlConnection):
    under, sources = keys(400), (Memory(400), Memory(400, seed=2))
    with running_node("64MiB", "--ucx-tls", "tcp") as node, node.connect() as other:
        calls = [
            Call(each, Store(each.next_id(), under, NO_PARENT + under[:-16], BLOCK), source.addresses)
            for each, source in zip((control, other), sources)
        ]
        answers = exchange(load_library(), calls, PIECE, time.monotonic() + 5.0)
        assert all(isinstance(answer, Answer) for answer in answers), answers
        for each, source in zip((control, other), sources):
            target = Memory(400, seed=1)
            pull(each, target, under)
            assert (target.blocks() == source.blocks()).all()


# Refuses the call of the name and number in REFUSE, and leaves how many calls there were in the file CALLS.
_REFUSING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

static int calls;

static int refuses(const char *name) {
    const char *which = getenv("REFUSE"), *number = strchr(which, ' ');
    if (strncmp(which, name, number - which) || ++calls != atoi(number)) return 0;
    errno = EPERM;
    return 1;
}

ssize_t vmsplice(int fd, const struct iovec *ranges, size_t count, unsigned flags) {
    ssize_t (*real)(int, const struct iovec *, size_t, unsigned) = dlsym(RTLD_NEXT, "vmsplice");
    return refuses("vmsplice") ? -1 : real(fd, ranges, count, flags);
}

ssize_t splice(int in, off_t *from, int out, off_t *to, size_t length, unsigned flags) {
    ssize_t (*real)(int, off_t *, int, off_t *, size_t, unsigned) = dlsym(RTLD_NEXT, "splice");
    return refuses("splice") ? -1 : real(in, from, out, to, length, flags);
}

__attribute__((destructor)) static void tell(void) {
    FILE *file = calls ? fopen(getenv("CALLS"), "w") : NULL;
    if (file) fprintf(file, "%d", calls), fclose(file);
}
"""


@pytest.mark.parametrize("refused", ["vmsplice 2", "splice 5", "splice 0"])
def test_what_the_kernel_does_not_lend_is_copied(tmp_path: Path, refused: str):
    """In a process of its own, which has these calls refused; the last one never: then all is lent."""
    source, library, calls = tmp_path / "refusing.c", tmp_path / "refusing.so", tmp_path / "calls"
    source.write_text(_REFUSING, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "REFUSE": refused, "CALLS": str(calls)}
    inner = f"{__file__}::test_blocks_come_back_as_they_were_stored[400]"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", inner]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    number = int(refused.split()[1])
    assert int(calls.read_text()) == number or number == 0


def test_what_is_reserved_first_is_filled_and_committed(control: ControlConnection, node: RunningNode):
    source, target = Memory(4), Memory(4, seed=1)
    under = keys(4)
    reserved = control.request(Reserve(control.next_id(), under, NO_PARENT + under[:-16], BLOCK), 5.0)
    answer = call(control, Fill(control.next_id(), reserved.reservation), source)
    assert isinstance(answer, Answer)
    assert isinstance(answer.reply, Committed)
    assert answer.reply.count == 4
    pull(control, target, under)
    assert (target.blocks() == source.blocks()).all()


def test_pull_ends_at_the_first_block_that_is_not_there_or_has_another_length(control: ControlConnection):
    source, target = Memory(2), Memory(3, seed=1)
    store(control, source, keys(2))
    before = target.blocks()[1:].copy()
    assert len(pull(control, target, keys(1) + keys(1, 99) + keys(1, 2)).checksum_blob) == 8
    assert (target.blocks()[0] == source.blocks()[0]).all()
    assert (target.blocks()[1:] == before).all()
    assert pull(control, target, keys(2), BLOCK - 1).checksum_blob == b""


def test_bytes_of_a_block_that_is_there_are_for_nobody(control: ControlConnection):
    source, other, target = Memory(1), Memory(3, seed=5), Memory(3, seed=1)
    store(control, source, keys(1, 2))
    assert store(control, other, keys(3)) == [RESERVED, PRESENT, RESERVED]
    pull(control, target, keys(3))
    assert (target.blocks()[0::2] == other.blocks()[0::2]).all()
    assert (target.blocks()[1] == source.blocks()[0]).all()


@pytest.mark.parametrize("count", [3, 400])
def test_block_with_another_checksum_than_expected_is_not_stored(
    control: ControlConnection, node: RunningNode, count: int
):
    source = Memory(count)
    source.sums[1] ^= np.uint64(1)
    store(control, source, keys(count), source.sums)
    assert control.request(Peek(control.next_id(), keys(count)), 5.0).present == b"\1\0" + b"\1" * (count - 2)
    assert node.statistics().reservations == 0


def test_large_batches_ask_first_and_send_nothing_twice(node: RunningNode):
    """64 blocks of 48 KiB are more than goes out unasked."""
    blocks = prompt("large", 64)
    with a_rank(node.address, ucx_tls="tcp", deadline_s=5.0) as rank:
        before = rank.memory.copy()
        assert all(rank.put(blocks))
        assert all(rank.put(blocks))
        assert all(rank.get(blocks))
        assert (rank.memory == before).all()
    assert node.statistics().commits_total == 64


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


def test_writer_that_stalls_holds_up_nobody_and_leaves_nothing(node: RunningNode, control: ControlConnection):
    with node.connect() as stalled:
        send(stalled, half_a_store(stalled, first=100))
        eventually(lambda: node.statistics().reservations == 1)
        assert store(control, Memory(8), keys(8)) == [RESERVED] * 8
        assert store(control, Memory(1), keys(1, 100)) == [BUSY]
    eventually(lambda: node.statistics().reservations == 0)
    assert store(control, Memory(1), keys(1, 100)) == [RESERVED]


def pump(source: socket.socket, sink: socket.socket, most: int, over: threading.Event) -> None:
    """Pass bytes on, and once it was ``most`` only when the time is ``over``."""
    passed = 0
    with contextlib.suppress(OSError):
        while data := source.recv(64 << 10):
            sink.sendall(data)
            passed += len(data)
            if passed >= most:
                over.wait()
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def stalling_way(node: RunningNode, most: int, over: threading.Event) -> Iterator[str]:
    """An address that leads one client to a node; what is behind its first ``most`` bytes has to wait."""
    host, port = node.address.rsplit(":", 1)
    with socket.socket() as listener, socket.create_connection((host, int(port))) as there:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        listener.bind((host, 0))
        listener.listen()

        def lead() -> None:
            here, _ = listener.accept()
            with here:
                back = threading.Thread(target=pump, args=(there, here, sys.maxsize, over))
                back.start()
                pump(here, there, most, over)
                back.join()

        way = threading.Thread(target=lead)
        way.start()
        try:
            yield f"{host}:{listener.getsockname()[1]}"
        finally:
            over.set()
            way.join()


def test_memory_that_is_used_again_after_a_write_failed_is_in_no_block(node: RunningNode):
    """When the time is over the last pages and their checksums are in the socket yet."""
    source, under, over = Memory(400), keys(400), threading.Event()
    with (
        stalling_way(node, 400 * BLOCK - (1 << 20), over) as address,
        ControlConnection.connect(address, token=None, role="rank", client="test", deadline_s=5.0) as control,
    ):
        request = Store(control.next_id(), under, NO_PARENT + under[:-16], BLOCK)
        answer = call(control, request, source, deadline_s=1.0)
        source.bytes[:] = 0
        over.set()
    assert isinstance(answer, NodeError)
    eventually(lambda: (node.statistics().connections, node.statistics().reservations) == (1, 0))
    assert node.statistics().blocks == 0


def test_reader_that_does_not_read_keeps_its_blocks_where_they_are_until_it_is_gone(node: RunningNode):
    count = 600  # more than the sockets' buffers hold
    with node.connect() as writer, node.connect() as reader:
        for first in range(1, count, 100):
            store(writer, Memory(100), keys(100, first))
        for other in range(2):
            reader.send(Pull(other, keys(count), BLOCK))
        eventually(lambda: node.statistics().leases > 0)
        time.sleep(0.2)
        assert node.statistics().leases > 0
        assert len(pull(writer, Memory(8, seed=1), keys(8)).checksum_blob) == 64  # others are served
    eventually(lambda: node.statistics().leases == 0)


def test_requests_behind_a_store_are_answered_after_it(control: ControlConnection):
    source, under = Memory(3), keys(3)
    words = pack_u64(source.sums.tolist()) + b"\1\1\1"
    frame = bytes(encode_frame(Store(7, under, NO_PARENT + under[:-16], BLOCK)))
    peeks = b"".join(bytes(encode_frame(Peek(number, under))) for number in range(50))
    send(control, frame + source.blocks().tobytes() + words + peeks)
    deadline = time.monotonic() + 5.0
    assert control.receive(deadline) == Stored(7, bytes(3))
    for number in range(50):
        reply = control.receive(deadline)
        assert (reply.request_id, reply.present) == (number, b"\1\1\1")


def test_reservation_that_is_over_takes_no_more_bytes():
    """The slot may be another's by then."""
    pool = Pool()
    reservation = pool.index.reserve(1, [keys(1)], [NO_PARENT], 4096)
    slab = np.zeros(4096, np.uint8)
    view = SlabView(slab.ctypes.data, slab.nbytes)
    upload = Upload(
        pool.index, view, memoryview(bytearray(1)), 1, reservation.number,
        [slab.ctypes.data], 4096, lambda _: Stored(1, b"\0"),
    )  # fmt: skip
    assert upload.buffer() is not None
    upload.received(100)
    pool.now += RESERVATION_S + 1
    pool.index.expire()
    assert upload.buffer() is None
    upload.abandon()
    pool.index.check_integrity()


# A memory node where reservations and leases of pulls last for an instant.
_HASTY = """
import sys
from polarkv_sglang.pool import index, node, stream
from polarkv_sglang.cli import main
index.RESERVATION_S = stream.MAX_LEASE_S = 0.2
node.EXPIRY_INTERVAL_S = 0.05
sys.argv = sys.argv[3:]
sys.exit(main())
"""


@pytest.fixture
def hasty() -> Iterator[RunningNode]:
    with running_node("64MiB", "--ucx-tls", "tcp", launcher=[sys.executable, "-c", _HASTY]) as node:
        yield node


def test_writer_that_is_late_loses_its_connection_and_nothing_else(hasty: RunningNode):
    with hasty.connect() as late:
        send(late, half_a_store(late))
        eventually(lambda: hasty.statistics().expired_reservations_total == 1)
        send(late, bytes(BLOCK))
        with pytest.raises(NodeError):
            late.receive(time.monotonic() + 5.0)
    assert hasty.statistics().blocks == 0


def test_reader_that_does_not_read_is_cut_off_with_its_lease(hasty: RunningNode):
    count = 600  # more than the sockets' buffers hold
    with hasty.connect() as writer:
        for first in range(1, count, 100):
            store(writer, Memory(100), keys(100, first))
    with hasty.connect() as reader:
        for other in range(2):
            reader.send(Pull(other, keys(count), BLOCK))
        eventually(lambda: hasty.statistics().expired_leases_total > 0)
        eventually(lambda: hasty.statistics().connections == 1)


def test_any_number_of_stores_may_come_at_once(control: ControlConnection):
    count = 3000
    send(control, bytes(encode_frame(Store(1, b"", b"", 1))) * count)
    for _ in range(count):
        assert control.receive(time.monotonic() + 5.0) == Stored(1, b"")


def test_fill_of_a_reservation_that_is_anothers_ends_the_connection(node: RunningNode):
    with node.connect() as one, node.connect() as two:
        reserved = one.request(Reserve(one.next_id(), keys(1), NO_PARENT, BLOCK), 5.0)
        answer = call(two, Fill(two.next_id(), reserved.reservation), Memory(1))
        assert isinstance(answer, NodeError)
        assert isinstance(call(one, Fill(one.next_id(), reserved.reservation), Memory(1)), Answer)


def test_blocks_that_follow_each_other_are_one_run():
    assert runs([100, 110, 120, 200, 210, 90], 10) == [(100, 30), (200, 20), (90, 10)]
    assert runs([0, 0, 100, 0], 10) == [(0, 20), (100, 10), (0, 10)]


def pulled(count: int, total: int) -> bytes:
    frame = encode_frame(Pulled(1, pack_u64([0] * count), pack_u64([1] * count)))
    return bytes(frame) + total.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (pulled(1, BLOCK), "did not answer in time"),
        (pulled(2, BLOCK) + bytes(BLOCK), "more or fewer blocks"),
        (pulled(3, 3 * BLOCK) + bytes(3 * BLOCK), "too long"),
        (pulled(1, BLOCK - 1) + bytes(BLOCK), "too long"),
        ((1 << 30).to_bytes(4, "little"), "too long"),
        (bytes(encode_frame(Stored(1, b""))) + bytes(8), "with another message"),
        (b"\5\0\0\0hello" + bytes(8), "broke the protocol"),
        (b"", "did not answer in time"),
    ],
    ids=["short", "miscounted", "more blocks", "part of one", "long frame", "another", "garbage", "silence"],
)
def test_answer_that_is_none_ends_the_connection_in_time(answer: bytes, why: str):
    def serve(connection: socket.socket) -> None:
        handshake(connection)
        connection.recv(4096)
        connection.sendall(answer)
        until_closed(connection)

    with scripted_node(serve) as address, connect(address) as control:
        started = time.monotonic()
        got = call(control, Pull(1, keys(2), BLOCK), Memory(2), deadline_s=0.4)
        assert isinstance(got, NodeError)
        assert why in str(got)
        assert time.monotonic() - started < 2.0
        assert isinstance(call(control, Pull(2, keys(2), BLOCK), Memory(2)), NodeError)


@contextlib.contextmanager
def dripping(connection: socket.socket) -> Iterator[None]:
    """Unused bytes trickle in all the while."""
    stop = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.02):
                connection.sendall(b"\0")

    thread = threading.Thread(target=drip)
    thread.start()
    yield
    stop.set()
    thread.join()


def test_node_that_drips_bytes_cannot_stretch_the_deadline():
    def serve(connection: socket.socket) -> None:
        handshake(connection)
        connection.recv(4096)
        connection.sendall(pulled(2, 2 * BLOCK))
        with dripping(connection):
            until_closed(connection)

    with scripted_node(serve) as address, connect(address) as control:
        started = time.monotonic()
        assert isinstance(call(control, Pull(1, keys(2), BLOCK), Memory(2), deadline_s=0.3), NodeError)
        assert 0.2 < time.monotonic() - started < 2.0


def test_silent_node_does_not_take_the_blocks_of_another(node: RunningNode, control: ControlConnection):
    def serve(connection: socket.socket) -> None:
        handshake(connection)
        until_closed(connection)

    source, target, other = Memory(2), Memory(2, seed=1), Memory(2, seed=2)
    store(control, source, keys(2))
    with scripted_node(serve) as address, connect(address) as silent:
        calls = [
            Call(silent, Pull(silent.next_id(), keys(2), BLOCK), other.addresses),
            Call(control, Pull(control.next_id(), keys(2), BLOCK), target.addresses),
        ]
        failed, answer = exchange(load_library(), calls, PIECE, time.monotonic() + 0.4)
        assert isinstance(failed, NodeError)
        assert isinstance(answer, Answer)
        assert (target.blocks() == source.blocks()).all()
