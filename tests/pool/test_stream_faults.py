"""Peers that stall, drip, answer wrongly or come too late, on connections that move blocks."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from polarkv_sglang.errors import NodeError
from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.transport import load_library
from polarkv_sglang.transport.columns import pack_u64
from polarkv_sglang.transport.control import ControlConnection
from polarkv_sglang.transport.framing import encode_frame
from polarkv_sglang.transport.messages import (
    Fill,
    Message,
    Peek,
    Pull,
    Pulled,
    Request,
    Reserve,
    StartStream,
    Statistics,
    Stored,
    View,
)
from polarkv_sglang.transport.stream import Answer, Call, Exchange
from tests.pool.streams import (
    BLOCK,
    BUSY,
    PIECE,
    RESERVED,
    Memory,
    call,
    half_a_store,
    keys,
    pull,
    send,
    store,
    streaming,
)
from tests.pool.test_node import eventually
from tests.support import RunningNode, running_node
from tests.transport.test_control import connect, handshake, scripted_node, until_closed


def test_writer_that_stalls_holds_up_nobody_and_leaves_nothing(node: RunningNode, control: ControlConnection):
    with streaming(node) as stalled:
        send(stalled, half_a_store(stalled, first=100))
        eventually(lambda: node.statistics().reservations == 1)
        assert store(control, Memory(8), keys(8)) == [RESERVED] * 8
        assert store(control, Memory(1), keys(1, 100)) == [BUSY]
    eventually(lambda: node.statistics().reservations == 0)
    assert store(control, Memory(1), keys(1, 100)) == [RESERVED]


def test_reader_that_does_not_read_keeps_its_blocks_where_they_are_until_it_is_gone(node: RunningNode):
    count = 600  # more than the sockets' buffers hold
    with streaming(node) as writer, streaming(node) as reader:
        for first in range(1, count, 100):
            store(writer, Memory(100), keys(100, first))
        for other in range(2):
            reader.send(Pull(other, keys(count), BLOCK))
        eventually(lambda: node.statistics().leases > 0)
        time.sleep(0.2)
        assert node.statistics().leases > 0
        assert len(pull(writer, Memory(8, seed=1), keys(8)).checksum_blob) == 64  # others are served
    eventually(lambda: node.statistics().leases == 0)


def test_node_that_is_told_to_stop_does_not_wait_for_those_who_stall(node: RunningNode):
    with streaming(node) as reader, streaming(node) as writer:
        for first in range(1, 600, 100):
            store(writer, Memory(100), keys(100, first))
        for other in range(2):
            reader.send(Pull(other, keys(600), BLOCK))
        send(writer, half_a_store(writer, first=1000))
        eventually(lambda: (node.statistics().leases, node.statistics().reservations) == (1, 1))
        started = time.monotonic()
        assert node.stop() == 0
        assert time.monotonic() - started < 5.0


@pytest.mark.parametrize(
    "behind", [Peek(2, keys(1)), StartStream(2)], ids=["a request", "the same once more"]
)
def test_what_comes_with_the_request_to_stream_ends_the_connection(node: RunningNode, behind: Message):
    with node.connect() as control:
        send(control, bytes(encode_frame(StartStream(1)) + encode_frame(behind)))
        with pytest.raises(NodeError):
            control.receive(time.monotonic() + 5.0)
    assert node.statistics().bad_frames_total == 1


@pytest.mark.parametrize(
    "request_", [StartStream(2), Statistics(2), View({})], ids=["again", "statistics", "view"]
)
def test_what_a_stream_does_not_take_ends_the_connection(
    node: RunningNode, control: ControlConnection, request_: Request
):
    control.send(request_)
    with pytest.raises(NodeError):
        control.receive(time.monotonic() + 5.0)
    eventually(lambda: (node.statistics().connections, node.statistics().bad_frames_total) == (1, 1))


@pytest.mark.parametrize("request_", [Pull(1, keys(1), BLOCK), Fill(1, 1)], ids=["pull", "fill"])
def test_blocks_pass_only_where_they_may(node: RunningNode, request_: Pull | Fill):
    with node.connect() as control:
        control.send(request_)
        with pytest.raises(NodeError):
            control.receive(time.monotonic() + 5.0)
    assert node.statistics().bad_frames_total == 1


# A memory node where reservations and leases of pulls last for an instant.
_HASTY = """
import sys
from polarkv_sglang.pool import index, node, stream
from polarkv_sglang.cli import main
index.RESERVATION_S = index.MAX_LEASE_S = 0.2
node.EXPIRY_INTERVAL_S = 0.05
sys.argv = sys.argv[3:]
sys.exit(main())
"""


@pytest.fixture
def hasty() -> Iterator[RunningNode]:
    with running_node("64MiB", "--ucx-tls", "tcp", launcher=[sys.executable, "-c", _HASTY]) as node:
        yield node


def test_writer_that_is_late_loses_its_connection_and_nothing_else(hasty: RunningNode):
    with streaming(hasty) as late:
        send(late, half_a_store(late))
        eventually(lambda: hasty.statistics().expired_reservations_total == 1)
        send(late, bytes(BLOCK))
        with pytest.raises(NodeError):
            late.receive(time.monotonic() + 5.0)
    assert hasty.statistics().blocks == 0


def test_reader_that_does_not_read_is_cut_off_with_its_lease(hasty: RunningNode):
    count = 600  # more than the sockets' buffers hold
    with streaming(hasty) as writer:
        for first in range(1, count, 100):
            store(writer, Memory(100), keys(100, first))
    with streaming(hasty) as reader:
        for other in range(2):
            reader.send(Pull(other, keys(count), BLOCK))
        eventually(lambda: hasty.statistics().connections == 1)
        now = hasty.statistics()
        assert (now.leases, now.expired_leases_total) == (0, 0), "it was still sent when its lease ended"


def test_fill_of_a_reservation_that_is_anothers_ends_the_connection(node: RunningNode):
    with streaming(node) as one, streaming(node) as two:
        reserved = one.request(Reserve(one.next_id(), keys(1), NO_PARENT, BLOCK), 5.0)
        answer = call(two, Fill(two.next_id(), reserved.reservation), Memory(1))
        assert isinstance(answer, NodeError)
        assert isinstance(call(one, Fill(one.next_id(), reserved.reservation), Memory(1)), Answer)


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


def test_each_block_that_is_not_what_its_checksum_says_is_told():
    source = Memory(3)
    sums = source.sums.copy()
    sums[1] ^= np.uint64(1)
    reply = encode_frame(Pulled(1, sums.tobytes(), pack_u64([1] * 3)))

    def serve(connection: socket.socket) -> None:
        handshake(connection)
        connection.recv(4096)
        connection.sendall(reply + (3 * BLOCK).to_bytes(8, "little") + source.blocks().tobytes())
        until_closed(connection)

    with scripted_node(serve) as address, connect(address) as control:
        answer = call(control, Pull(1, keys(4), BLOCK), Memory(4, seed=1))
        assert isinstance(answer, Answer)
        assert answer.right == b"\1\0\1"


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


def test_waiting_for_a_node_that_stalls_takes_little_of_a_processor():
    def serve(connection: socket.socket) -> None:
        handshake(connection)
        connection.recv(4096)
        connection.sendall(pulled(2, 2 * BLOCK) + bytes(BLOCK))  # half of what it says
        until_closed(connection)

    with scripted_node(serve) as address, connect(address) as control:
        load_library()  # which takes longer
        control.is_on_own_host = True  # it is waited for without sleep at first
        started = time.thread_time()
        assert isinstance(call(control, Pull(1, keys(2), BLOCK), Memory(2), deadline_s=0.5), NodeError)
        assert time.thread_time() - started < 0.1


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
        failed, answer = Exchange(load_library()).run(calls, PIECE, time.monotonic() + 0.4)
        assert isinstance(failed, NodeError)
        assert isinstance(answer, Answer)
        assert (target.blocks() == source.blocks()).all()


@pytest.mark.parametrize("closed", [0, 1])
def test_connection_that_is_closed_does_not_take_the_blocks_of_another(
    node: RunningNode, control: ControlConnection, closed: int
):
    source, target = Memory(2), Memory(2, seed=1)
    store(control, source, keys(2))
    with streaming(node) as gone:
        gone.close()
        calls = [Call(control, Pull(control.next_id(), keys(2), BLOCK), target.addresses)]
        calls.insert(closed, Call(gone, Pull(1, keys(2), BLOCK), Memory(2).addresses))
        answers = Exchange(load_library()).run(calls, PIECE, time.monotonic() + 5.0)
    assert "is closed on our side" in str(answers[closed])
    assert isinstance(answers[1 - closed], Answer)
    assert (target.blocks() == source.blocks()).all()
