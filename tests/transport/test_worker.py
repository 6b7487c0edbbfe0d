from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import xxhash

from polarkv_sglang.errors import TransportError
from polarkv_sglang.transport import (
    DRAIN_S,
    Context,
    Direction,
    Route,
    Worker,
    load_library,
)
from polarkv_sglang.transport import worker as worker_module
from polarkv_sglang.transport.columns import checksums_from
from tests.transport.conftest import Client, Peer, checksum

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
SLACK_S = 1.0  # a busy two-core machine, not UCX

UNTIDY = """
from tests.transport.conftest import MIB, Client, Direction, Peer

peer, client = Peer(MIB, "tcp"), Client(MIB, "tcp")
key = client.connect(peer)
print(client.transfer(Direction.GET, client.blocks(1, 4096, peer), [key]).status, flush=True)
"""


SHAPES = [(1, 8), (3, 8200), (64, 256 * 1024), (4096, 4096)]


def routes_to(peers: list[Peer], client: Client, way: str) -> list[Route]:
    return [client.attach(peer) if way == "mapped" else client.connect(peer) for peer in peers]


def tls_of(way: str) -> str | None:
    return "tcp" if way == "tcp" else None


@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_get_brings_the_peers_bytes(untouched_peer, make_client, way, count, size):
    peer, client = untouched_peer(tls_of(way)), make_client(16 * MIB, tls_of(way))

    done = client.transfer(Direction.GET, client.blocks(count, size, peer), routes_to([peer], client, way))

    assert done.status.dtype == np.int8
    assert not done.status.any()
    words = client.buffer[: count * size].view(np.uint64)
    assert np.array_equal(words, np.arange(len(words)))
    assert not client.buffer[count * size :].any()
    blocks = client.buffer[: count * size].reshape(count, size)
    assert done.checksums.tolist() == [checksum(block.tobytes()) for block in blocks]


