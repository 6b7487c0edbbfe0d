"""What is found for a request that waits stays in the pool until it is dropped; and never too much of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.pool.rank import PIECE_BYTES, Rank, a_rank, prompt
from tests.support import RunningNode, running_node

BLOCK_BYTES = 2 * PIECE_BYTES
CAPACITY_BLOCKS = (16 << 20) // BLOCK_BYTES
LEASE_S = 30.0


def wait_for_leases(node: RunningNode, count: int) -> None:
    end = time.monotonic() + 10
    while node.statistics().leases != count:
        assert time.monotonic() < end, node.statistics()
        time.sleep(0.01)


def flood(rank: Rank, name: str) -> None:
    """Write as many blocks as the node has room for."""
    for number in range(-(-CAPACITY_BLOCKS // 64)):
        rank.put(prompt(f"{name} {number}", 64))


def test_what_is_held_outlives_any_number_of_writes_until_it_is_dropped() -> None:
    blocks = prompt("held", 32)
    with running_node("16MiB") as node, a_rank(node.address) as rank:
        rank.put(blocks)
        kept = rank.client.hold(blocks, LEASE_S)
        assert (kept.blocks, kept.whole, len(kept.leases)) == (32, True, 1)
        assert node.statistics().leased_bytes >= 32 * BLOCK_BYTES
        flood(rank, "first")
        flood(rank, "second")
        assert node.statistics().evictions_total > 0
        assert rank.client.peek(blocks) == 32
        rank.client.drop(kept)
        wait_for_leases(node, 0)
        flood(rank, "third")
        flood(rank, "fourth")
        assert rank.client.peek(blocks) == 0


def test_what_is_held_in_a_gap_of_a_chain_counts_to_the_gap() -> None:
    with running_node("16MiB") as node, a_rank(node.address) as rank:
        rank.put(prompt("gap", 12, before=8))
        rank.put(prompt("gap", 4))
        kept = rank.client.hold(prompt("gap", 12), LEASE_S)
        assert kept.blocks == 4
        rank.client.drop(kept)
        wait_for_leases(node, 0)


def test_a_node_keeps_no_more_than_half_of_its_memory_for_requests_that_wait() -> None:
    with running_node("16MiB") as node, a_rank(node.address) as rank:
        prompts = [prompt(f"waiting {number}", 64) for number in range(CAPACITY_BLOCKS // 64)]
        for blocks in prompts:
            assert all(rank.put(blocks))
        kept = [rank.client.hold(blocks, LEASE_S) for blocks in prompts]
        assert all(each.blocks == 64 for each in kept), "what is not kept is still found"
        assert any(each.whole for each in kept)
        assert not all(each.whole for each in kept)
        statistics = node.statistics()
        assert 0 < statistics.leased_bytes <= statistics.capacity_bytes / 2
        # The same blocks for another request are kept at no cost.
        again = rank.client.hold(prompts[0], LEASE_S)
        assert again.whole
        assert node.statistics().leased_bytes == statistics.leased_bytes
        assert rank.client.get(prompts[-1], rank.pieces(64)).all(), "a read is not bounded"


def test_what_is_held_is_let_go_when_its_holder_is_gone() -> None:
    blocks = prompt("gone", 8)
    with running_node("16MiB") as node:
        with a_rank(node.address) as rank:
            rank.put(blocks)
            assert rank.client.hold(blocks, LEASE_S).whole
            assert node.statistics().leases == 1
        wait_for_leases(node, 0)


@pytest.mark.slow
def test_a_hold_lasts_as_long_as_it_is_renewed() -> None:
    blocks = prompt("renewed", 8)
    with running_node("16MiB") as node, a_rank(node.address) as rank:
        rank.put(blocks)
        kept = rank.client.hold(blocks, 1.0)
        for _ in range(6):
            time.sleep(0.4)
            assert rank.client.renew(kept, 1.0)
        assert node.statistics().leases == 1
        wait_for_leases(node, 0)
        assert not rank.client.renew(kept, 1.0)


@pytest.mark.parametrize(
    "fail",
    [RunningNode.freeze, pytest.param(RunningNode.kill, marks=pytest.mark.slow)],
    ids=["frozen", "killed"],
)
def test_a_node_that_fails_keeps_nothing_and_costs_no_exception(fail: Callable[[RunningNode], None]) -> None:
    blocks = prompt("lost", 8)
    with running_node("16MiB") as node, a_rank(node.address) as rank:
        rank.put(blocks)
        kept = rank.client.hold(blocks, LEASE_S)
        fail(node)
        assert not rank.client.renew(kept, LEASE_S)
        assert rank.client.hold(blocks, LEASE_S).blocks == 0
        rank.client.drop(kept)
