"""Copies of stripes that are read often, and what they are good for."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import pytest

from polarkv_sglang.pool.heat import HotStripes
from polarkv_sglang.pool.placement import ranking
from polarkv_sglang.transport.messages import Peek, Replicate
from tests.pool.rank import STRIPE_PAGES, Rank, a_rank, flip_a_byte, prompt, wait_until_live
from tests.support import RunningNode, running_node, running_nodes

PAGES = STRIPE_PAGES  # one stripe, which has one home
DEADLINE_S = 2.0  # a quarter of it is what the first look may take, also on a busy machine


def flags(ucx_tls: str | None) -> list[str]:
    return [] if ucx_tls is None else ["--ucx-tls", ucx_tls]


@contextlib.contextmanager
def a_pool(
    copies: int = 2, ucx_tls: str | None = None, *more: str
) -> Iterator[tuple[Rank, dict[str, RunningNode]]]:
    """A rank over two memory nodes; with two of them, a stripe's copy is on the other one."""
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(running_nodes(2, "64MiB", *flags(ucx_tls), *more))
        addresses = [node.address for node in nodes]
        rank = stack.enter_context(a_rank(*addresses, copies=copies, deadline_s=DEADLINE_S, ucx_tls=ucx_tls))
        wait_until_live(rank, 2)
        yield rank, {node.address: node for node in nodes}


def wait_until_held(node: RunningNode, blocks: int, timeout_s: float = 10) -> None:
    end = time.monotonic() + timeout_s
    while node.statistics().blocks < blocks:
        assert time.monotonic() < end, node.statistics()
        time.sleep(0.02)


@pytest.mark.parametrize("ucx_tls", [None, "tcp"])
def test_a_stripe_that_is_read_again_is_copied_and_outlives_its_home(ucx_tls: str | None) -> None:
    blocks = prompt("hot", PAGES)
    with a_pool(ucx_tls=ucx_tls) as (rank, nodes):
        before = rank.memory.copy()
        assert rank.put(blocks) == [True] * PAGES
        assert sum(node.statistics().blocks for node in nodes.values()) == PAGES
        for _ in range(2):
            assert rank.get(blocks) == [True] * PAGES
        for node in nodes.values():
            wait_until_held(node, PAGES)
        home = ranking(blocks.anchors[0], rank.client.membership.live, 1)[0]
        nodes[home].kill()
        # The read that finds its node dead turns to the copy at once.
        started = time.monotonic()
        assert rank.get(blocks) == [True] * PAGES
        assert time.monotonic() - started < 2 * DEADLINE_S
        assert (rank.memory[:, :PAGES] == before[:, :PAGES]).all()
        assert rank.client.peek(blocks) == PAGES


def slab_bytes(node: RunningNode) -> int:
    """Of its slab, what is backed by memory."""
    with node.connect() as control:
        shared = control.welcome.shared
    assert shared is not None
    return os.stat(f"/proc/{shared.pid}/fd/{shared.fd}").st_blocks * 512


def test_a_node_that_copies_takes_no_memory_for_it() -> None:
    """Its slab is registered with a client then, which takes memory for what others register."""
    with a_pool(2, None, "--no-prefault") as (rank, nodes):
        blocks = prompt("hot", PAGES)
        rank.put(blocks)
        before = {address: slab_bytes(node) for address, node in nodes.items()}
        assert all(taken < 16 << 20 for taken in before.values())
        for _ in range(2):
            assert rank.get(blocks) == [True] * PAGES
        for node in nodes.values():
            wait_until_held(node, PAGES)
        assert all(slab_bytes(node) < 16 << 20 for node in nodes.values())


def test_a_home_that_lost_its_stripe_gets_it_back_from_the_copy() -> None:
    blocks = prompt("come home", PAGES)
    with a_pool() as (rank, nodes):
        assert rank.put(blocks) == [True] * PAGES
        for _ in range(2):
            assert rank.get(blocks) == [True] * PAGES
        for node in nodes.values():
            wait_until_held(node, PAGES)
        home = ranking(blocks.anchors[0], rank.client.membership.live, 1)[0]
        nodes[home].kill()
        with running_node(listen=home) as restarted:
            wait_until_live(rank, 1)
            wait_until_live(rank, 2)
            assert rank.client.peek(blocks) == PAGES
            # Each read away from home asks for it; the other node may still have to connect again.
            end = time.monotonic() + 40
            while restarted.statistics().blocks < PAGES:
                assert time.monotonic() < end
                assert rank.get(blocks) == [True] * PAGES
                time.sleep(0.1)


@pytest.mark.parametrize("ucx_tls", [None, "tcp"])
def test_a_block_that_is_not_what_was_written_is_not_copied(ucx_tls: str | None) -> None:
    """A copy gets a checksum of its own: taken of damaged bytes, it would make them right."""
    blocks = prompt("damaged", PAGES)
    with (
        running_nodes(2, "64MiB", *flags(ucx_tls)) as (source, target),
        a_rank(source.address, ucx_tls=ucx_tls) as rank,
    ):
        assert rank.put(blocks) == [True] * PAGES
        flip_a_byte(source, blocks.keys[3])
        with source.connect() as control:
            control.send(Replicate(b"".join(blocks.keys), target.address))
            wait_until_held(target, PAGES - 1)
        with target.connect() as control:
            held = control.request(Peek(control.next_id(), b"".join(blocks.keys)), 5.0)
        assert held.present == bytes(page != 3 for page in range(PAGES))


def test_without_copies_a_stripe_has_one_home() -> None:
    blocks = prompt("one home", PAGES)
    with a_pool(copies=1) as (rank, nodes):
        assert rank.put(blocks) == [True] * PAGES
        for _ in range(4):
            assert rank.get(blocks) == [True] * PAGES
        time.sleep(0.3)
        assert sum(node.statistics().blocks for node in nodes.values()) == PAGES


@pytest.mark.parametrize("reads", [2, 3])
def test_a_stripe_becomes_hot_once(reads: int) -> None:
    heat = HotStripes(hot_reads=reads)
    counts = [heat.count([b"a", b"b"]) for _ in range(5)]
    assert counts == [{b"a", b"b"} if number == reads - 1 else set() for number in range(5)]


def test_what_was_not_read_for_long_is_forgotten() -> None:
    heat = HotStripes(hot_reads=2, remembered=2)
    heat.count([b"a"])
    heat.count([b"b", b"c"])
    assert heat.count([b"a"]) == set()
    assert heat.count([b"c"]) == {b"c"}