@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_checksums_follow_from_the_digests_of_all_chunks(untouched_peer, make_client, way, count, size):
    peer, client = untouched_peer(tls_of(way)), make_client(16 * MIB, tls_of(way))
    chunks = -(-size // 4096)
    digests = np.zeros((count, chunks), np.uint64)
    blocks, routes = client.blocks(count, size, peer), routes_to([peer], client, way)
    done = client.transfer(Direction.GET, blocks, routes, digests=digests)
    got = client.buffer[: count * size].reshape(count, size)
    assert digests.tolist() == [
        [xxhash.xxh3_64_intdigest(block[at : at + 4096]) for at in range(0, size, 4096)] for block in got
    ]
    assert checksums_from(digests).tolist() == done.checksums.tolist()
    for wrong in (np.zeros((count, chunks + 1), np.uint64), np.zeros((count, chunks), np.int64)):
        with pytest.raises(TransportError, match="digests must be a contiguous array"):
            client.transfer(Direction.GET, blocks, routes, digests=wrong)
    digests.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        client.transfer(Direction.GET, blocks, routes, digests=digests)


@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_put_is_at_the_peer_when_transfer_returns(written_peer, make_client, way, count, size):
    peer, client = written_peer(tls_of(way)), make_client(16 * MIB, tls_of(way))
    client.buffer[:] = np.random.default_rng(count).integers(0, 256, len(client.buffer), np.uint8)

    done = client.transfer(Direction.PUT, client.blocks(count, size, peer), routes_to([peer], client, way))

    assert not done.status.any()
    assert peer.digest(0, count * size) == xxhash.xxh3_64_hexdigest(client.buffer[: count * size])
    blocks = client.buffer[: count * size].reshape(count, size)
    assert done.checksums.tolist() == [checksum(block.tobytes()) for block in blocks]


@pytest.mark.parametrize("direction", Direction)
def test_one_batch_mixes_mapped_and_ucx_routes_and_memories(start_peer, make_client, tls, direction):
    peers = [start_peer(4 * MIB, tls) for _ in range(3)]
    client = make_client(8 * MIB, tls)
    second = np.zeros(MIB, np.uint8)
    memory = client.context.register(second.ctypes.data, len(second))
    routes = [client.connect(peers[0]), client.attach(peers[1]), client.connect(peers[2])]
    blocks = client.blocks(8, MIB // 2, *peers)
    blocks.local[6:, 0] = memory.address + np.arange(2) * (MIB // 2)
    if direction is Direction.PUT:
        random = np.random.default_rng(0)
        client.buffer[:], second[:] = (
            random.integers(0, 256, len(part), np.uint8) for part in (client.buffer, second)
        )

    done = client.worker.transfer(
        direction,
        routes,
        blocks.route,
        blocks.remote,
        blocks.local,
        blocks.piece_bytes,
        [client.memory, memory],
        deadline_s=20,
    )

    assert not done.status.any()
    moved = np.concatenate([client.buffer[: 3 * MIB], second]).reshape(8, MIB // 2)
    assert done.checksums.tolist() == [checksum(block.tobytes()) for block in moved]
    if direction is Direction.GET:
        assert np.array_equal(moved.view(np.uint64).ravel(), np.arange(4 * MIB // 8))
    else:
        for index, block in enumerate(moved):
            assert peers[index % 3].digest(index * MIB // 2, MIB // 2) == xxhash.xxh3_64_hexdigest(block)


def test_an_empty_batch_is_done(untouched_peer, make_client):
    peer, client = untouched_peer(None), make_client(MIB, None)
    done = client.transfer(Direction.GET, client.blocks(0, 8, peer), [client.connect(peer)])
    assert (len(done.status), len(done.checksums)) == (0, 0)


@pytest.mark.parametrize("direction", Direction)
def test_a_node_that_dies_mid_batch_harms_only_its_own_blocks(start_peer, make_client, tls, direction):
    live, dead = start_peer(16 * MIB, tls), start_peer(16 * MIB, tls)
    client = make_client(16 * MIB, tls)
    keys = [client.connect(live), client.connect(dead)]
    blocks = client.blocks(2048, MIB, live, dead)  # 2 GiB: far from done when the kill comes
    timer = threading.Timer(0.05, dead.kill)

    timer.start()
    started_s = time.monotonic()
    done = client.transfer(direction, blocks, keys, deadline_s=20)
    took_s = time.monotonic() - started_s
    timer.join()

    of_live, of_dead = done.status[blocks.route == 0], done.status[blocks.route == 1]
    assert not of_live.any()
    assert (of_dead < 0).any()
    if direction is Direction.PUT:
        assert (of_dead < 0).all()  # never flushed: none of them is known to be there
    assert took_s < 20
    assert keys[0].endpoint.failed is None
    assert keys[1].endpoint.failed
    assert not client.transfer(direction, client.blocks(16, MIB, live), keys[:1]).status.any()


def test_a_node_that_is_gone_fails_within_the_deadline(start_peer, make_client, tls):
    peer, client = start_peer(MIB, tls), make_client(MIB, tls)
    peer.close()
    started_s = time.monotonic()
    try:
        key = client.connect(peer)
    except TransportError:
        return
    done = client.transfer(Direction.GET, client.blocks(16, 65536, peer), [key], deadline_s=2)
    assert (done.status < 0).all()
    assert key.endpoint.failed
    assert time.monotonic() - started_s < 2 + DRAIN_S + SLACK_S


@pytest.mark.parametrize("direction", Direction)
def test_a_frozen_node_costs_one_deadline_and_its_blocks_only(start_peer, make_client, direction):
    live, frozen = start_peer(16 * MIB, "tcp"), start_peer(16 * MIB, "tcp")
    client = make_client(16 * MIB, "tcp")
    keys = [client.connect(live), client.connect(frozen)]
    assert not client.transfer(direction, client.blocks(2, 4096, live, frozen), keys).status.any()
    frozen.freeze()
    blocks = client.blocks(8192, 16 * 1024, live, frozen)

    started_s = time.monotonic()
    done = client.transfer(direction, blocks, keys, deadline_s=2)
    took_s = time.monotonic() - started_s

    of_live, of_frozen = done.status[blocks.route == 0], done.status[blocks.route == 1]
    assert not of_live.any()
    assert (of_frozen < 0).any()
    assert set(of_frozen) <= {0, -20}
    assert took_s < 2 + DRAIN_S + SLACK_S
    assert keys[0].endpoint.failed is None
    assert "(-20)" in keys[1].endpoint.failed
    # Refused at once from here on, with no further wait.
    started_s = time.monotonic()
    again = client.blocks(4, 4096, frozen)
    assert (client.transfer(direction, again, keys[1:], deadline_s=2).status == -20).all()
    assert time.monotonic() - started_s < SLACK_S


def test_local_memory_is_left_alone_once_a_timed_out_get_has_returned(start_peer, make_client):
    peer, client = start_peer(16 * MIB, "tcp"), make_client(16 * MIB, "tcp")
    key = client.connect(peer)
    assert not client.transfer(Direction.GET, client.blocks(1, 4096, peer), [key]).status.any()
    peer.freeze()
    assert client.transfer(Direction.GET, client.blocks(16, MIB, peer), [key], deadline_s=0.5).status.all()
    client.buffer[:] = 0xA5

    peer.thaw()
    key.endpoint.close()
    key = client.connect(peer)
    last = client.blocks(16, MIB, peer)[-1:]
    for _ in range(20):
        assert not client.transfer(Direction.GET, last, [key]).status.any()
        time.sleep(0.02)

    assert (client.buffer[: 15 * MIB] == 0xA5).all()
    assert np.array_equal(client.buffer[15 * MIB :].view(np.uint64), np.arange(15 * MIB // 8, 16 * MIB // 8))


def test_a_worker_reaches_a_thawed_node_through_a_new_endpoint(start_peer, make_client):
    peer, client = start_peer(MIB, "tcp"), make_client(MIB, "tcp")
    blocks = client.blocks(16, 65536, peer)
    key = client.connect(peer)
    for _ in range(3):
        peer.freeze()
        assert client.transfer(Direction.PUT, blocks, [key], deadline_s=0.3).status.any()
        peer.thaw()
        key.endpoint.close()
        key = client.connect(peer)
        assert not client.transfer(Direction.PUT, blocks, [key]).status.any()
    assert client.worker.statistics().endpoints == 1


def test_a_closed_endpoint_fails_its_operations(untouched_peer, make_client, tls):
    peer, client = untouched_peer(tls), make_client(MIB, tls)
    key = client.connect(peer)
    key.endpoint.close()
    assert (client.transfer(Direction.GET, client.blocks(4, 4096, peer), [key]).status < 0).all()
    assert key.endpoint.failed


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("local", lambda memory: memory.address - 1, "piece 0 of block 5"),
        ("local", lambda memory: memory.address + memory.length - 4095, "piece 0 of block 5"),
        ("local", lambda memory: 0, "piece 0 of block 5"),
        ("local", lambda memory: 2**64 - 1, "piece 0 of block 5"),
        ("route", lambda memory: 1, "block 5 takes route 1 of 1"),
    ],
)
@pytest.mark.parametrize("direction", Direction)
def test_a_batch_out_of_bounds_is_refused_whole(
    untouched_peer, make_client, way, direction, field, value, reason
):
    peer, client = untouched_peer(tls_of(way)), make_client(MIB, tls_of(way))
    routes = routes_to([peer], client, way)
    before = peer.digest(0, MIB)
    blocks = client.blocks(8, 4096, peer)
    getattr(blocks, field)[5] = value(client.memory)

    with pytest.raises(TransportError, match=reason):
        client.transfer(direction, blocks, routes)

    assert not client.buffer.any()
    assert peer.digest(0, MIB) == before


def test_what_belongs_to_others_or_is_closed_is_refused(untouched_peer, make_client):
    peer, client, other = untouched_peer(None), make_client(MIB, None), make_client(MIB, None)
    key, mapped = client.connect(peer), client.attach(peer)
    blocks = client.blocks(4, 8, peer)
    with pytest.raises(TransportError, match="of this worker"):
        other.transfer(Direction.GET, other.blocks(1, 8, peer), [key])
    other.memory, own = client.memory, other.memory
    with pytest.raises(TransportError, match="this worker's context"):
        other.transfer(Direction.GET, blocks, [])
    own.close()
    other.memory = own
    with pytest.raises(TransportError, match="must be open"):
        other.transfer(Direction.GET, blocks, [])
    mapped.close()
    with pytest.raises(TransportError, match="mapping is closed"):
        client.transfer(Direction.GET, blocks, [mapped])


def test_arrays_of_another_layout_are_refused(untouched_peer, make_client):
    peer, client = untouched_peer(None), make_client(MIB, None)
    key, blocks = client.connect(peer), client.blocks(4, 8, peer)
    for wrong in (
        replace(blocks, route=blocks.route.astype(np.int64)),
        replace(blocks, route=blocks.route[:3]),
        replace(blocks, remote=client.blocks(8, 8, peer).remote[::2]),
        replace(blocks, local=blocks.local[:, 0]),
        replace(blocks, local=np.asfortranarray(np.repeat(blocks.local, 2, axis=1))),
        replace(blocks, piece_bytes=0),
    ):
        with pytest.raises(TransportError, match=r"contiguous array|no blocks"):
            client.transfer(Direction.GET, wrong, [key])
    assert not client.buffer.any()


def test_a_batch_hardly_waits_for_a_busy_python_thread(untouched_peer, make_client, tls):
    peer, client = untouched_peer(tls), make_client(64 * MIB, tls)
    key = client.connect(peer)
    blocks = client.blocks(64, MIB, peer)
    client.transfer(Direction.GET, blocks, [key])
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    spinner = threading.Thread(target=spin)
    spinner.start()
    try:
        started_s = time.monotonic()
        done = client.transfer(Direction.GET, blocks, [key])
        took_s = time.monotonic() - started_s
    finally:
        stop.set()
        spinner.join()
    assert not done.status.any()
    assert took_s < 1.0  # per operation in Python: more than 5 s


def test_a_stuck_write_does_not_delay_reads(start_peer, untouched_peer, make_client):
    frozen, live, client = start_peer(MIB, "tcp"), untouched_peer("tcp"), make_client(16 * MIB, "tcp")
    key = client.connect(frozen)
    frozen.freeze()
    reader = Worker(client.context)
    read_key = reader.connect(live.address).unpack(live.rkey)
    reads = client.blocks(64, 65536, live)
    writes = client.blocks(16, 65536, frozen)
    stuck = threading.Thread(target=client.transfer, args=(Direction.PUT, writes, [key], 3.0))
    stuck.start()

    rounds = 0
    while stuck.is_alive():
        done = reader.transfer(
            Direction.GET,
            [read_key],
            reads.route,
            reads.remote,
            reads.local,
            reads.piece_bytes,
            [client.memory],
            deadline_s=2,
        )
        assert not done.status.any()
        rounds += 1
    stuck.join()

    assert rounds > 10
    assert client.worker.statistics().failed_blocks == 16


def test_an_idle_node_sleeps_and_stops_at_once(start_peer, make_client, tls):
    peer, client = start_peer(MIB, tls), make_client(MIB, tls)
    client.transfer(Direction.GET, client.blocks(16, 65536, peer), [client.connect(peer)])
    process = psutil.Process(peer.process.pid)
    before = process.cpu_times()
    time.sleep(1.0)
    after = process.cpu_times()
    assert (after.user + after.system) - (before.user + before.system) < 0.2
    assert peer.stop()["stop_s"] < 1.0


def test_a_process_may_end_without_closing_anything():
    """Its peer ends with it: UCX's own thread hears of that while the interpreter unloads what it can."""
    command = [sys.executable, "-c", UNTIDY]
    here = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=here, stdout=subprocess.PIPE, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (0, "[0]\n")


def test_statistics_count_what_was_done(start_peer, make_client):
    peer, client = start_peer(MIB, "tcp"), make_client(MIB, "tcp")
    key = client.connect(peer)
    client.transfer(Direction.GET, client.blocks(4, 4096, peer), [key])
    client.transfer(Direction.PUT, client.blocks(2, 4096, peer), [key])
    peer.freeze()
    client.transfer(Direction.PUT, client.blocks(3, 4096, peer), [key], deadline_s=0.2)
    statistics = client.worker.statistics()
    assert statistics[:3] == (3, 9, 3)
    assert statistics.got_bytes == 4 * 4096
    assert statistics.put_bytes == 2 * 4096
    assert not statistics.poisoned


def test_a_closed_worker_refuses_work():
    context = Context(load_library())
    worker = Worker(context)
    worker.close()
    worker.close()
    with pytest.raises(TransportError, match="closed"):
        worker.connect(b"x")
    context.close()


def test_wait_ends_when_a_descriptor_is_readable(make_client):
    worker = make_client(MIB, None).worker
    quiet, (readable, written) = os.eventfd(0), os.pipe()
    timer = threading.Timer(0.1, os.write, (written, b"x"))
    timer.start()
    started_s = time.monotonic()
    assert worker.wait([quiet, readable], deadline_s=20) == 1
    assert 0.05 < time.monotonic() - started_s < 0.1 + SLACK_S
    timer.join()
    for fd in (quiet, readable, written):
        os.close(fd)


def test_wait_ends_at_its_deadline(make_client):
    worker = make_client(MIB, None).worker
    quiet = os.eventfd(0)
    started_s = time.monotonic()
    assert worker.wait([quiet], deadline_s=0.2) is None
    assert 0.2 <= time.monotonic() - started_s < 0.2 + SLACK_S
    os.close(quiet)
    with pytest.raises(TransportError, match="Bad file descriptor"):
        worker.wait([quiet], deadline_s=20)


def test_a_peers_put_over_tcp_lands_while_we_wait_for_its_answer(start_peer, make_client):
    peer, client = start_peer(4 * MIB, "tcp"), make_client(4 * MIB, "tcp")
    peer.push(client)
    assert client.worker.wait([peer.process.stdout.fileno()], deadline_s=20) == 0
    assert peer.pushed() == 0
    assert np.array_equal(client.buffer.view(np.uint64), np.arange(4 * MIB // 8))


def test_an_endpoint_says_how_it_reads(untouched_peer, make_client):
    endpoints = {tls: make_client(MIB, tls).connect(untouched_peer(tls)).endpoint for tls in ("all", "tcp")}
    assert endpoints["tcp"].transports == ("tcp",)
    assert endpoints["tcp"].emulates_get
    assert "cma" in endpoints["all"].transports
    assert not endpoints["all"].emulates_get
    endpoints["tcp"].close()
    with pytest.raises(TransportError, match="connect again"):
        _ = endpoints["tcp"].transports


def test_endpoints_that_were_closed_leave_nothing_with_their_worker(untouched_peer, make_client):
    client = make_client(MIB, "tcp")
    states = []
    for _ in range(3):
        endpoint = client.connect(untouched_peer("tcp")).endpoint
        states.append(weakref.ref(endpoint.state))
        endpoint.close(force=True)
        del endpoint
    gc.collect()
    assert [state() for state in states] == [None] * 3


def test_a_worker_that_does_not_get_its_memory_back_is_used_no_more(start_peer, make_client, monkeypatch):
    monkeypatch.setattr(worker_module, "DRAIN_S", 0)
    peer, client = start_peer(MIB, "tcp"), make_client(MIB, "tcp")
    key, blocks = client.connect(peer), client.blocks(16, 65536, peer)
    assert not client.transfer(Direction.GET, blocks, [key]).status.any()
    peer.freeze()

    for _ in range(2):
        with pytest.raises(TransportError, match="replace the worker"):
            client.transfer(Direction.GET, blocks, [key], deadline_s=0.1)
    assert client.worker.statistics().poisoned

    peer.thaw()
    client.worker.close()
    client.worker = Worker(client.context)
    assert not client.transfer(Direction.GET, blocks, [client.connect(peer)]).status.any()
