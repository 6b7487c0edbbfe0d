"""A real memory node in a process of its own, and clients that behave and that do not."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable

import numpy as np
import psutil
import pytest

from polarkv_sglang.config import parse_address
from polarkv_sglang.errors import NodeError
from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.transport import Context, Direction, Worker, attach, load_library
from polarkv_sglang.transport.columns import pack_u64, unpack_u64
from polarkv_sglang.transport.control import ControlConnection, NodeRefused, NodeTimeout
from polarkv_sglang.transport.framing import MAX_FRAME_BYTES, MAX_HANDSHAKE_FRAME_BYTES, encode_frame
from polarkv_sglang.transport.messages import (
    MAX_VIEW_NODES,
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Commit,
    Hello,
    KeyState,
    Locate,
    Peek,
    Proof,
    Release,
    Renew,
    Replicate,
    ReportCorrupt,
    Reserve,
    Reserved,
    View,
)
from tests.support import RunningNode, running_node

KEY = bytes(range(16))


def reserve(connection: ControlConnection, key: bytes = KEY, length: int = 4096) -> Reserved:
    return connection.request(Reserve(connection.next_id(), key, NO_PARENT, length), 5.0)


def commit(connection: ControlConnection, reservation: int, mask: bytes = b"\1") -> int:
    return connection.request(
        Commit(connection.next_id(), reservation, mask, bytes(8 * len(mask))), 5.0
    ).count


def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)


def raw(node: RunningNode) -> socket.socket:
    sock = socket.create_connection(parse_address(node.address), timeout=5.0)
    sock.settimeout(5.0)
    return sock


def is_closed(sock: socket.socket) -> bool:
    """Whether the node ends the connection (after what it may still have to say)."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def flood(connection: ControlConnection) -> None:
    for _ in range(2000):
        connection.send(Locate(1, bytes(16 * 4096), 1.0), 1.0)


def test_block_put_by_one_client_is_got_and_seen_in_shared_memory_by_another():
    rng = np.random.default_rng(0)
    context = Context(load_library())
    try:
        with running_node() as node, node.connect() as writer, node.connect() as reader:
            local = rng.integers(0, 256, 2 * 8192, dtype=np.uint8)
            memory = context.register(local.ctypes.data, local.nbytes)
            lane = Worker(context)
            endpoint = lane.connect(writer.welcome.worker_address)
            key = endpoint.unpack(writer.welcome.rkey)

            def move(direction: Direction, offset: int, remote: int) -> None:
                status, _ = lane.transfer(
                    direction,
                    [key],
                    np.zeros(1, np.uint32),
                    np.array([remote], np.uint64),
                    np.array([[local.ctypes.data + offset]], np.uint64),
                    8192,
                    [memory],
                    5.0,
                )
                assert status.tolist() == [0]

            reserved = reserve(writer, length=8192)
            move(Direction.PUT, 0, int(unpack_u64(reserved.address_blob)[0]))
            commit(writer, reserved.reservation)
            located = reader.request(Locate(reader.next_id(), KEY, 5.0), 5.0)
            assert unpack_u64(located.length_blob).tolist() == [8192]
            move(Direction.GET, 8192, int(unpack_u64(located.address_blob)[0]))
            assert (local[:8192] == local[8192:]).all()
            assert reader.welcome.shared is not None
            mapped = attach(reader.welcome.shared, reader.welcome.base_address)
            assert mapped is not None
            offset = int(unpack_u64(located.address_blob)[0]) - mapped.remote
            assert ctypes.string_at(mapped.address + offset, 8192) == local[:8192].tobytes()
            mapped.close()
    finally:
        context.close()


def test_wrong_token_is_refused_and_counted():
    with running_node(token="right") as node:
        for token, reason in (("wrong", "another token"), (None, "asks for a token")):
            with pytest.raises(NodeRefused, match=reason):
                ControlConnection.connect(
                    node.address, token=token, role="rank", client="test", deadline_s=5.0
                )
        assert node.statistics().refused_total == {"token": 1}


