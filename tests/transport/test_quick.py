"""Socket calls that keep the GIL."""

from __future__ import annotations

import errno
import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from polarkv_sglang.transport.quick import QuickSocket, bound_send_buffer, connect_unpaced, is_to_own_host
from tests.support import running_node

BUFFER_BYTES = 4096


@pytest.fixture
def pair() -> Iterator[tuple[QuickSocket, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(5.0)
    with ours, theirs:
        yield QuickSocket(ours, BUFFER_BYTES), theirs


def test_what_was_sent_arrives_in_both_directions(pair: tuple[QuickSocket, socket.socket]):
    quick, theirs = pair
    assert quick.send(b"ask\0ed") == 6
    assert theirs.recv(100) == b"ask\0ed"
    theirs.sendall(b"ans\0wered")
    assert quick.receive(0.0) == b"ans\0wered"


def test_more_than_the_buffer_is_received_piece_by_piece(pair: tuple[QuickSocket, socket.socket]):
    quick, theirs = pair
    data = bytes(range(256)) * 40
    theirs.sendall(data)
    received = b""
    while (part := quick.receive(0.0)) is not None:
        assert len(part) <= BUFFER_BYTES
        received += part
    assert received == data


def test_nothing_to_receive_is_none_after_the_patience(pair: tuple[QuickSocket, socket.socket]):
    quick, _ = pair
    started = time.monotonic()
    assert quick.receive(-1.0) is None
    assert quick.receive(0.1) is None
    assert time.monotonic() - started >= 0.1


def test_end_of_the_stream_is_empty(pair: tuple[QuickSocket, socket.socket]):
    quick, theirs = pair
    theirs.close()
    assert quick.receive(1.0) == b""


def test_full_socket_takes_a_part_and_then_nothing(pair: tuple[QuickSocket, socket.socket]):
    quick, _ = pair
    data = bytes(64 << 20)
    assert 0 < quick.send(data) < len(data)
    assert quick.send(data) == 0


def test_lost_peer_is_an_os_error_and_no_signal(pair: tuple[QuickSocket, socket.socket]):
    quick, theirs = pair
    theirs.close()
    with pytest.raises(BrokenPipeError) as caught:
        quick.send(b"anybody?")
    assert caught.value.errno == errno.EPIPE


def test_no_other_thread_runs_python_meanwhile(pair: tuple[QuickSocket, socket.socket]):
    quick, theirs = pair
    over, turns = threading.Event(), 0

    def run() -> None:
        nonlocal turns
        while not over.is_set():
            turns += 1

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1.0)  # so long after asking for it the GIL is taken away, and not before
    thread = threading.Thread(target=run)
    thread.start()
    try:
        theirs.sendall(bytes(1000))  # afterwards we have just got the GIL
        before = turns
        for _ in range(1000):
            quick.send(b"x")
            quick.receive(0.0)
        quick.receive(1e-4)
        assert turns == before
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval_s)


def test_little_waits_in_a_socket_to_this_very_host():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sock,
    ):
        bound_send_buffer(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 512 << 10
    with running_node("4MiB") as node, node.connect() as control:
        control.start_streaming(5.0)
        assert control._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 512 << 10


def test_a_client_sends_to_this_very_host_by_reno():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as sock:
        connect_unpaced(sock, server.getsockname())
        assert _congestion_control(sock) == b"reno"
    with running_node("4MiB") as node, node.connect() as control:
        control.start_streaming(5.0)
        assert _congestion_control(control._socket) == b"reno"
        assert control.is_on_own_host


def test_what_goes_to_another_address_keeps_the_congestion_control_of_the_host():
    with socket.create_server(("127.0.0.2", 0)) as server, socket.socket() as sock, socket.socket() as usual:
        connect_unpaced(sock, server.getsockname())  # from 127.0.0.1
        assert not is_to_own_host(sock)
        assert _congestion_control(sock) == _congestion_control(usual)


def _congestion_control(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
