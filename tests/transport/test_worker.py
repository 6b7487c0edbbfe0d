from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import xxhash

from polarkv_sglang.errors import TransportError
from polarkv_sglang.transport import DRAIN_S, Context, Direction, Worker, load_library

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
SLACK_S = 1.0  # a busy two-core machine, not UCX

UNTIDY = """
from conftest import MIB, Client, Direction, Peer

peer, client = Peer(MIB, "tcp"), Client(MIB, "tcp")
lane = client.connect(peer)
print(client.transfer(Direction.GET, client.operations(1, 4096, peer), [lane]), flush=True)
"""


@pytest.mark.parametrize(("count", "size"), [(1, 8), (64, 256 * 1024), (4096, 4096)])
def test_get_brings_the_peers_bytes(untouched_peer, make_client, tls, count, size):
    peer, client = untouched_peer(tls), make_client(16 * MIB, tls)
    lane = client.connect(peer)

    statuses = client.transfer(Direction.GET, client.operations(count, size, peer), [lane])

    assert statuses.dtype == np.int8
    assert not statuses.any()
    words = client.buffer[: count * size].view(np.uint64)
    assert np.array_equal(words, np.arange(len(words)))
    assert not client.buffer[count * size :].any()


@pytest.mark.parametrize(("count", "size"), [(1, 8), (64, 256 * 1024), (4096, 4096)])
def test_put_is_at_the_peer_when_transfer_returns(start_peer, make_client, tls, count, size):
    peer, client = start_peer(16 * MIB, tls), make_client(16 * MIB, tls)
    lane = client.connect(peer)
    client.buffer[:] = np.random.default_rng(0).integers(0, 256, len(client.buffer), np.uint8)

    statuses = client.transfer(Direction.PUT, client.operations(count, size, peer), [lane])

    assert not statuses.any()
    assert peer.digest(0, count * size) == xxhash.xxh3_64_hexdigest(client.buffer[: count * size])