def test_no_rkey_without_the_token():
    with running_node(token="right") as node, raw(node) as sock:
        sock.sendall(encode_frame(Hello(PROTOCOL_VERSION, "rank", "thief", bytes(NONCE_BYTES))))
        sock.sendall(encode_frame(Proof(bytes(32))))
        received = b""
        while data := sock.recv(65536):
            received += data
        with node.connect() as connection:
            assert connection.welcome.rkey not in received
            assert connection.welcome.worker_address not in received


def test_only_ranks_are_given_the_rkey_and_may_write():
    with running_node() as node:
        with node.connect("rank") as rank:
            assert rank.welcome.rkey
        for role in ("observer", "lifeline"):
            with node.connect(role) as connection:
                assert connection.welcome.rkey == connection.welcome.worker_address == b""
                assert connection.request(Peek(connection.next_id(), KEY), 5.0).present == b"\0"
                with pytest.raises(NodeError):
                    reserve(connection)


@pytest.mark.parametrize(("ucx_tls", "offered"), [("tcp,cma", False), ("tcp,shm", True)])
def test_slab_can_be_mapped_by_ranks_if_the_transports_have_shared_memory(ucx_tls: str, offered: bool):
    with running_node("64MiB", "--ucx-tls", ucx_tls) as node:
        with node.connect("rank") as rank:
            assert (rank.welcome.shared is not None) == offered
        with node.connect("observer") as observer:
            assert observer.welcome.shared is None
    with running_node(environment={"UCX_TLS": ucx_tls}) as node, node.connect("rank") as rank:
        assert (rank.welcome.shared is not None) == offered


def test_other_version_is_refused_with_both_versions_named():
    with running_node() as node:
        with raw(node) as sock:
            sock.sendall(encode_frame(Hello(PROTOCOL_VERSION + 1, "rank", "test", bytes(NONCE_BYTES))))
            answer = sock.recv(65536)
            assert f"protocol {PROTOCOL_VERSION}, we speak {PROTOCOL_VERSION + 1}".encode() in answer
            assert is_closed(sock)
        assert node.statistics().refused_total == {"version": 1}


@pytest.mark.parametrize("authenticated", [False, True])
def test_oversized_frame_is_refused_from_its_header(authenticated: bool):
    with running_node() as node:
        with raw(node) as sock:
            limit = MAX_HANDSHAKE_FRAME_BYTES
            if authenticated:
                limit = MAX_FRAME_BYTES
                sock.sendall(encode_frame(Hello(PROTOCOL_VERSION, "rank", "test", bytes(NONCE_BYTES))))
                sock.sendall(encode_frame(Proof(b"")))
            sock.sendall((limit + 1).to_bytes(4, "little"))
            assert is_closed(sock)
        assert node.statistics().bad_frames_total == 1


def test_client_that_never_reads_is_made_to_wait_and_others_are_not():
    with running_node() as node, node.connect() as greedy, node.connect() as other:
        with pytest.raises(NodeTimeout, match="does not read"):
            flood(greedy)
        assert other.request(Peek(other.next_id(), KEY), 5.0).present == b"\0"


def test_two_writers_of_a_key_make_one_block():
    with running_node() as node, node.connect() as one, node.connect() as two:
        first, second = reserve(one), reserve(two)
        assert (first.states[0], second.states[0]) == (KeyState.RESERVED, KeyState.BUSY)
        assert second.reservation == 0
        assert commit(two, first.reservation) == 0  # not its reservation
        assert commit(one, first.reservation) == 1
        assert reserve(two).states[0] == KeyState.PRESENT
        assert node.statistics().blocks == 1


def test_leases_of_a_lost_client_outlive_it():
    with running_node() as node:
        with node.connect() as client:
            commit(client, reserve(client).reservation)
            client.request(Locate(client.next_id(), KEY, 1.0), 5.0)
            reserve(client, bytes(16)[:-1] + b"\7")
        eventually(lambda: node.statistics().connections == 1)
        now = node.statistics()
        assert (now.leases, now.reservations) == (1, 1)
        eventually(lambda: node.statistics().leases == 0)
        assert node.statistics().expired_leases_total == 1


