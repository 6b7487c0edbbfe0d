"""Mutual TLS between real clients and real memory nodes."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from polarkv_sglang.config import parse_address
from polarkv_sglang.errors import ConfigError, NodeError
from polarkv_sglang.pool.embedded import start_or_join
from polarkv_sglang.transport.control import ControlConnection, NodeRefused
from polarkv_sglang.transport.framing import encode_frame
from polarkv_sglang.transport.messages import (
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Hello,
    NodeStatistics,
    Peek,
    Peeked,
    Statistics,
)
from polarkv_sglang.transport.tls import TlsFiles, client_context, server_context
from tests.certificates import Authority
from tests.support import RunningNode, running_node

ENOUGH_S = 2.0  # to be told why; far below the deadline of 10 s


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "stranger")


@pytest.fixture(scope="module")
def client(authority: Authority) -> ssl.SSLContext:
    return client_context(*authority.issue("client"))


def flags(files: TlsFiles) -> list[str]:
    return ["--tls-cert", files.cert, "--tls-key", files.key, "--tls-ca", files.ca]


@contextlib.contextmanager
def tls_node(files: TlsFiles, token: str | None = None, listen: str = "127.0.0.1:0") -> Iterator[RunningNode]:
    with running_node("64MiB", "--no-prefault", *flags(files), token=token, listen=listen) as node:
        yield node


@pytest.fixture(scope="module")
def node(authority: Authority) -> Iterator[RunningNode]:
    with tls_node(authority.issue("node")) as node:
        yield node


def connect(
    node: RunningNode, tls: ssl.SSLContext | None, host: str | None = None, token: str | None = None
) -> ControlConnection:
    address = node.address if host is None else f"{host}:{parse_address(node.address)[1]}"
    return ControlConnection.connect(
        address, token=token or node.token, role="rank", client="test", deadline_s=10.0, tls=tls
    )


def assert_serves(node: RunningNode, client: ssl.SSLContext | None) -> NodeStatistics:
    with connect(node, client) as connection:
        return connection.request(Statistics(connection.next_id()), 5.0)


@contextlib.contextmanager
def refused_at_once(error: type[NodeError], reason: str) -> Iterator[None]:
    started = time.monotonic()
    with pytest.raises(error, match=reason) as caught:
        yield
    assert type(caught.value) is error
    assert time.monotonic() - started < ENOUGH_S


def test_requests_of_every_size_are_answered_over_tls(node: RunningNode, client: ssl.SSLContext):
    with connect(node, client) as connection:
        assert connection.welcome.rkey
        for keys in (1, 128, 8192):
            present = connection.request(Peek(connection.next_id(), bytes(16 * keys)), 5.0).present
            assert present == bytes(keys)


def test_requests_can_be_pipelined_over_tls(node: RunningNode, client: ssl.SSLContext):
    with connect(node, client) as connection:
        for number in range(200):
            connection.send(Peek(number, bytes(16 * 100)))
        deadline = time.monotonic() + 5.0
        for number in range(200):
            assert connection.receive(deadline) == Peeked(number, bytes(100))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_host_that_the_certificate_names_can_be_dialled(node, client: ssl.SSLContext, host: str):
    connect(node, client, host).close()


def test_ipv6_address_is_checked_too(authority: Authority, client: ssl.SSLContext):
    with tls_node(authority.issue("six", "IP:::1"), listen="[::1]:0") as node:
        connect(node, client).close()


def test_node_of_another_name_is_not_trusted(authority: Authority, client: ssl.SSLContext):
    files = authority.issue("elsewhere", "IP:10.1.2.3,DNS:elsewhere")
    reason = r"do not trust: IP address mismatch.*not valid for '127\.0\.0\.1'"
    with tls_node(files) as node, refused_at_once(NodeError, reason):
        connect(node, client)


def test_node_signed_by_another_authority_is_not_trusted(stranger: Authority, client: ssl.SSLContext):
    reason = "do not trust: (self-signed certificate in certificate chain|unable to get local issuer)"
    with tls_node(stranger.issue("node")) as node, refused_at_once(NodeError, reason):
        connect(node, client)


def test_node_with_an_expired_certificate_is_not_trusted(authority: Authority, client: ssl.SSLContext):
    reason = "do not trust: certificate has expired"
    with tls_node(authority.issue("old", days=-1)) as node, refused_at_once(NodeError, reason):
        connect(node, client)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
class TestRefusedByTheNode:
    """Each is told why, and the node goes on serving others."""

    def test_client_without_certificate(self, node, client, authority: Authority, version):
        tls = ssl.create_default_context(cafile=authority.ca)
        tls.maximum_version = version
        with refused_at_once(NodeRefused, "asks for a client certificate"):
            connect(node, tls)
        assert_serves(node, client)

    def test_client_signed_by_another_authority(self, node, client, authority, stranger, version):
        tls = client_context(*stranger.issue("client")[:2], authority.ca)
        tls.maximum_version = version
        with refused_at_once(NodeRefused, "our certificate is not signed by its --tls-ca"):
            connect(node, tls)
        assert_serves(node, client)

    def test_client_with_an_expired_certificate(self, node, client, authority: Authority, version):
        tls = client_context(*authority.issue("late", days=-1))
        tls.maximum_version = version
        with refused_at_once(NodeRefused, "our certificate has expired"):
            connect(node, tls)
        assert_serves(node, client)


def test_client_in_the_clear_is_told_that_the_node_speaks_tls(node: RunningNode, client: ssl.SSLContext):
    before = assert_serves(node, client).refused_total.get("tls", 0)
    with refused_at_once(NodeRefused, "it speaks TLS only; set POLARKV_TLS_CERT"):
        connect(node, None)
    assert assert_serves(node, client).refused_total["tls"] == before + 1


def test_tls_client_is_told_that_the_node_speaks_none(client: ssl.SSLContext):
    with running_node("64MiB", "--no-prefault") as plain:
        with refused_at_once(NodeError, "does not speak TLS; give it --tls-cert"):
            connect(plain, client)
        assert assert_serves(plain, None).refused_total == {"tls": 1}


def test_token_is_asked_for_over_tls_too(authority: Authority, client: ssl.SSLContext):
    with tls_node(authority.issue("node2"), token="right") as node:
        with refused_at_once(NodeRefused, "another token"):
            connect(node, client, token="wrong")
        assert_serves(node, client)


def test_nothing_is_read_of_a_client_that_was_refused(node: RunningNode, client: ssl.SSLContext):
    hello = encode_frame(Hello(PROTOCOL_VERSION, "rank", "test", bytes(NONCE_BYTES)))
    with socket.create_connection(parse_address(node.address), timeout=5.0) as sock:
        sock.sendall(hello)
        sock.sendall(bytes(hello) * 100)
        received = b""
        while data := sock.recv(65536):
            received += data
    assert received.count(b"speaks TLS only") == 1
    assert_serves(node, client)


def test_garbage_in_and_after_the_handshake_costs_its_own_connection(node, client: ssl.SSLContext):
    for garbage in (b"\x16\x03\x01\x00\x05hello", b"\x16\x03\x01" + bytes(1000), b"\x80" * 1000):
        with socket.create_connection(parse_address(node.address), timeout=5.0) as sock:
            sock.sendall(garbage)
            while sock.recv(65536):
                pass
    with socket.create_connection(parse_address(node.address), timeout=5.0) as sock:
        inner = client.wrap_socket(sock, server_hostname="localhost")
        with socket.socket(fileno=inner.detach()) as broken:
            broken.settimeout(5.0)
            broken.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
            with contextlib.suppress(ConnectionResetError):
                while broken.recv(65536):
                    pass
    assert_serves(node, client)


def test_embedded_node_is_in_the_clear_whatever_the_variables_say(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, path in authority.issue("pool")._asdict().items():
        monkeypatch.setenv(f"POLARKV_TLS_{name.upper()}", path)
    embedded = start_or_join(capacity_bytes=64 << 20, token=None, runtime_dir=tmp_path / "run")
    assert embedded.lifeline.welcome.capacity_bytes == 64 << 20
    embedded.close()


def test_files_are_all_given_or_none():
    assert TlsFiles.of(None, None, None) is TlsFiles.of("", None, "") is None
    assert TlsFiles.of("a", "b", "c") == ("a", "b", "c")
    with pytest.raises(ConfigError, match="there is no tls-key and no tls-ca; give all three"):
        TlsFiles.of("a", None, "")


@pytest.mark.parametrize("make", [server_context, client_context])
class TestWrongFile:
    """Each is named."""

    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_that_is_not_there(self, authority: Authority, tmp_path: Path, make, position: int):
        files = [*authority.issue("some")]
        files[position] = str(tmp_path / "nowhere.pem")
        with pytest.raises(ConfigError, match=r"nowhere\.pem cannot be read: No such file"):
            make(*files)

    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_that_is_not_pem(self, authority: Authority, tmp_path: Path, make, position: int):
        files = [*authority.issue("some")]
        (tmp_path / "rubbish.pem").write_text("rubbish")
        files[position] = str(tmp_path / "rubbish.pem")
        with pytest.raises(ConfigError, match=r"rubbish\.pem"):
            make(*files)

    def test_key_of_another_certificate(self, authority: Authority, make):
        files = authority.issue("some")._replace(key=authority.issue("other").key)
        with pytest.raises(ConfigError, match=r"other\.key do not belong together"):
            make(*files)

    def test_key_that_is_encrypted(self, authority: Authority, tmp_path: Path, make):
        files = authority.issue("some")
        key = str(tmp_path / "locked.key")
        subprocess.run(
            ["openssl", "ec", "-in", files.key, "-out", key, "-aes256", "-passout", "pass:word"], check=True
        )
        with pytest.raises(ConfigError, match=r"locked\.key is encrypted"):
            make(*files._replace(key=key))