def test_one_batch_reads_from_several_peers_and_memories(start_peer, make_client, tls):
    peers = [start_peer(4 * MIB, tls), start_peer(4 * MIB, tls)]
    client = make_client(8 * MIB, tls)
    second = np.zeros(MIB, np.uint8)
    memory = client.context.register(second.ctypes.data, len(second))
    endpoints, keys = zip(*(client.connect(peer) for peer in peers), strict=True)
    operations = client.operations(8, MIB // 2, *peers)
    operations["memory"][6:] = 1
    operations["local"][6:] = memory.address + np.arange(2) * (MIB // 2)

    statuses = client.worker.transfer(
        Direction.GET, operations, endpoints, [client.memory, memory], keys, deadline_s=20
    )

    assert not statuses.any()
    words = np.concatenate([client.buffer[: 3 * MIB], second]).view(np.uint64)
    assert np.array_equal(words, np.arange(len(words)))


def test_an_empty_batch_is_done(untouched_peer, make_client):
    peer, client = untouched_peer(None), make_client(MIB, None)
    assert len(client.transfer(Direction.GET, client.operations(0, 8, peer), [client.connect(peer)])) == 0


@pytest.mark.parametrize("direction", Direction)
def test_a_node_that_dies_mid_batch_harms_only_its_own_blocks(start_peer, make_client, tls, direction):
    live, dead = start_peer(16 * MIB, tls), start_peer(16 * MIB, tls)
    client = make_client(16 * MIB, tls)
    lanes = [client.connect(live), client.connect(dead)]
    operations = client.operations(2048, MIB, live, dead)  # 2 GiB: far from done when the kill comes
    timer = threading.Timer(0.05, dead.kill)

    timer.start()
    started_s = time.monotonic()
    statuses = client.transfer(direction, operations, lanes, deadline_s=20)
    took_s = time.monotonic() - started_s
    timer.join()

    of_live, of_dead = statuses[operations["endpoint"] == 0], statuses[operations["endpoint"] == 1]
    assert not of_live.any()
    assert (of_dead < 0).any()
    if direction is Direction.PUT:
        assert (of_dead < 0).all()  # never flushed: none of them is known to be there
    assert took_s < 20
    assert lanes[0][0].failed is None
    assert lanes[1][0].failed
    assert not client.transfer(direction, client.operations(16, MIB, live), lanes[:1]).any()


def test_a_node_that_is_gone_fails_within_the_deadline(start_peer, make_client, tls):
    peer, client = start_peer(MIB, tls), make_client(MIB, tls)
    peer.close()
    started_s = time.monotonic()
    try:
        lane = client.connect(peer)
    except TransportError:
        return
    statuses = client.transfer(Direction.GET, client.operations(16, 65536, peer), [lane], deadline_s=2)
    assert (statuses < 0).all()
    assert lane[0].failed
    assert time.monotonic() - started_s < 2 + DRAIN_S + SLACK_S


@pytest.mark.parametrize("direction", Direction)
def test_a_frozen_node_costs_one_deadline_and_its_blocks_only(start_peer, make_client, direction):
    live, frozen = start_peer(16 * MIB, "tcp"), start_peer(16 * MIB, "tcp")
    client = make_client(16 * MIB, "tcp")
    lanes = [client.connect(live), client.connect(frozen)]
    assert not client.transfer(direction, client.operations(2, 4096, live, frozen), lanes).any()
    frozen.freeze()
    operations = client.operations(8192, 16 * 1024, live, frozen)

    started_s = time.monotonic()
    statuses = client.transfer(direction, operations, lanes, deadline_s=2)
    took_s = time.monotonic() - started_s

    assert not statuses[operations["endpoint"] == 0].any()
    assert (statuses[operations["endpoint"] == 1] < 0).any()
    assert set(statuses[operations["endpoint"] == 1]) <= {0, -20}
    assert took_s < 2 + DRAIN_S + SLACK_S
    assert lanes[0][0].failed is None
    assert "(-20)" in lanes[1][0].failed
    # Refused at once from here on, with no further wait.
    started_s = time.monotonic()
    again = client.operations(4, 4096, frozen)
    assert (client.transfer(direction, again, lanes[1:], deadline_s=2) == -20).all()
    assert time.monotonic() - started_s < SLACK_S


def test_local_memory_is_left_alone_once_a_timed_out_get_has_returned(start_peer, make_client):
    peer, client = start_peer(16 * MIB, "tcp"), make_client(16 * MIB, "tcp")
    lane = client.connect(peer)
    assert not client.transfer(Direction.GET, client.operations(1, 4096, peer), [lane]).any()
    peer.freeze()
    assert client.transfer(Direction.GET, client.operations(16, MIB, peer), [lane], deadline_s=0.5).all()
    client.buffer[:] = 0xA5

    peer.thaw()
    lane[0].close()
    lane = client.connect(peer)
    last = client.operations(16, MIB, peer)[-1:].copy()
    for _ in range(20):
        assert not client.transfer(Direction.GET, last, [lane]).any()
        time.sleep(0.02)

    assert (client.buffer[: 15 * MIB] == 0xA5).all()
    assert np.array_equal(client.buffer[15 * MIB :].view(np.uint64), np.arange(15 * MIB // 8, 16 * MIB // 8))


def test_a_worker_reaches_a_thawed_node_through_a_new_endpoint(start_peer, make_client):
    peer, client = start_peer(MIB, "tcp"), make_client(MIB, "tcp")
    operations = client.operations(16, 65536, peer)
    lane = client.connect(peer)
    for _ in range(3):
        peer.freeze()
        assert client.transfer(Direction.PUT, operations, [lane], deadline_s=0.3).any()
        peer.thaw()
        lane[0].close()
        lane = client.connect(peer)
        assert not client.transfer(Direction.PUT, operations, [lane]).any()
    assert client.worker.statistics().endpoints == 1


def test_a_closed_endpoint_fails_its_operations(untouched_peer, make_client, tls):
    peer, client = untouched_peer(tls), make_client(MIB, tls)
    lane = client.connect(peer)
    lane[0].close()
    assert (client.transfer(Direction.GET, client.operations(4, 4096, peer), [lane]) < 0).all()
    assert lane[0].failed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("local", lambda memory: memory.address - 1),
        ("local", lambda memory: memory.address + memory.length - 4095),
        ("local", lambda memory: 0),
        ("length", lambda memory: memory.length + 1),
        ("length", lambda memory: 2**64 - 1),
        ("memory", lambda memory: 1),
        ("endpoint", lambda memory: 1),
    ],
)
@pytest.mark.parametrize("direction", Direction)
def test_a_batch_out_of_bounds_is_refused_whole(untouched_peer, make_client, direction, field, value):
    peer, client = untouched_peer(None), make_client(MIB, None)
    lane = client.connect(peer)
    before = peer.digest(0, MIB)
    operations = client.operations(8, 4096, peer)
    operations[field][5] = value(client.memory)

    with pytest.raises(TransportError, match=f"operation 5 .*'{field}': {operations[field][5]}"):
        client.transfer(direction, operations, [lane])

    assert not client.buffer.any()
    assert peer.digest(0, MIB) == before


def test_keys_endpoints_and_memories_of_others_are_refused(untouched_peer, make_client):
    peer, client, other = untouched_peer(None), make_client(MIB, None), make_client(MIB, None)
    endpoint, key = client.connect(peer)
    _, second_key = client.connect(peer)
    operations = client.operations(1, 8, peer)
    with pytest.raises(TransportError, match="key at the same index"):
        client.transfer(Direction.GET, operations, [(endpoint, second_key)])
    with pytest.raises(TransportError, match="this worker's own"):
        other.transfer(Direction.GET, other.operations(1, 8, peer), [(endpoint, key)])
    with pytest.raises(TransportError, match="context"):
        client.worker.transfer(Direction.GET, operations, [endpoint], [other.memory], [key], 1.0)
    with pytest.raises(TransportError, match="contiguous"):
        client.transfer(Direction.GET, client.operations(4, 8, peer)[::2], [(endpoint, key)])


def test_a_batch_hardly_waits_for_a_busy_python_thread(untouched_peer, make_client, tls):
    peer, client = untouched_peer(tls), make_client(64 * MIB, tls)
    lane = client.connect(peer)
    operations = client.operations(64, MIB, peer)
    client.transfer(Direction.GET, operations, [lane])
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    spinner = threading.Thread(target=spin)
    spinner.start()
    try:
        started_s = time.monotonic()
        statuses = client.transfer(Direction.GET, operations, [lane])
        took_s = time.monotonic() - started_s
    finally:
        stop.set()
        spinner.join()
    assert not statuses.any()
    assert took_s < 1.0  # per operation in Python: more than 5 s


def test_a_stuck_write_does_not_delay_reads(start_peer, untouched_peer, make_client):
    frozen, live, client = start_peer(MIB, "tcp"), untouched_peer("tcp"), make_client(16 * MIB, "tcp")
    lane = client.connect(frozen)
    frozen.freeze()
    reader = Worker(client.context)
    endpoint = reader.connect(live.address)
    key = endpoint.unpack(live.rkey)
    reads = client.operations(64, 65536, live)
    writes = client.operations(16, 65536, frozen)
    stuck = threading.Thread(target=client.transfer, args=(Direction.PUT, writes, [lane], 3.0))
    stuck.start()

    rounds = 0
    while stuck.is_alive():
        statuses = reader.transfer(Direction.GET, reads, [endpoint], [client.memory], [key], deadline_s=2)
        assert not statuses.any()
        rounds += 1
    stuck.join()

    assert rounds > 10
    assert client.worker.statistics().failed_operations == 16


def test_an_idle_node_sleeps_and_stops_at_once(start_peer, make_client, tls):
    peer, client = start_peer(MIB, tls), make_client(MIB, tls)
    client.transfer(Direction.GET, client.operations(16, 65536, peer), [client.connect(peer)])
    process = psutil.Process(peer.process.pid)
    before = process.cpu_times()
    time.sleep(1.0)
    after = process.cpu_times()
    assert (after.user + after.system) - (before.user + before.system) < 0.2
    assert peer.stop()["stop_s"] < 1.0


def test_a_process_may_end_without_closing_anything():
    """Its peer ends with it: UCX's own thread hears of that while the interpreter unloads what it can."""
    command = [sys.executable, "-c", UNTIDY]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, stdout=subprocess.PIPE, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (0, "[0]\n")


def test_statistics_count_what_was_done(start_peer, make_client):
    peer, client = start_peer(MIB, "tcp"), make_client(MIB, "tcp")
    lane = client.connect(peer)
    client.transfer(Direction.GET, client.operations(4, 4096, peer), [lane])
    client.transfer(Direction.PUT, client.operations(2, 4096, peer), [lane])
    peer.freeze()
    client.transfer(Direction.PUT, client.operations(3, 4096, peer), [lane], deadline_s=0.2)
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