def renew(connection: ControlConnection, lease: int, lease_s: float) -> bool:
    return connection.request(Renew(connection.next_id(), lease, lease_s), 5.0).held


def test_renewed_lease_outlives_its_first_time_and_an_expired_one_cannot_be_renewed():
    with running_node() as node, node.connect() as one, node.connect() as two:
        commit(one, reserve(one).reservation)
        kept = one.request(Locate(one.next_id(), KEY, 0.5), 5.0).lease
        assert renew(one, kept, 60.0)
        lost = two.request(Locate(two.next_id(), KEY, 0.5), 5.0).lease
        assert not renew(two, kept, 60.0)  # not its lease
        eventually(lambda: node.statistics().leases == 1)
        assert not renew(two, lost, 60.0)
        assert renew(one, kept, 1.0)
        eventually(lambda: node.statistics().leases == 0)
        assert node.statistics().expired_leases_total == 2


def test_views_of_ranks_are_told_for_as_long_as_they_are_connected():
    with running_node() as node:
        with node.connect() as one, node.connect() as two, node.connect() as silent:
            one.send(View({"10.0.0.4:7411": "Connection refused"}))
            two.send(View({"10.0.0.4:7411": "Connection refused"}))
            two.send(View({}))  # the last one counts
            for client in (one, two, silent):
                client.request(Peek(client.next_id(), KEY), 5.0)
            views = node.statistics().views
            assert sorted(views.values(), key=len) == [{}, {"10.0.0.4:7411": "Connection refused"}]
            assert all(name.startswith("test at 127.0.0.1:") for name in views)
        eventually(lambda: node.statistics().views == {})


def test_views_are_left_out_before_statistics_get_too_long_for_a_frame():
    longest = View({f"10.0.0.4:{number}": "x" * 512 for number in range(MAX_VIEW_NODES)})
    with running_node() as node, contextlib.ExitStack() as stack:
        for _ in range(10):
            client = stack.enter_context(node.connect())
            client.send(longest)
            client.request(Peek(client.next_id(), KEY), 5.0)
        now = node.statistics()
        assert 0 < len(now.views) < 10
        assert now.views_left_out == 10 - len(now.views)


@pytest.mark.parametrize("message", [Replicate(KEY, "10.0.0.5:7411"), View({}), Release(1)])
def test_only_ranks_may_send_what_has_no_answer(message: Replicate | View | Release):
    with running_node() as node:
        with node.connect("rank") as rank:
            rank.send(message)
            assert rank.request(Peek(rank.next_id(), KEY), 5.0).present == b"\0"
        with node.connect("observer") as observer:
            observer.send(message)
            with pytest.raises(NodeError):
                observer.receive(time.monotonic() + 5.0)


def test_pipelined_requests_are_answered_in_order():
    with running_node() as node, node.connect() as client:
        ids = [client.next_id() for _ in range(200)]
        for request_id in ids:
            client.send(Peek(request_id, KEY))
        deadline = time.monotonic() + 5.0
        assert [client.receive(deadline).request_id for _ in ids] == ids  # type: ignore[union-attr]


