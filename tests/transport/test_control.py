"""The client's end of the control plane against nodes that misbehave; pool/test_node.py has real ones."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from polarkv_sglang.errors import ConfigError, NodeError
from polarkv_sglang.transport.columns import pack_u64
from polarkv_sglang.transport.control import PATIENCE_S, ControlConnection, NodeRefused, NodeTimeout
from polarkv_sglang.transport.framing import (
    MAX_FRAME_BYTES,
    FrameReader,
    decode_from_client,
    encode_frame,
)
from polarkv_sglang.transport.messages import (
    PROTOCOL_VERSION,
    Challenge,
    Locate,
    Located,
    Peek,
    Peeked,
    Refused,
    Welcome,
)

KEYS = bytes(32)
CHALLENGE = bytes(encode_frame(Challenge(PROTOCOL_VERSION, bytes(16), False)))
WELCOME = bytes(encode_frame(Welcome(bytes(16), b"", b"", 0, 1 << 20, 1 << 20)))


@contextlib.contextmanager
def scripted_node(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does to its first connection what ``serve`` says; the address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                serve(connection)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(10)
        assert not thread.is_alive()


def handshake(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(CHALLENGE)
    connection.recv(4096)
    connection.sendall(WELCOME)


def connect(address: str, deadline_s: float = 5.0, token: str | None = None) -> ControlConnection:
    return ControlConnection.connect(address, token=token, role="rank", client="test", deadline_s=deadline_s)


def until_closed(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def flood(connection: ControlConnection) -> None:
    while True:
        connection.send(Locate(connection.next_id(), bytes(16 * 8192), 1.0), 0.3)


def test_absent_node_is_a_node_error_that_names_it():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(NodeError, match=f"memory node {address} cannot be reached: Connection refused"):
        connect(address)


def test_malformed_address_is_a_config_error():
    with pytest.raises(ConfigError, match="not host:port"):
        connect("nowhere")


def test_silent_node_is_a_timeout_within_the_deadline():
    with scripted_node(until_closed) as address:
        started = time.monotonic()
        with pytest.raises(NodeTimeout, match="did not answer"):
            connect(address, deadline_s=0.3)
        assert 0.2 < time.monotonic() - started < 2.0


def test_node_that_drips_bytes_cannot_stretch_the_deadline():
    def drip(connection: socket.socket) -> None:
        for byte in CHALLENGE * 10:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)

    with scripted_node(drip) as address:
        started = time.monotonic()
        with pytest.raises(NodeTimeout):
            connect(address, deadline_s=0.3)
        assert time.monotonic() - started < 2.0


def test_node_of_another_version_is_named_with_both_versions():
    def other(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(encode_frame(Challenge(PROTOCOL_VERSION + 1, bytes(16), False)))
        until_closed(connection)

    with (
        scripted_node(other) as address,
        pytest.raises(NodeError, match=f"protocol {PROTOCOL_VERSION + 1}, we speak {PROTOCOL_VERSION}"),
    ):
        connect(address)


def test_refusal_carries_the_reason_of_the_node():
    def refuse(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(encode_frame(Refused("it is full of eels")))
        until_closed(connection)

    with scripted_node(refuse) as address, pytest.raises(NodeRefused, match="full of eels"):
        connect(address)


def test_missing_token_is_refused_before_anything_is_proved():
    def ask(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(encode_frame(Challenge(PROTOCOL_VERSION, bytes(16), True)))
        assert connection.recv(4096) == b""

    with scripted_node(ask) as address, pytest.raises(NodeRefused, match="POLARKV_TOKEN"):
        connect(address)


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1", WELCOME]
)
def test_what_is_not_a_memory_node_is_a_node_error(answer: bytes):
    def serve(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(answer)
        until_closed(connection)

    with scripted_node(serve) as address, pytest.raises(NodeError, match="protocol"):
        connect(address)


def test_reply_that_comes_in_pieces_is_whole():
    def serve(connection: socket.socket) -> None:
        handshake(connection)
        connection.recv(4096)
        for byte in encode_frame(Peeked(1, b"\1\0")):
            connection.sendall(bytes([byte]))
        until_closed(connection)

    with scripted_node(serve) as address, connect(address) as connection:
        assert connection.request(Peek(connection.next_id(), KEYS), 5.0).present == b"\1\0"


def test_request_larger_than_any_socket_buffer_arrives_whole():
    keys = bytes(range(256)) * 512
    received = []

    def serve(connection: socket.socket) -> None:
        handshake(connection)
        reader = FrameReader(MAX_FRAME_BYTES)
        for _ in range(100):
            while (frame := reader.next_frame()) is None:
                reader.feed(connection.recv(1000))
            received.append(decode_from_client(frame))
        connection.sendall(encode_frame(Peeked(100, bytes(8192))))

    with scripted_node(serve) as address, connect(address) as connection:
        sent = [Peek(number, keys) for number in range(1, 101)]
        for message in sent:
            connection.send(message, 10.0)
        assert connection.receive(time.monotonic() + 10.0) == Peeked(100, bytes(8192))
    assert received == sent


def test_reply_that_is_not_quick_is_waited_for():
    def serve(connection: socket.socket) -> None:
        handshake(connection)
        connection.recv(4096)
        time.sleep(20 * PATIENCE_S)
        connection.sendall(encode_frame(Peeked(1, b"\1\0")))
        until_closed(connection)

    with scripted_node(serve) as address, connect(address) as connection:
        assert connection.request(Peek(connection.next_id(), KEYS), 5.0).present == b"\1\0"


@pytest.mark.parametrize(
    "reply", [Peeked(1, b"\1"), Peeked(7, b"\1\0"), Located(1, 0, *[pack_u64([0, 0])] * 4), Refused("no")]
)
def test_reply_to_another_question_ends_the_connection(reply: Peeked | Located | Refused):
    def serve(connection: socket.socket) -> None:
        handshake(connection)
        connection.recv(4096)
        connection.sendall(encode_frame(reply))
        until_closed(connection)

    with scripted_node(serve) as address, connect(address) as connection:
        with pytest.raises(NodeError, match="Peek was not answered properly"):
            connection.request(Peek(connection.next_id(), KEYS), 5.0)
        assert connection.fileno() == -1


def test_after_a_timeout_the_connection_never_gives_a_late_reply():
    def serve(connection: socket.socket) -> None:
        handshake(connection)
        connection.recv(4096)
        connection.sendall(encode_frame(Peeked(1, b"\1\0"))[:-1])
        until_closed(connection)

    with scripted_node(serve) as address, connect(address) as connection:
        with pytest.raises(NodeTimeout):
            connection.request(Peek(connection.next_id(), KEYS), 0.2)
        with pytest.raises(NodeError, match="did not answer"):
            connection.request(Locate(connection.next_id(), KEYS, 1.0), 5.0)


def test_node_that_reads_nothing_costs_one_send_deadline():
    done = threading.Event()

    def serve(connection: socket.socket) -> None:
        handshake(connection)
        done.wait(10)

    with scripted_node(serve) as address, connect(address) as connection:
        started = time.monotonic()
        with pytest.raises(NodeTimeout, match="does not read"):
            flood(connection)
        assert time.monotonic() - started < 5.0
        done.set()
