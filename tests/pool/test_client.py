"""The pool as a rank uses it, over real memory nodes and real UCX."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from polarkv_sglang.errors import ConfigError
from polarkv_sglang.pool.blocks import Pieces
from polarkv_sglang.pool.client import MAX_DEADLINE_S, PoolClient
from polarkv_sglang.pool.placement import ranking
from tests.pool.rank import (
    DEADLINE_S,
    PIECE_BYTES,
    STRIPE_PAGES,
    Rank,
    a_rank,
    flip_a_byte,
    prompt,
    wait_until_live,
)
from tests.support import RunningNode, running_node, running_nodes

# Shared memory; UCX where it can get; the connection where there is nothing better than TCP.
TRANSPORTS = [None, "cma,tcp", "tcp"]


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with running_node("64MiB") as running:
        yield running


@pytest.mark.parametrize("ucx_tls", TRANSPORTS)
def test_a_block_comes_back_byte_for_byte(node: RunningNode, ucx_tls: str | None) -> None:
    blocks = prompt(f"round trip {ucx_tls}", 40)
    with a_rank(node.address, ucx_tls=ucx_tls) as rank:
        before = rank.memory.copy()
        assert rank.put(blocks) == [True] * 40
        assert rank.get(blocks) == [True] * 40
        assert (rank.memory == before).all()


def test_what_one_rank_put_another_gets(node: RunningNode) -> None:
    blocks = prompt("shared", 16)
    with a_rank(node.address, seed=1) as writer, a_rank(node.address, seed=2) as reader:
        assert writer.put(blocks) == [True] * 16
        assert reader.client.peek(blocks) == 16
        assert reader.get(blocks) == [True] * 16
        assert (reader.memory[:, :16] == writer.memory[:, :16]).all()


def test_a_block_that_the_pool_has_is_not_sent_again(node: RunningNode) -> None:
    blocks = prompt("twice", 8)
    with a_rank(node.address) as rank:
        assert rank.put(blocks) == [True] * 8
        assert rank.put(blocks) == [True] * 8
        assert rank.client.statistics().put_blocks == 8
        assert rank.client.statistics().present_blocks == 8


@pytest.mark.parametrize("ucx_tls", TRANSPORTS)
def test_reading_ends_at_the_first_miss(node: RunningNode, ucx_tls: str | None) -> None:
    name = f"gap {ucx_tls}"
    head, whole = prompt(name, 6), prompt(name, 12)
    with a_rank(node.address, ucx_tls=ucx_tls) as rank:
        assert rank.put(head) == [True] * 6
        assert rank.client.peek(whole) == 6
        assert rank.get(whole) == [True] * 6 + [False] * 6
        # What lies behind a gap is of no use and is not read.
        tail = prompt(name, 12, before=8)
        assert rank.put(tail) == [True] * 4
        assert rank.get(whole) == [True] * 6 + [False] * 6


@pytest.mark.parametrize("ucx_tls", TRANSPORTS)
def test_a_flipped_byte_is_a_miss_and_the_block_is_dropped(node: RunningNode, ucx_tls: str | None) -> None:
    blocks = prompt(f"flipped {ucx_tls}", 8)
    with a_rank(node.address, ucx_tls=ucx_tls) as rank:
        assert rank.put(blocks) == [True] * 8
        flip_a_byte(node, blocks.keys[5])
        assert rank.get(blocks) == [True] * 5 + [False] + [True] * 2
        assert rank.client.statistics().corrupt_blocks == 1
        end = time.monotonic() + 5
        while rank.client.peek(blocks) != 5:  # the report has no reply to wait for
            assert time.monotonic() < end
        assert node.statistics().corrupt_total >= 1


@pytest.mark.parametrize("ucx_tls", TRANSPORTS)
def test_a_block_of_another_length_is_a_miss(node: RunningNode, ucx_tls: str | None) -> None:
    blocks = prompt(f"length {ucx_tls}", 4)
    with a_rank(node.address, ucx_tls=ucx_tls) as rank:
        assert rank.put(blocks) == [True] * 4
        one_piece = rank.pieces(4)
        got = rank.client.get(blocks, Pieces(one_piece.addresses[:, :1].copy(), PIECE_BYTES))
        assert not got.any()


def test_a_dead_node_is_a_miss_within_the_deadline_and_then_costs_nothing() -> None:
    blocks = prompt("dead", 32)
    with running_node() as doomed, a_rank(doomed.address) as rank:
        assert rank.put(blocks) == [True] * 32
        doomed.kill()
        started = time.monotonic()
        assert rank.client.peek(blocks) == 0
        assert time.monotonic() - started < 2 * DEADLINE_S
        started = time.monotonic()
        assert rank.get(blocks) == [False] * 32
        assert rank.put(blocks) == [False] * 32
        assert rank.client.peek(blocks) == 0
        assert time.monotonic() - started < 0.1


# faults/test_memory_nodes.py freezes nodes under calls of all kinds, in each way.
FROZEN = {("get", "cma,tcp"), ("put", "tcp"), ("peek", None)}


@pytest.mark.parametrize(
    ("operation", "ucx_tls"),
    [
        pytest.param(*case, marks=() if case in FROZEN else pytest.mark.slow)
        for case in itertools.product(["get", "put", "peek"], TRANSPORTS)
    ],
)
def test_a_frozen_node_is_a_miss_within_the_deadline_and_then_costs_nothing(
    operation: str, ucx_tls: str | None
) -> None:
    blocks, new = prompt("frozen", 32), prompt("frozen, new", 32)

    def operate(rank: Rank) -> None:
        match operation:
            case "get":
                assert rank.get(blocks) == [ucx_tls is None] * 32  # what is mapped can be read all the same
            case "put":
                assert rank.put(new) == [False] * 32
            case _:
                assert rank.client.peek(blocks) == 0

    with running_node() as frozen, a_rank(frozen.address, ucx_tls=ucx_tls) as rank:
        assert rank.put(blocks) == [True] * 32
        frozen.freeze()
        started = time.monotonic()
        operate(rank)
        assert time.monotonic() - started < 2 * DEADLINE_S
        started = time.monotonic()
        operate(rank)
        assert time.monotonic() - started < 0.1
        os.kill(frozen.pid, signal.SIGCONT)
        wait_until_live(rank, 1)
        assert rank.get(blocks) == [True] * 32


def test_a_node_killed_during_reads_and_writes_loses_nothing_but_hits() -> None:
    with running_node("256MiB") as doomed, a_rank(doomed.address, seed=3) as rank:
        blocks = prompt("killed under load", 64)
        assert rank.put(blocks) == [True] * 64
        before = rank.memory.copy()
        killer = threading.Timer(0.3, doomed.kill)
        killer.start()
        ended = time.monotonic() + 1.5
        outcomes = set()
        while time.monotonic() < ended:
            got = np.array(rank.get(blocks))
            # A block that is said to be there is right to the last byte.
            assert (rank.memory[:, :64][:, got] == before[:, :64][:, got]).all()
            outcomes.add(bool(got.all()))
            rank.memory[:] = before
            rank.put(prompt(f"more {time.monotonic()}", 64))
        killer.join()
        assert outcomes == {True, False}


def test_an_absent_node_is_used_once_it_is_there() -> None:
    with running_node() as first:
        address = first.address
        first.stop()
    blocks = prompt("late", 8)
    with a_rank(address) as rank:
        assert rank.put(blocks) == [False] * 8
        with running_node(listen=address):
            wait_until_live(rank, 1)
            assert rank.put(blocks) == [True] * 8
            assert rank.get(blocks) == [True] * 8


def test_a_restarted_node_is_empty_and_used_again() -> None:
    blocks = prompt("restart", 8)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(running_node())
        rank = stack.enter_context(a_rank(first.address))
        assert rank.put(blocks) == [True] * 8
        assert first.stop() == 0
        stack.enter_context(running_node(listen=first.address))
        assert rank.client.peek(blocks) == 0
        wait_until_live(rank, 1)
        assert rank.get(blocks) == [False] * 8
        assert rank.put(blocks) == [True] * 8
        assert rank.get(blocks) == [True] * 8


def test_a_wrong_token_keeps_kv_local() -> None:
    blocks = prompt("token", 4)
    with running_node(token="right") as guarded:
        with a_rank(guarded.address, token="wrong") as rank:
            assert rank.put(blocks) == [False] * 4
            assert "token" in rank.client.membership.reasons()[guarded.address]
        with a_rank(guarded.address, token="right") as rank:
            assert rank.put(blocks) == [True] * 4


def test_stripes_are_spread_and_a_dead_node_costs_only_its_own() -> None:
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(running_nodes(3))
        addresses = [node.address for node in nodes]
        rank = stack.enter_context(a_rank(*addresses))
        wait_until_live(rank, 3)
        blocks = prompt("spread", 64)
        before = rank.memory.copy()
        assert rank.put(blocks) == [True] * 64
        assert rank.get(blocks) == [True] * 64
        assert (rank.memory == before).all()
        held = [node.statistics().blocks for node in nodes]
        assert sum(held) == 64
        assert all(count % STRIPE_PAGES == 0 for count in held), "a stripe is not split"
        assert sum(count > 0 for count in held) >= 2

        # The node of the last stripe dies: what comes before it is still a hit.
        capacities = dict.fromkeys(addresses, 1)
        home = ranking(blocks.anchors[-1], capacities, 1)[0]
        homes = [ranking(anchor, capacities, 1)[0] for anchor in blocks.anchors]
        first_lost = homes.index(home)
        nodes[addresses.index(home)].kill()
        rank.client.peek(blocks)  # and is found out
        got = rank.get(blocks)
        assert got == [True] * first_lost + [False] * (64 - first_lost)
        # Its stripes find a new home among those that are left.
        rank.memory[:] = before
        assert rank.put(blocks) == [True] * 64
        assert rank.get(blocks) == [True] * 64
        assert (rank.memory == before).all()


@pytest.mark.parametrize(
    "ucx_tls",
    [pytest.param(None, marks=pytest.mark.slow), pytest.param("cma,tcp", marks=pytest.mark.slow), "tcp"],
)
def test_a_frozen_node_does_not_take_the_others_with_it(ucx_tls: str | None) -> None:
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(running_nodes(3))
        rank = stack.enter_context(a_rank(*[node.address for node in nodes], ucx_tls=ucx_tls))
        wait_until_live(rank, 3)
        blocks = prompt("one frozen", 64)
        assert rank.put(blocks) == [True] * 64
        for number, frozen in enumerate(nodes):
            frozen.freeze()
            # Whatever the order in which nodes are asked, and whether it is to read, to write or to look.
            match number:
                case 0 if ucx_tls is None:
                    # What is mapped is read all the same; what nobody has is asked for.
                    assert rank.get(blocks) == [True] * 64
                    rank.get(prompt("one frozen, unknown", 64))
                case 0:
                    rank.get(blocks)
                case 1:
                    rank.put(prompt("one frozen, new", 64))
                case _:
                    rank.client.peek(blocks)
            assert set(rank.client.membership.live) == {node.address for node in nodes} - {frozen.address}
            os.kill(frozen.pid, signal.SIGCONT)
            wait_until_live(rank, 3)
        rank.memory[:] = 1
        again = prompt("one frozen, later", 64)
        assert rank.put(again) == [True] * 64
        assert rank.get(again) == [True] * 64


def test_a_node_that_returns_under_traffic_is_used_by_every_lane() -> None:
    blocks = prompt("back under traffic", 8)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(running_node())
        rank = stack.enter_context(a_rank(first.address))
        stop = threading.Event()

        def peek() -> None:
            while not stop.is_set():
                rank.client.peek(blocks)

        peeking = threading.Thread(target=peek)
        peeking.start()
        try:
            first.stop()
            wait_until_live(rank, 0)
            # The connector links the lanes one by one; a busy one holds it up while the others go on.
            with rank.client._put_lane.lock:
                stack.enter_context(running_node(listen=first.address))
                time.sleep(2)
            wait_until_live(rank, 1)
        finally:
            stop.set()
            peeking.join()
        assert rank.put(blocks) == [True] * 8
        assert rank.client.peek(blocks) == 8
        assert rank.get(blocks) == [True] * 8


def test_a_node_that_joins_takes_only_its_share() -> None:
    anchors = [hashlib.sha256(str(i).encode()).digest()[:16] for i in range(4000)]
    three = {"a:1": 100, "b:1": 100, "c:1": 200}
    four = {**three, "d:1": 100}
    before, after = ([ranking(a, nodes, 1)[0] for a in anchors] for nodes in (three, four))
    moved = [new for old, new in zip(before, after) if old != new]
    assert set(moved) == {"d:1"}
    assert 0.15 < len(moved) / len(anchors) < 0.25
    assert 0.45 < before.count("c:1") / len(anchors) < 0.55


def test_reads_do_not_wait_for_writes() -> None:
    count, size = 256, 1 << 20
    with running_node("512MiB") as node, a_rank(node.address, deadline_s=10, seed=4) as rank:
        blocks = prompt("read beside writes", 4)
        assert rank.put(blocks) == [True] * 4
        outgoing = np.zeros((count, size), np.uint8)
        rank.client.register(outgoing.ctypes.data, outgoing.nbytes)
        addresses = outgoing.ctypes.data + np.arange(count, dtype=np.uint64)[:, None] * np.uint64(size)
        for attempt in range(20):
            chain = prompt(f"write {attempt}", count)
            writing = threading.Thread(target=rank.client.put, args=(chain, Pieces(addresses, size)))
            writing.start()
            reads = 0
            while writing.is_alive():
                assert rank.get(blocks) == [True] * 4
                reads += 1
            writing.join()
            if reads > 3:  # in a queue with the write, one before it and the one that it held up
                return
        pytest.fail(f"{reads} reads ended during a write of {outgoing.nbytes} bytes")


def test_a_deadline_that_could_outlast_a_lease_is_refused() -> None:
    with pytest.raises(ConfigError, match="leased"):
        PoolClient(["127.0.0.1:1"], deadline_s=MAX_DEADLINE_S + 1)