def test_pool_is_never_larger_than_its_capacity():
    with running_node("4MiB") as node, node.connect() as client:
        for _ in range(6):
            keys = os.urandom(16 * 100)
            reserved = client.request(Reserve(client.next_id(), keys, bytes(1600), 65536), 5.0)
            addresses = unpack_u64(reserved.address_blob)
            addresses = addresses[addresses != 0]
            base = client.welcome.base_address
            assert len(addresses) <= 64
            assert addresses.min() >= base
            assert addresses.max() + 65536 <= base + client.welcome.capacity_bytes
            mask = b"\1" * len(addresses)
            client.request(Commit(client.next_id(), reserved.reservation, mask, bytes(8 * len(mask))), 5.0)
        now = node.statistics()
        assert now.used_bytes <= now.capacity_bytes == 4 << 20
        assert now.blocks == 64
        assert now.evictions_total > 0
        assert now.refused_total["no_room"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_node_cleanly_with_clients_connected(number: signal.Signals):
    with running_node("64MiB", "--metrics-port", "0", "--prefault") as node, node.connect() as client:
        reserve(client)
        node.process.send_signal(number)
        assert node.process.wait(10.0) == 0
        with pytest.raises(NodeError):
            reserve(client)


def test_every_start_is_another_incarnation():
    ids = []
    for _ in range(2):
        with running_node() as node, node.connect("observer") as client:
            ids.append(client.welcome.node_id)
            assert node.ready_line.startswith(f"polarkv node {client.welcome.node_id.hex()[:12]} ")
    assert ids[0] != ids[1]


def scrape(node: RunningNode) -> dict[str, float]:
    """Samples by name, labels included."""
    assert node.metrics_url is not None
    with urllib.request.urlopen(node.metrics_url, timeout=5.0) as response:
        lines = response.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def test_metrics_show_what_happened():
    with running_node("64MiB", "--metrics-port", "0", token="secret") as node, node.connect() as client:
        commit(client, reserve(client).reservation)
        client.request(Locate(client.next_id(), KEY + bytes(16), 5.0), 5.0)
        with raw(node) as sock:
            sock.sendall(b"\xff" * 8)
            assert is_closed(sock)
        assert scrape(node) == {
            "polarkv_node_capacity_bytes": 64 << 20,
            "polarkv_node_used_bytes": 4096,
            "polarkv_node_granted_bytes": 0,
            "polarkv_node_blocks": 1,
            "polarkv_node_reservations": 0,
            "polarkv_node_leases": 1,
            "polarkv_node_leased_bytes": 4096,
            "polarkv_node_quarantined_blocks": 0,
            "polarkv_node_notes_bytes": 0,
            "polarkv_node_connections": 1,
            "polarkv_node_hits_total": 1,
            "polarkv_node_misses_total": 1,
            "polarkv_node_commits_total": 1,
            "polarkv_node_late_commits_total": 0,
            "polarkv_node_evictions_total": 0,
            "polarkv_node_corrupt_total": 0,
            "polarkv_node_sent_blocks_total": 0,
            "polarkv_node_sent_bytes_total": 0,
            "polarkv_node_failed_sends_total": 0,
            "polarkv_node_expired_leases_total": 0,
            "polarkv_node_expired_reservations_total": 0,
            "polarkv_node_bad_frames_total": 1,
        }


def test_refusals_are_labelled_by_reason_in_the_metrics():
    with running_node("4MiB", "--segment", "2MiB", "--metrics-port", "0") as node, node.connect() as client:
        assert reserve(client, length=3 << 20).states[0] == KeyState.NO_ROOM
        assert scrape(node)['polarkv_node_refused_total{reason="too_long"}'] == 1


def test_corrupt_report_makes_the_block_a_miss():
    with running_node() as node, node.connect() as client:
        commit(client, reserve(client).reservation)
        located = client.request(Locate(client.next_id(), KEY, 5.0), 5.0)
        client.send(ReportCorrupt(KEY, pack_u64([int(unpack_u64(located.generation_blob)[0]) + 1])))
        assert client.request(Peek(client.next_id(), KEY), 5.0).present == b"\1"
        client.send(ReportCorrupt(KEY, located.generation_blob))
        assert client.request(Peek(client.next_id(), KEY), 5.0).present == b"\0"
        assert node.statistics().quarantined_blocks == 1
        client.send(Release(located.lease))
        eventually(lambda: node.statistics().quarantined_blocks == 0)


def test_node_on_loopback_is_not_reached_over_the_network():
    """UCX over tcp does what any peer asks, to any memory of the process, and asks for no token."""
    with running_node("64MiB", "--ucx-tls", "tcp") as node:
        listening = [
            connection.laddr.ip
            for connection in psutil.Process(node.pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
    assert len(listening) > 1  # the control server, and UCX
    assert set(listening) == {"127.0.0.1"}
